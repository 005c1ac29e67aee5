"""Calibration rounds to fit on, and calibration errors of evaluated rounds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dspark.engine.engine import Engine
from dspark.engine.model import Model
from dspark.engine.speculation.round_record import FloatArray, RoundRecord
from dspark.engine.speculation.trees.growth import ChildRates, Tree
from dspark.errors import CompatibilityError, DataError
from dspark.evaluation.records import Drafted, Record
from dspark.request import Request, Verifier
from dspark.scheduling.calibration import Rounds, TemperatureScaling, assess, fit
from dspark.scheduling.reliability import Reliability

Progress = Callable[[int], None]
"""(rounds recorded)"""


@dataclass
class Recorder:
    """Records confidences and outcomes of rounds in which a full block was verified.

    Attributes:
        num_drafts: K; shorter blocks, at the end of a request, are skipped.
        logits: K confidence logits per round and request.
        accepted: accepted drafts per round and request.
    """

    num_drafts: int
    logits: list[FloatArray] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    def __call__(self, record: RoundRecord) -> None:
        """Record a round."""
        if record.confidence_logits_RK is None:
            return
        if record.are_margins:
            raise CompatibilityError(
                "This drafter has no confidences of its own; the engine learns them from its "
                "margins while it runs, so there is nothing to calibrate."
            )
        rows = zip(record.confidence_logits_RK, record.lengths, record.accepted, strict=True)
        for logits_K, length, accepted in rows:
            if length == self.num_drafts:
                self.logits.append(logits_K)
                self.accepted.append(accepted)

    def rounds(self) -> Rounds:
        """The recorded rounds."""
        count = len(self.accepted)
        logits_NK = np.array(self.logits).reshape(count, self.num_drafts)
        return Rounds.of(logits_NK, self.accepted, np.full(count, self.num_drafts))


def record_rounds(
    model: Model,
    requests: Sequence[Request],
    *,
    verifier: Verifier = "block",
    block_size: int | None = None,
    batch_size: int = 16,
    most: int | None = None,
    seconds: float | None = None,
    progress: Progress | None = None,
) -> Rounds:
    """Decode requests with the schedule `fixed` and record every full block.

    Args:
        model: with a drafter.
        requests: to decode.
        verifier: whose outcomes are recorded.
        block_size: K, the drafter's own by default.
        batch_size: requests at once.
        most: stop after this many rounds; None decodes everything.
        seconds: stop after this time; None for no limit.
        progress: called after every step.

    Raises:
        CompatibilityError: there is no drafter, or it gives margins instead of confidences.
        DataError: no full block was verified.
    """
    if model.drafter is None:
        raise CompatibilityError("There is no drafter to calibrate; give one with --draft.")
    recorder = Recorder(block_size or model.drafter.block_size)
    engine = model.engine(
        requests,
        batch_size=batch_size,
        verifier=verifier,
        schedule="fixed",
        block_size=block_size,
        watch=recorder,
        strict=True,
    )
    _play(engine, requests, recorder.accepted, most, seconds, progress)
    if not recorder.accepted:
        raise DataError(
            "Not one full block was verified; give more prompts, or a larger --max-new-tokens."
        )
    return recorder.rounds()


def record_child_rates(
    model: Model,
    requests: Sequence[Request],
    nodes: int,
    *,
    verifier: Verifier = "block",
    block_size: int | None = None,
    batch_size: int = 16,
    most: int | None = None,
    progress: Progress | None = None,
) -> tuple[float, ...]:
    """How often second, third, ... children of draft trees stay where those before them do not.

    Args:
        model: with a drafter.
        requests: to decode with trees, sampled ones.
        nodes: of a tree.
        verifier: of the engine, not `coupled`.
        block_size: depth of a tree, the drafter's own by default.
        batch_size: requests at once.
        most: stop after this many trees; None decodes everything.
        progress: called after every step.

    Raises:
        UsageError, CompatibilityError: the drafter cannot draft trees.
    """
    rates, seen = ChildRates(), list[int]()

    def watch(record: RoundRecord) -> None:
        trees = zip(record.drafts, record.parents or (), record.paths or (), strict=False)
        for drafts, parents, path in trees:
            if drafts:
                rates.learn(Tree(drafts, parents), path)
                seen.append(len(drafts))

    engine = model.engine(
        requests,
        batch_size=batch_size,
        verifier=verifier,
        schedule="fixed",
        block_size=block_size,
        tree_nodes=nodes,
        watch=watch,
        strict=True,
    )
    _play(engine, requests, seen, most, None, progress)
    return tuple(rates.values)


def _play(
    engine: Engine,
    requests: Sequence[Request],
    seen: Sized,
    most: int | None,
    seconds: float | None,
    progress: Progress | None,
) -> None:
    """Decode requests until all end, or enough was seen, or the time is over."""
    for request in requests:
        engine.add(request)
    started = time.perf_counter()
    while engine.has_work and (most is None or len(seen) < most):
        engine.step()
        if seconds is not None and time.perf_counter() - started > seconds:
            break
        if progress is not None:
            progress(len(seen))


def confidence_rounds(
    records: Sequence[Record], num_drafts: int, verifier: Verifier
) -> Rounds | None:
    """Rounds with a confidence for each draft of a whole block; None if there are none.

    A round truncated by the end of its answer is observed up to there, and not at all under the
    block rule, whose decisions depend on each other.
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
    """Calibration errors per position; None if the drafter has no confidences of its own.

    `after` uses the drafter's own calibration if it has one for the setting. Otherwise temperatures
    are fitted as in the paper, each half of the prompts assessed with those of the other half; with
    too few rounds for that, `after` is None.
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
    """Logits divided by the temperatures."""
    values: FloatArray = rounds.logits_NK / np.array(scaling.temperatures)
    return values


def _positions(found: Sequence[Reliability]) -> dict[str, list[Any]]:
    names = ("count", "ece", "auc", "brier", "bin_counts", "bin_predicted", "bin_observed")
    return {name: [getattr(each, name) for each in found] for name in names}


def _means(found: Sequence[Reliability]) -> dict[str, float | None]:
    """Means over positions, weighted by their rounds."""
    means: dict[str, float | None] = {}
    for name in ("ece", "auc", "brier"):
        known = [(each.count, getattr(each, name)) for each in found]
        known = [(n, value) for n, value in known if n and value is not None]
        total = sum(n for n, _ in known)
        means[name] = sum(n * value for n, value in known) / total if total else None
    return means
