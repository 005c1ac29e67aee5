"""How far the confidences of evaluated rounds can be trusted, before and after calibration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dspark.errors import DataError
from dspark.evaluation.records import Drafted, Record
from dspark.request import Verifier
from dspark.scheduling.calibration import FloatArray, Rounds, TemperatureScaling, assess, fit
from dspark.scheduling.reliability import Reliability


def confidence_rounds(
    records: Sequence[Record], num_drafts: int, verifier: Verifier
) -> Rounds | None:
    """Rounds with a confidence for each draft of a whole block; None where there is none.

    A round that its answer's end cut is observed up to there, and under the block rule, whose
    decisions hang together, not at all.
    """
    logits, accepted, verified = list[tuple[float, ...]](), list[int](), list[int]()
    for turn in (turn for record in records for turn in record.turns):
        room = turn.room - 1
        for n, kept in enumerate(turn.kept):
            ends = turn.cut and n == len(turn.kept) - 1
            row = turn.logits[n] if turn.logits is not None else ()
            if room > num_drafts and len(row) == num_drafts and not (ends and verifier == "block"):
                logits.append(row)
                accepted.append(kept)
                verified.append(kept if ends else turn.verified[n])
            room -= kept + 1
    return Rounds.of(logits, accepted, verified) if logits else None


def calibration_figures(
    records: Sequence[Record], drafter: Drafted, verifier: Verifier
) -> dict[str, Any] | None:
    """Calibration errors per position; None where the drafter has no confidences of its own.

    `after` is by the drafter's own calibration where it has one for the setting. Else temperatures
    are fitted here, as the paper does, each half of the prompts judged by what the other half gave;
    where there are too few rounds for that, `after` is None.
    """
    if not drafter.block_size:
        return None
    rounds = confidence_rounds(records, drafter.block_size, verifier)
    if rounds is None:
        return None
    before = assess(rounds, verifier)
    after, by = _after(records, drafter, verifier, rounds)
    served = after if by == "stored" and after is not None else before
    return {
        **_means(served),
        "calibration": {
            "before": _positions(before),
            "after": None if after is None else _positions(after),
            "after_by": by,
            "rounds": len(rounds.accepted_N),
            "mean_before": _means(before),
            "mean_after": None if after is None else _means(after),
        },
    }


def _after(
    records: Sequence[Record], drafter: Drafted, verifier: Verifier, rounds: Rounds
) -> tuple[tuple[Reliability, ...] | None, str | None]:
    if drafter.temperatures is not None:
        stored = TemperatureScaling(drafter.temperatures, drafter.shifts)
        return assess(rounds, verifier, stored), "stored"
    halves = [
        confidence_rounds(records[begin::2], drafter.block_size, verifier) for begin in (0, 1)
    ]
    first, second = halves
    if first is None or second is None:
        return None, None
    try:
        scalings = [fit(half, verifier, shifts=False) for half in (second, first)]
    except DataError:  # too few rounds
        return None, None
    judged = [
        Rounds(_scaled(half, scaling), half.accepted_N, half.verified_N)
        for half, scaling in zip((first, second), scalings, strict=True)
    ]
    both = Rounds(
        np.concatenate([half.logits_NK for half in judged]),
        np.concatenate([half.accepted_N for half in judged]),
        np.concatenate([half.verified_N for half in judged]),
    )
    return assess(both, verifier), "cross-fitted"


def _scaled(rounds: Rounds, scaling: TemperatureScaling) -> FloatArray:
    """Logits that are what the temperatures make of them."""
    values: FloatArray = rounds.logits_NK / np.array(scaling.temperatures)
    return values


def _positions(found: Sequence[Reliability]) -> dict[str, list[Any]]:
    names = ("count", "ece", "auc", "brier", "bin_counts", "bin_predicted", "bin_observed")
    return {name: [getattr(each, name) for each in found] for name in names}


def _means(found: Sequence[Reliability]) -> dict[str, float | None]:
    """Means over positions, each with the weight of its rounds."""
    means: dict[str, float | None] = {}
    for name in ("ece", "auc", "brier"):
        known = [(each.count, getattr(each, name)) for each in found]
        known = [(n, value) for n, value in known if n and value is not None]
        total = sum(n for n, _ in known)
        means[name] = sum(n * value for n, value in known) / total if total else None
    return means
