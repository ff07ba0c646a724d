"""The ModernBERT encoder, leaf first, model last.

Shapes: B = sequences, L = longest row of a padded batch, T = packed tokens of the batch,
D = hidden size, H = heads, d = D / H, I = intermediate size. Attribute names are the names in the
checkpoint. Source: Warner et al. 2024, arXiv 2412.13663.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from typing_extensions import Self

from modernbert import kernels
from modernbert.config import FULL, SLIDING, ModernBertConfig
from modernbert.kernels import AttentionPlan
from modernbert.packing import PackedBatch, pack_padded
from modernbert.pretrained import Output, PreTrainedModel, trunc_normal

Rotation = tuple[Tensor, Tensor]  # cos and sin, (T, d / 2) float32 each


@dataclass
class ModernBertOutput(Output):
    """What `ModernBertModel` returns; (B, L, D) for a padded call, (T, D) for a packed one.

    Attributes:
        last_hidden_state: after the final norm; zeros at pads.
        hidden_states: the embeddings, the output of each layer but the last, and
            `last_hidden_state`: as many as layers plus one.
        attentions: per layer, (B, H, L, L) or, for a packed call, a list of (H, length, length).
    """

    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Any, ...] | None = None


class LayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return kernels.layer_norm(x, self.weight, self.bias, self.eps)

    def after(self, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """x + delta and its norm, in one pass where there is a kernel for it."""
        return kernels.add_layer_norm(x, delta, self.weight, self.bias, self.eps)


def norm(config: ModernBertConfig) -> LayerNorm:
    return LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.norm_bias)


class RotaryTable:
    """cos and sin of every position for one theta, in float32; grows on demand.

    Source: Su et al. 2021, RoFormer; frequency i is theta^(-2 i / d).
    """

    def __init__(self, theta: float, head_dim: int, length: int):
        self.theta, self.head_dim, self.length = theta, head_dim, length
        self.tables: dict[torch.device, Tensor] = {}

    def __call__(self, positions: Tensor, max_position: int) -> Rotation:
        if torch.compiler.is_compiling():  # a graph cannot grow a table; it fuses the cosines
            cos, sin = self.rotations(positions)
            return cos, sin
        table = self.tables.get(positions.device)
        if table is None or max_position >= table.shape[1]:
            length = max(self.length, 1 << max_position.bit_length())
            # Outside of inference mode, or training after a first inference call would fail.
            with torch.inference_mode(False), torch.no_grad():
                table = self.rotations(torch.arange(length)).to(positions.device)
            self.tables[positions.device] = table
        cos, sin = table[:, positions]
        return cos, sin  # (T, d / 2) each

    def rotations(self, positions: Tensor) -> Tensor:
        """(2, T, d / 2): cos and sin at `positions` (T,)."""
        steps = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=positions.device)
        angles = positions.float()[:, None] * (1.0 / self.theta ** (steps / self.head_dim))
        return torch.stack((angles.cos(), angles.sin()))


class Embeddings(nn.Module):
    def __init__(self, config: ModernBertConfig):
        super().__init__()
        self.tok_embeddings = nn.Embedding(
            config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id
        )
        self.norm = norm(config)
        self.drop = nn.Dropout(config.embedding_dropout)

    def forward(self, batch: PackedBatch) -> Tensor:
        norm, table = self.norm, self.tok_embeddings
        if batch.input_ids is None:
            assert batch.inputs_embeds is not None
            return self.drop(norm(batch.inputs_embeds))
        x = kernels.embed_norm(
            batch.input_ids, table.weight, norm.weight, norm.bias, norm.eps, table.padding_idx
        )
        return self.drop(x)  # (T, D)


def attend(
    qkv: Tensor,
    rotation: Rotation,
    plan: AttentionPlan,
    cu_seqlens: Tensor | None,
    *,
    heads: int,
    local: bool,
    dropout: float = 0.0,
) -> tuple[Tensor, list[Tensor] | None]:
    """Attention of q, k, v (T, 3 D): (T, D), or with `cu_seqlens` that of first tokens, (B, D)."""
    qkv = rearrange(qkv, "t (three h d) -> t three h d", three=3, h=heads)
    maps = None
    if cu_seqlens is None:
        out, maps = kernels.rotary_attention(
            qkv, rotation, plan, local=local, dropout=dropout
        )  # (T, H, d)
    else:
        out = kernels.first_token_attention(qkv, rotation, plan, cu_seqlens, local=local)
    return out.flatten(1), maps


class Attention(nn.Module):
    def __init__(self, config: ModernBertConfig, index: int):
        super().__init__()
        self.local = config.layer_types[index] == SLIDING
        self.num_heads = config.num_attention_heads
        self.dropout = config.attention_dropout
        bias = config.attention_bias
        self.Wqkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=bias)
        self.Wo = nn.Linear(config.hidden_size, config.hidden_size, bias=bias)
        self.out_drop = nn.Dropout(config.attention_dropout)

    def forward(
        self, x: Tensor, rotation: Rotation, plan: AttentionPlan, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, list[Tensor] | None]:
        """(T, D) to (T, D); with `cu_seqlens` to (B, D), for the first token of each sequence."""
        out, maps = attend(
            self.Wqkv(x), rotation, plan, cu_seqlens, heads=self.num_heads, local=self.local,
            dropout=self.dropout if self.training else 0.0,
        )  # fmt: skip
        return self.out_drop(self.Wo(out)), maps


class MLP(nn.Module):
    def __init__(self, config: ModernBertConfig):
        super().__init__()
        self.activation = config.hidden_activation
        self.Wi = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=config.mlp_bias)
        self.Wo = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.drop = nn.Dropout(config.mlp_dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.Wo(self.drop(kernels.glu(self.Wi(x), self.activation)))


class Layer(nn.Module):
    def __init__(self, config: ModernBertConfig, index: int):
        super().__init__()
        # The embeddings are already normalised: the first layer has no norm of its own.
        self.attn_norm = norm(config) if index else nn.Identity()
        self.attn = Attention(config, index)
        self.mlp_norm = norm(config)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        delta: Tensor | None,
        rotation: Rotation,
        plan: AttentionPlan,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, list[Tensor] | None]:
        """The stream is x + delta: adding is left to the norm that comes after it.

        With `cu_seqlens`, what comes out is that of the first token of each sequence, (B, D).
        """
        if delta is None:
            y = self.attn_norm(x)
        else:
            assert isinstance(self.attn_norm, LayerNorm)
            x, y = self.attn_norm.after(x, delta)
        attended, maps = self.attn(y, rotation, plan, cu_seqlens)
        if cu_seqlens is not None:
            x = x[cu_seqlens[:-1].long()]
        x, y = self.mlp_norm.after(x, attended)
        return x, self.mlp(y), maps


class ModernBertModel(PreTrainedModel):
    """The encoder without a head: token ids in, hidden states out.

    Args:
        config: sizes and switches.
        attention: the attention backend, "auto" or one of `modernbert.kernels.BACKENDS`.
    """

    def __init__(self, config: ModernBertConfig, *, attention: str = "auto"):
        super().__init__(config, attention=attention)
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.final_norm = norm(config)
        length = config.max_position_embeddings
        self.rotary = {
            FULL: RotaryTable(config.global_rope_theta, config.head_dim, length),
            SLIDING: RotaryTable(config.local_rope_theta, config.head_dim, length),
        }
        self.gradient_checkpointing = False
        self.optimized = False  # by `optimize`
        self.initialize()

    def reset_parameters(self) -> None:
        """Truncated normals, output-side projections scaled by 1 / sqrt(2 layers)."""
        config = self.config
        std = config.initializer_range
        out = std / (2 * config.num_hidden_layers) ** 0.5
        trunc_normal(self.embeddings.tok_embeddings, std, config)
        for layer in self.layers:
            assert isinstance(layer, Layer)
            trunc_normal(layer.attn.Wqkv, std, config)
            trunc_normal(layer.attn.Wo, out, config)
            trunc_normal(layer.mlp.Wi, std, config)
            trunc_normal(layer.mlp.Wo, out, config)

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding table, (vocab_size, D)."""
        return self.embeddings.tok_embeddings

    def set_input_embeddings(self, table: nn.Embedding) -> None:
        """Replace the token embedding table."""
        self.embeddings.tok_embeddings = table

    def optimize(self, *, linears: str = "auto", fp16_accumulate: bool = False) -> Self:
        """Prepare the layers for inference, in place and for good; the model itself.

        On NVIDIA GPUs from sm_80 on, in float16 and bfloat16, each block becomes five kernels: norm
        weights are folded into the linear layer that follows, and LayerNorm, GeGLU and the residual
        become parts of linear layers of ours. Results differ by rounding. Elsewhere the layers stay
        as they are, and the log says why.

        On a CPU with glibc this process keeps up to 512 MiB of freed memory from then on: long
        batches spend less time on page faults.

        An optimized model stays on its device and in its dtype, has no gradients and cannot be
        saved: save it before.

        Args:
            linears: "auto" measures, for three numbers of tokens, which linear layers are faster
                fused than by cuBLAS with passes around it; some seconds, more when kernels compile
                for the first time. "fused" takes all without a measurement, the same ones each
                time.
            fp16_accumulate: fused layers add up 32 or 64 products at a time in float16, which
                GeForce cards do at twice the speed; float16 models only. Sums beyond 65504
                overflow.

        Raises `ValueError` in training mode, when called twice, and where "fused" cannot run.
        """
        from modernbert.optimized import optimize

        optimize(self, linears, fp16_accumulate)
        return self

    def train(self, mode: bool = True) -> Self:
        """As any module's; `RuntimeError` for an optimized model, whose weights are folded."""
        if mode and self.optimized:
            raise RuntimeError("an optimized model cannot be trained: load it anew")
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `.to()`, `.half()` and their like call."""
        if self.optimized:
            old = next(self.parameters()).new_empty(0)
            new = fn(old)
            if (new.device, new.dtype) != (old.device, old.dtype):
                raise RuntimeError(
                    f"an optimized model stays on {old.device} in {old.dtype}: move it before "
                    "optimize()"
                )
        return super()._apply(fn, recurse)

    def _too_long(self, batch: PackedBatch) -> bool:
        """Whether pieces are faster: on a CPU what a layer makes of them stays in the cache."""
        if batch.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        if batch.lengths is None or len(batch) < 2:  # a captured graph's, or nothing to cut
            return False
        return batch.num_tokens > kernels.CPU_TOKENS

    def forward(
        self,
        input_ids: Tensor | PackedBatch | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        *,
        query_only: Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        first_only: bool = False,
    ) -> ModernBertOutput:
        """Encode a padded batch, or one that is already packed.

        Without gradients a CPU takes a long batch in pieces: whole texts of about 2,048 tokens.

        Args:
            input_ids: (B, L) token ids, or a `PackedBatch`; then the other tensors must be None.
            attention_mask: (B, L), 1 at tokens and 0 at padding, on the left or on the right.
            position_ids: (B, L) or (1, L); by default each sequence counts from 0.
            inputs_embeds: (B, L, D) rows of the token embedding table, instead of ids.
            query_only: (B, L) bool, tokens that attend but are attended to by none.
            output_hidden_states: return the output of every layer.
            output_attentions: return the attention weights; needs `attention="reference"`.
            first_only: last_hidden_state is that of each sequence's first token, (B, D); the last
                layer computes no other. Not together with hidden states or attentions.

        Raises `ValueError` for a mask with holes, ids outside the vocabulary, wrong shapes.
        """
        given = (attention_mask, position_ids, inputs_embeds, query_only)
        batch = as_packed(input_ids, *given, config=self.config)
        if output_attentions and self.attention != "reference":
            raise ValueError(
                "attention weights exist in the reference backend only: load the model with "
                f'attention="reference" (this one has {self.attention!r})'
            )
        if first_only and (output_hidden_states or output_attentions or 0 in batch.lengths):
            raise ValueError(
                "first_only gives one state per sequence: no hidden states, no attentions, and no "
                "empty sequence"
            )
        if self._too_long(batch) and not (output_hidden_states or output_attentions):
            pieces = batch.pieces(kernels.CPU_TOKENS)
            states = [self.forward(x, first_only=first_only).last_hidden_state for x in pieces]
            output = ModernBertOutput(torch.cat(states))
            whole = first_only or isinstance(input_ids, PackedBatch)
            return output if whole else unpack_output(batch, output)
        x = self.embeddings(batch)
        kinds = set(self.config.layer_types)
        plan = kernels.plan_attention(
            batch.cu_seqlens,
            x.shape[0],
            None if torch.compiler.is_compiling() else batch.lengths,
            window=self.config.sliding_window if SLIDING in kinds else None,
            query_only=batch.query_only,
            dtype=compute_dtype(x),
            backend=self.attention,
            head_size=self.config.head_dim,
            dropout=self.config.attention_dropout if self.training else 0.0,
            deterministic=self.config.deterministic_flash_attn,
        )
        rotations = {kind: self.rotary[kind](batch.positions, batch.max_position) for kind in kinds}
        states, maps = [x], []
        delta = None
        last = len(self.layers) - 1
        for i, (layer, kind) in enumerate(zip(self.layers, self.config.layer_types, strict=True)):
            firsts = batch.cu_seqlens if first_only and i == last else None
            if self.gradient_checkpointing and self.training:
                x = x if delta is None else x + delta  # one tensor to keep, not two
                x, delta, weights = checkpoint(
                    layer, x, None, rotations[kind], plan, firsts, use_reentrant=False
                )
            else:
                x, delta, weights = layer(x, delta, rotations[kind], plan, firsts)
            if output_hidden_states:
                states.append(x if delta is None else x + delta)
            if output_attentions:
                maps.append(weights)
        x = self.final_norm(x) if delta is None else self.final_norm.after(x, delta)[1]
        states[-1] = x
        output = ModernBertOutput(
            x,
            tuple(states) if output_hidden_states else None,
            tuple(maps) if output_attentions else None,
        )
        if first_only or isinstance(input_ids, PackedBatch):
            return output
        return unpack_output(batch, output)


def as_packed(
    input_ids: Tensor | PackedBatch | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    query_only: Tensor | None,
    *,
    config: ModernBertConfig,
) -> PackedBatch:
    """The packed form of whatever a model was called with; ids and sizes are checked."""
    if isinstance(input_ids, PackedBatch):
        others = (attention_mask, position_ids, inputs_embeds, query_only)
        if any(x is not None for x in others):
            raise ValueError("a PackedBatch carries everything itself: pass it alone")
        batch = input_ids
    else:
        batch = pack_padded(
            input_ids, attention_mask, position_ids, inputs_embeds, query_only=query_only
        )
    looks = batch.device.type == "cpu" and not torch.compiler.is_compiling()
    if looks and batch.input_ids is not None and batch.input_ids.numel():
        # A GPU reports bad ids itself, and asking it would make it wait.
        low, high = (int(i) for i in batch.input_ids.aminmax())
        if low < 0 or high >= config.vocab_size:
            raise ValueError(
                f"input_ids reach from {low} to {high}, the vocabulary from 0 to "
                f"{config.vocab_size - 1}: were they made by another model's tokenizer?"
            )
    if batch.inputs_embeds is not None and batch.inputs_embeds.shape[-1] != config.hidden_size:
        raise ValueError(
            f"inputs_embeds have {batch.inputs_embeds.shape[-1]} features, "
            f"the model {config.hidden_size}"
        )
    return batch


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which linear layers will answer for x: autocast's, where it is on."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def unpack_output(batch: PackedBatch, output: ModernBertOutput) -> ModernBertOutput:
    """The padded form (B, L, ...) of a packed output."""
    states, maps = output.hidden_states, output.attentions
    assert batch.padded_shape is not None
    return ModernBertOutput(
        batch.unpack(output.last_hidden_state),
        None if states is None else tuple(batch.unpack(x) for x in states),
        None if maps is None else tuple(_unpack_map(batch, weights) for weights in maps),
    )


def _unpack_map(batch: PackedBatch, weights: list[Tensor]) -> Tensor:
    """Attention weights (H, length, length) per sequence to (B, H, L, L), zeros at pads."""
    assert batch.padded_shape is not None
    rows, columns = batch.padded_shape
    heads = weights[0].shape[0] if weights else 0
    padded = torch.zeros(rows, heads, columns, columns, device=batch.device)
    ones = torch.ones(batch.num_tokens, dtype=torch.bool, device=batch.device)
    present = batch.unpack(ones.float()).bool()
    for row, single in enumerate(weights):
        both = present[row, :, None] & present[row]
        padded = padded.to(single.dtype)
        padded[row, :, both] = single.flatten(1)
    return padded
