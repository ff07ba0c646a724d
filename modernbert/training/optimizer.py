"""StableAdamW, the optimizer of the published recipe.

Sources: Loshchilov and Hutter 2019, arXiv 1711.05101 (AdamW); Wortsman et al. 2023,
arXiv 2304.13013 (the clipping); the package `optimi` (debiased betas, fully decoupled decay).
"""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

LOW_PRECISION = (torch.bfloat16, torch.float16)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters of `model` in two groups: those that decay ("decays"), and the rest.

    Matrices and embedding tables decay; biases and whatever has at most one dimension do not.
    A tied tensor appears once. A group without parameters is left out.
    """
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = parameter.ndim > 1 and name.rpartition(".")[2] != "bias"
            (decayed if plain else others).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay, "decays": True},
        {"params": others, "weight_decay": 0.0, "decays": False},
    ]
    return [group for group in groups if group["params"]]


class StableAdamW(torch.optim.Optimizer):
    """AdamW whose step is cut, tensor by tensor, where the gradient outgrows its own history.

    Step t of one tensor, with b_hat = (b^t - b) / (b^t - 1) for either beta b:

        m    = lerp(m, g, 1 - b1_hat)
        v    = b2_hat * v + (1 - b2_hat) * g^2
        rms  = sqrt(mean(g^2 / max(v, eps^2)))
        lr_t = lr / max(1, rms)
        p   *= 1 - lr_t / max_lr * weight_decay
        p   -= lr_t * m / (sqrt(v) + eps)

    Weight decay is the fraction lost per step at the peak of the schedule, whatever the learning
    rate is there. Parameters in bfloat16 or float16 are computed in float32, with moments in
    float32; what rounding takes from them is kept and added at the next step.

    Args:
        params: tensors, or groups as `parameter_groups` makes them.
        lr: learning rate; a schedule sets `group["lr"]` before each step.
        betas, eps: as in Adam.
        weight_decay: see above; the recipe's is 1e-5.
        max_lr: the peak of the schedule; by default the `lr` that the group starts with.
        kahan: keep the rounding errors of low-precision parameters (2 bytes a weight).

    The state of a parameter is `step` (int), the tensors `m` and `v` and, for low precision,
    `lost`. Raises `ValueError` for numbers out of range and for sparse gradients.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        max_lr: float | None = None,
        kahan: bool = True,
    ):
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "max_lr": max_lr,
            "kahan": kahan,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Check a group's numbers and fix its `max_lr`."""
        group = {**self.defaults, **param_group}
        if group["max_lr"] is None:
            group["max_lr"] = group["lr"]
        if group["lr"] < 0:
            raise ValueError(f"lr={group['lr']} is negative")
        if not group["max_lr"] > 0:
            raise ValueError(
                f"max_lr={group['max_lr']} must be above 0: give the schedule's peak as lr"
            )
        for beta in group["betas"]:
            if not 0 <= beta < 1:
                raise ValueError(f"betas={group['betas']} must be at least 0 and below 1")
        if not group["eps"] > 0:
            raise ValueError(f"eps={group['eps']} must be above 0")
        if not 0 <= group["weight_decay"] < 1:
            raise ValueError(
                f"weight_decay={group['weight_decay']} must be at least 0 and below 1: it is the "
                "fraction of a weight that a step at the peak learning rate takes away"
            )
        super().add_param_group(group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient; the loss, if `closure` computes one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            # A parameter that had no gradient in some step is behind the others.
            together: dict[tuple[Any, ...], list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.layout != torch.strided:
                    raise ValueError(f"StableAdamW needs dense gradients, got {p.grad.layout}")
                state = self.state[p]
                if not state:
                    self._start(p, group)
                state["step"] += 1
                # A CPU keeps one tensor in its caches, a GPU wants all of them in one launch.
                alone = id(p) if p.device.type == "cpu" else None
                key = (state["step"], p.device, p.dtype, alone)
                together.setdefault(key, []).append(p)
            for (step, *_), params in together.items():
                self._update(params, step, group)
        return loss

    def _start(self, p: nn.Parameter, group: dict[str, Any]) -> None:
        wide = torch.promote_types(p.dtype, torch.float32)
        zeros = partial(torch.zeros_like, p, memory_format=torch.contiguous_format)
        self.state[p].update(step=0, m=zeros(dtype=wide), v=zeros(dtype=wide))
        if group["kahan"] and p.dtype in LOW_PRECISION:
            self.state[p]["lost"] = zeros()

    def _update(self, params: list[nn.Parameter], step: int, group: dict[str, Any]) -> None:
        states = [self.state[p] for p in params]
        m, v = [s["m"] for s in states], [s["v"] for s in states]
        # The fused kernel below walks through memory: all of its tensors must be contiguous.
        grads = [p.grad.to(m[0].dtype).contiguous() for p in params if p.grad is not None]
        values = [p.to(m[0].dtype).contiguous() for p in params]  # p itself, most of the time
        for value, state in zip(values, states, strict=True):
            if "lost" in state:
                value.add_(state["lost"])

        beta1, beta2 = (debiased(beta, step) for beta in group["betas"])
        # g / max(sqrt(v), eps), in one buffer: to allocate another costs a CPU more than the rest.
        ratios = torch._foreach_mul(v, beta2)
        torch._foreach_addcmul_(ratios, grads, grads, 1 - beta2)
        torch._foreach_sqrt_(ratios)
        torch._foreach_clamp_min_(ratios, group["eps"])
        torch._foreach_reciprocal_(ratios)
        torch._foreach_mul_(ratios, grads)
        norms = _numbers(torch._foreach_norm(ratios))
        # torch's fused AdamW is the rest of the step: debiased betas leave it no bias to correct,
        # so it is told that infinitely many steps have passed.
        passed = torch.full((), math.inf, device=params[0].device)
        for value, g, mean, square, norm in zip(values, grads, m, v, norms, strict=True):
            rms = norm / math.sqrt(max(1, value.numel()))
            torch._fused_adamw_(
                [value],
                [g],
                [mean],
                [square],
                [],
                [passed],
                lr=group["lr"] / max(1.0, rms),
                beta1=beta1,
                beta2=beta2,
                weight_decay=group["weight_decay"] / group["max_lr"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )

        for p, value, state in zip(params, values, states, strict=True):
            if value is not p:
                p.copy_(value)
            if "lost" in state:
                state["lost"].copy_(value.sub_(p))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned; every tensor bit for bit, and copied."""
        super().load_state_dict(state_dict)
        # torch casts a state to its parameter's dtype: the moments of bfloat16 would lose bits.
        saved = (i for group in state_dict["param_groups"] for i in group["params"])
        own = (p for group in self.param_groups for p in group["params"])
        for i, p in zip(saved, own, strict=True):
            for name, value in state_dict["state"].get(i, {}).items():
                if isinstance(value, Tensor):
                    self.state[p][name] = value.to(p.device, copy=True).contiguous()


def debiased(beta: float, step: int) -> float:
    """b_hat = (b^t - b) / (b^t - 1): 0 at the first step, so that moments need no correction."""
    power = beta**step
    return (power - beta) / (power - 1)


def _numbers(scalars: Iterable[Tensor]) -> list[float]:
    """0-d tensors as floats, with one synchronisation; of a sharded tensor, the whole's."""
    whole = [x.full_tensor() if hasattr(x, "full_tensor") else x for x in scalars]
    return torch.stack(whole).tolist()
