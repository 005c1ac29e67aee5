"""Plain decoding beside speculative decoding: how much faster, and is it the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dspark.attention.layout import RaggedBatch
from dspark.cli.decoding import Decoded, run_report
from dspark.request import Output, Request
from dspark.targets.target import Target

NEAR_TIE = 1e-5
"""Below this top-2 logit gap, float32 rounding may decide (docs: losslessness, numerics)."""


@dataclass(frozen=True)
class Difference:
    """Where an output first departs from plain decoding's.

    Attributes:
        request: index of the request.
        position: index of the first generated token that differs.
        top2_gap: gap of the target's two largest logits there.
    """

    request: int
    position: int
    top2_gap: float

    @property
    def is_near_tie(self) -> bool:
        """Whether rounding may have decided."""
        return self.top2_gap < NEAR_TIE

    def sentence(self, dtype: torch.dtype, *, batch_invariant: bool = False) -> str:
        """What a user should know about it; in batch-invariant mode rounding is no excuse."""
        where = f"Output {self.request + 1} differs from token {self.position + 1} on, where the "
        gap = f"target's two best logits are {self.top2_gap:.1e} apart: "
        if batch_invariant:
            return where + gap + "not to be in batch-invariant mode; please report this."
        if self.is_near_tie:
            return where + gap + "a tie that rounding decides."
        if dtype in (torch.bfloat16, torch.float16):
            return where + gap + f"rounding of {str(dtype).removeprefix('torch.')}."
        return where + gap + "no tie; please report this."


def comparable(temperature: float, verifier: str) -> bool:
    """Whether both ways must give the same tokens, and not only the same law."""
    return temperature == 0 or verifier == "coupled"


def compare_report(
    runs: Sequence[Decoded], plain: Sequence[Decoded], *, comparable: bool
) -> dict[str, Any]:
    """The JSON keys of speculative runs, with those that set them beside plain ones."""
    report = run_report(runs)
    plain_tokens = sum(run.generated_tokens for run in plain)
    report["plain_tokens_per_s"] = plain_tokens / sum(run.seconds for run in plain)
    report["speedup"] = report["tokens_per_s"] / report["plain_tokens_per_s"]
    same = all(
        ours.token_ids == theirs.token_ids
        for run, other in zip(runs, plain, strict=True)
        for ours, theirs in zip(run.outputs, other.outputs, strict=True)
    )
    report["identical"] = same if comparable else None
    return report


def differences(
    target: Target,
    requests: Sequence[Request],
    outputs: Sequence[Output],
    plain: Sequence[Output],
) -> list[Difference]:
    """Find where greedy outputs depart from plain ones."""
    found = []
    for i, (request, ours, theirs) in enumerate(zip(requests, outputs, plain, strict=True)):
        if ours.token_ids == theirs.token_ids:
            continue
        pairs = enumerate(zip(ours.token_ids, theirs.token_ids, strict=False))
        shorter = min(len(ours.token_ids), len(theirs.token_ids))
        position = next((at for at, (a, b) in pairs if a != b), shorter)
        context = [*request.prompt_ids, *theirs.token_ids[:position]]
        found.append(Difference(i, position, _top2_gap(target, context)))
    return found


@torch.inference_mode()
def _top2_gap(target: Target, token_ids: Sequence[int]) -> float:
    batch = RaggedBatch.fresh([token_ids], target.device)
    last = torch.tensor([len(token_ids) - 1], device=target.device)
    logits_NV = target.forward(batch, logit_rows=last).logits_NV
    assert logits_NV is not None
    best, second = logits_NV[0].topk(2).values.tolist()
    return float(best - second)
