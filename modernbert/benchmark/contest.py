"""Who takes part: peers prepared, warmed up, checked against ours, and given their best batch."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .batches import PaddedBatch, Split, make_batches, pad
from .catalogue import OURS, make_peer
from .measure import Contestant, describe, timed
from .peers import Peer, Setting, prepare
from .workloads import Workload, variable

AGREES = 0.99  # smallest cosine to ours of any token; bfloat16 through 28 layers keeps more
# Ragged as workloads are, and full ones of one text and of more: each may compile anew.
WARM_UP = ((200, 33, 150), (130,), (96, 96))


@dataclass
class Prepared:
    """A peer that can run here; `best` is the split that suits it, None when it packs."""

    key: str
    peer: Peer
    best: Split | None = None


@dataclass
class Contest:
    """Ours, the others that can run, and the state of every peer that was asked for."""

    setting: Setting
    given: Split
    ours: Peer
    others: list[Prepared]
    states: list[dict[str, Any]]

    def splits(self, prepared: Prepared, workload: Workload) -> list[Split]:
        """The batches as given, and the peer's best where these are others.

        Texts of one length are never given badly: the peer's best is all that is measured.
        """
        if prepared.best is None:
            return [self.given]
        if workload.kind == "fixed":
            return [prepared.best]
        lengths = workload.lengths
        same = prepared.best.batches(lengths) == self.given.batches(lengths)
        return [self.given] if same else [self.given, prepared.best]

    def contestant(self, peer: Peer, workload: Workload, split: Split) -> Contestant:
        """`peer` with the padded batches of `workload` on the device."""
        batches = make_batches(workload.sequences(), split, self.setting.device)

        def run() -> None:
            for batch in batches:
                peer.forward(batch)

        way = "packed" if peer.packs else "sorted" if split.by_length else "as given"
        return Contestant(f"{peer.name}, {split}", run, way)


def prepare_all(
    setting: Setting,
    keys: Sequence[str],
    batch_tokens: int,
    say: Callable[[str], None],
    *,
    deadline: float = float("inf"),
) -> Contest:
    """Prepare ours and the peers named by `keys`; one that fails is reported, not raised.

    After `deadline`, by `time.perf_counter`, no other is begun.
    """
    ours = make_peer(OURS)
    prepare(ours, setting)
    warm = [_random_batch(lengths, setting.device) for lengths in WARM_UP]
    with torch.inference_mode():
        expected = [ours.forward(batch) for batch in warm]
    contest = Contest(setting, Split(batch_tokens, by_length=False), ours, [], [])
    contest.states.append(_state(ours, "measured", "", 1.0))
    for key in keys:
        peer = make_peer(key)
        begun = time.perf_counter()
        reason = peer.missing(setting)
        if begun > deadline:
            reason = "not prepared: preparing the others took too long"
        state = _state(peer, "absent", reason) if reason else _try(peer, setting, warm, expected)
        state["prepare_seconds"] = round(time.perf_counter() - begun, 1)
        if state["state"] == "measured":
            prepared = Prepared(key, peer)
            if not peer.packs:
                prepared.best = _best_split(contest, peer)
                state["best_split"] = str(prepared.best)
            contest.others.append(prepared)
        contest.states.append(state)
        say(f"  {peer.name}: {state['state']}{', ' if state['reason'] else ''}{state['reason']}")
    return contest


def _try(
    peer: Peer, setting: Setting, warm: Sequence[PaddedBatch], expected: Sequence[Tensor]
) -> dict[str, Any]:
    try:
        prepare(peer, setting)
        with torch.inference_mode():
            got = [peer.forward(batch) for batch in warm]
    except Exception as error:  # a foreign library's failure is a result of its own
        return _state(peer, "failed", describe(error))
    if not peer.modernbert:
        return _state(peer, "measured", peer.remark)
    cosine = min(map(_smallest_cosine, got, expected, warm))
    if not cosine >= AGREES:  # NaN too
        return _state(peer, "failed", f"its output is not ours: cosine {cosine:.4f}", cosine)
    return _state(peer, "measured", peer.remark, cosine)


def _state(peer: Peer, state: str, reason: str, agreement: float | None = None) -> dict[str, Any]:
    if agreement is not None and agreement != agreement:
        agreement = None  # JSON has no NaN
    return {"name": peer.name, "state": state, "reason": reason, "agreement": agreement}


def _smallest_cosine(got: Tensor, expected: Tensor, batch: PaddedBatch) -> float:
    """Over the tokens of one batch; NaN when a token has one."""
    tokens = batch.attention_mask.bool()
    cosines = F.cosine_similarity(got[tokens].float(), expected[tokens].float(), dim=-1)
    return float(cosines.min())


def _best_split(contest: Contest, peer: Peer) -> Split:
    """The fastest of three batch sizes on a few texts of N(256, 64), sorted by length."""
    tokens = contest.given.tokens
    sample = variable(256, 64, 512, max(tokens // 4 // 256, 1))
    seconds = {}
    with torch.inference_mode():
        for part in (4, 16, 64):
            split = Split(max(tokens // part, 1), by_length=True)
            run = contest.contestant(peer, sample, split).run
            seconds[split] = timed(run, contest.setting.device, time.perf_counter)
    return min(seconds, key=lambda split: seconds[split])


def _random_batch(lengths: Sequence[int], device: torch.device) -> PaddedBatch:
    generator = torch.Generator().manual_seed(0)
    return pad([torch.randint(100, 16_000, (n,), generator=generator) for n in lengths], device)
