"""Rounds to calibrate a drafter on: full blocks, recorded as the engine plays them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from dspark.engine.model import Model
from dspark.engine.record import FloatArray, RoundRecord
from dspark.errors import CompatibilityError, DataError
from dspark.request import Request, Verifier
from dspark.scheduling.calibration import Rounds

Progress = Callable[[int], None]
"""(rounds recorded)"""


@dataclass
class Recorder:
    """Keeps confidences and outcomes of rounds in which every draft of a full block was verified.

    Attributes:
        num_drafts: K; shorter blocks, at the end of a request, are left out.
        logits: per round and request, K confidence logits.
        accepted: per round and request, drafts kept.
    """

    num_drafts: int
    logits: list[FloatArray] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    def __call__(self, record: RoundRecord) -> None:
        """Take note of a round."""
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
        """What was kept."""
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
        requests: what to decode.
        verifier: whose outcomes are wanted.
        block_size: K, the drafter's own by default.
        batch_size: requests at once.
        most: stop once so many rounds are recorded; None decodes everything.
        seconds: stop after so long; None takes whatever it takes.
        progress: told after every step.

    Raises:
        CompatibilityError: there is no drafter, or it gives margins in place of confidences.
        DataError: no full block came about.
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
    for request in requests:
        engine.add(request)
    started = time.perf_counter()
    while engine.has_work and (most is None or len(recorder.accepted) < most):
        engine.step()
        if seconds is not None and time.perf_counter() - started > seconds:
            break
        if progress is not None:
            progress(len(recorder.accepted))
    if not recorder.accepted:
        raise DataError(
            "Not one full block was verified; give more prompts, or a larger --max-new-tokens."
        )
    return recorder.rounds()


def halves(rounds: Rounds) -> tuple[Rounds, Rounds]:
    """Two halves in the order of recording: one to fit on, one held out."""
    middle = len(rounds.accepted_N) // 2
    first, second = (
        Rounds(rounds.logits_NK[part], rounds.accepted_N[part], rounds.verified_N[part])
        for part in (slice(middle), slice(middle, None))
    )
    return first, second
