"""Counters and snapshots of an engine, for metrics and the live page.

The engine's thread writes the counters (rounds, drafts, step times); a snapshot is its queue, cache
and last round as immutable numbers.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from dspark.engine.engine import Engine
from dspark.engine.speculation.round_record import RoundRecord
from dspark.scheduling.cost_table import CostPoint
from dspark.scheduling.reliability import BINS

STEP_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
"""Upper bounds of the buckets of steps."""
GAP_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75,
    1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
"""Of the times between outputs: vLLM's, and three below its first."""
HALF_LIFE = 20_000
"""After so many observed drafts an older one counts half in the running calibration error."""
Counts = npt.NDArray[np.int64]


class SecondsHistogram:
    """A histogram of seconds, written by the engine's thread at the cost of a search and two sums.

    Args:
        bounds_s: upper bounds of its buckets, rising; one more holds what is above.

    Attributes:
        counts: of the buckets.
        total_s: sum of all.
    """

    def __init__(self, bounds_s: Sequence[float]) -> None:
        self.bounds_s = tuple(bounds_s)
        self.counts = [0] * (len(self.bounds_s) + 1)
        self.total_s = 0.0

    def add(self, seconds: float) -> None:
        """Count one."""
        self.counts[bisect.bisect_left(self.bounds_s, seconds)] += 1
        self.total_s += seconds


@dataclass
class RunningCalibrationError:
    """A running calibration error: predicted survivals against what came of the drafts.

    Equal-width bins as in `scheduling.reliability`, whose contents fade as new drafts come.

    Attributes:
        observed: drafts seen in all.
    """

    observed: int = 0
    _sums: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros((3, BINS)))

    def add(self, predicted_N: npt.NDArray[np.float64], stayed_N: npt.NDArray[np.bool_]) -> None:
        """Take note of drafts whose outcome is known."""
        bins_N = np.minimum((predicted_N * BINS).astype(np.int64), BINS - 1)
        self._sums *= 0.5 ** (len(bins_N) / HALF_LIFE)
        for row, weights_N in enumerate((np.ones(len(bins_N)), predicted_N, stayed_N)):
            self._sums[row] += np.bincount(bins_N, weights_N, BINS)
        self.observed += len(bins_N)

    @property
    def error(self) -> float:
        """The expected calibration error of late; 0 before anything was seen."""
        counts, predicted, stayed = self._sums
        total = counts.sum()
        return float(np.abs(predicted - stayed).sum() / total) if total > 0 else 0.0


class Counters:
    """What rounds and steps added up to.

    Args:
        num_drafts: drafts per round at most, K.
        whole_blocks: whether only blocks that were verified whole tell of calibration, as under
            the verifier `block`, whose rule looks ahead.

    Attributes:
        rounds: rounds of single answers in which drafts were verified.
        drafted_K, verified_K, accepted_K: drafts by position.
        steps: steps of the engine.
        step_times: how long they took.
        gaps: times between an answer's outputs: of each step that brought it tokens, after its
            first, how long after the one before it ended. However many tokens a step brings, they
            come at once and are one output.
        draft_ms, schedule_ms, verify_ms: milliseconds of the parts of rounds with a drafter.
        drift: of the drafter's calibrated confidences, where they were computed.
    """

    def __init__(self, num_drafts: int, *, whole_blocks: bool) -> None:
        self._whole_blocks = whole_blocks
        self.rounds = 0
        self.drafted_K: Counts = np.zeros(num_drafts, dtype=np.int64)
        self.verified_K: Counts = np.zeros(num_drafts, dtype=np.int64)
        self.accepted_K: Counts = np.zeros(num_drafts, dtype=np.int64)
        self.steps = 0
        self.step_times = SecondsHistogram(STEP_S)
        self.gaps = SecondsHistogram(GAP_S)
        self.draft_ms = self.schedule_ms = self.verify_ms = 0.0
        self.drift = RunningCalibrationError()

    def add_step(self, step_ms: float, record: RoundRecord | None) -> None:
        """Count a step, and the round in it where a drafter took part."""
        self.steps += 1
        self.step_times.add(step_ms / 1e3)
        if record is None:
            return
        self.draft_ms += record.draft_ms
        self.schedule_ms += record.schedule_ms
        self.verify_ms += record.verify_ms
        drafted_R = np.array([len(drafts) for drafts in record.drafts])
        if not drafted_R.any():
            return
        lengths_R, accepted_R = np.array(record.lengths), np.array(record.accepted)
        self.rounds += int((lengths_R > 0).sum())
        positions_K = np.arange(len(self.drafted_K))
        for counts_K, reached_R in (
            (self.drafted_K, drafted_R),
            (self.verified_K, lengths_R),
            (self.accepted_K, accepted_R),
        ):
            np.add(counts_K, (reached_R[:, None] > positions_K).sum(axis=0), out=counts_K)
        self._observe(record, drafted_R, lengths_R)

    def _observe(self, record: RoundRecord, drafted_R: Counts, lengths_R: Counts) -> None:
        """Hold predicted survivals against outcomes; a draft that was not sent has none."""
        survival_DK = record.survival_RK
        if survival_DK is None:
            return
        count, width = survival_DK.shape
        known_D = lengths_R[:count]
        if self._whole_blocks and record.parents is None:
            known_D = np.where(known_D == drafted_R[:count], known_D, 0)
        known_DK = np.arange(width) < known_D[:, None]
        if known_DK.any():
            stayed_DK = np.zeros(survival_DK.shape, dtype=bool)
            for row in range(count):
                stayed_DK[row, list(record.stayed(row))] = True
            self.drift.add(survival_DK[known_DK], stayed_DK[known_DK])


@dataclass
class Totals:
    """What the tallies of engines that come and go add up to.

    Attributes:
        steps: steps.
        step_s: seconds of them.
        rounds: rounds of single answers in which drafts were verified.
        verified: drafts sent to the target.
        accepted: of these, those that stayed.
    """

    steps: int = 0
    step_s: float = 0.0
    rounds: int = 0
    verified: int = 0
    accepted: int = 0

    def add(self, counters: Counters) -> None:
        """Add what an engine has counted."""
        self.steps += counters.steps
        self.step_s += counters.step_times.total_s
        self.rounds += counters.rounds
        self.verified += int(counters.verified_K.sum())
        self.accepted += int(counters.accepted_K.sum())


@dataclass(frozen=True)
class Snapshot:
    """An engine after a step.

    Attributes:
        queued: requests that wait.
        running: requests that hold pages.
        max_requests: requests that run at most.
        pages_total: pages of the cache.
        pages_held: of these, those that requests hold.
        pages_kept: those that nobody holds but whose prompt prefixes can be found.
        prefix_hit_tokens: prompt tokens that were found in the cache, of all requests so far.
        preemptions: how often a request gave its pages up for another.
        steps: target forwards so far.
        budget: drafts that the last round might verify, of all requests; None where the schedule
            sets no budget, or nothing was drafted yet.
        drafted: drafts of the last round.
        verified: of these, those that were sent to the target.
        rows: rows of its target forward.
        cost_points: what steps cost on this machine, as measured; empty where nobody measured.
        draft_ms: what drafting took in the last round.
        schedule_ms: what deciding the lengths took.
        verify_ms: what target forward and verification took.
        step_ms: what the last step took in all.
    """

    queued: int
    running: int
    max_requests: int
    pages_total: int
    pages_held: int
    pages_kept: int
    prefix_hit_tokens: int
    preemptions: int
    steps: int
    budget: int | None
    drafted: int
    verified: int
    rows: int
    cost_points: tuple[CostPoint, ...]
    draft_ms: float
    schedule_ms: float
    verify_ms: float
    step_ms: float

    @classmethod
    def of(cls, engine: Engine, record: RoundRecord | None, step_ms: float) -> Snapshot:
        """Read an engine, in its own thread.

        Args:
            engine: between two steps.
            record: of its last round, if a drafter took part.
            step_ms: what the last step took.
        """
        pool, roster, clock = engine.memory.pool, engine.roster, engine.clock
        costs = engine.scheduler.costs if engine.scheduler is not None else None
        return cls(
            queued=len(roster.queue),
            running=len(roster.running),
            max_requests=engine.max_requests,
            pages_total=pool.pages,
            pages_held=pool.in_use,
            pages_kept=pool.kept,
            prefix_hit_tokens=pool.hit_tokens,
            preemptions=roster.preemptions,
            steps=clock.steps + clock.prefills,
            budget=None if record is None else record.budget,
            drafted=0 if record is None else sum(map(len, record.drafts)),
            verified=0 if record is None else sum(record.lengths),
            rows=0 if record is None else record.rows,
            cost_points=() if costs is None else tuple(costs.points),
            draft_ms=0.0 if record is None else record.draft_ms,
            schedule_ms=0.0 if record is None else record.schedule_ms,
            verify_ms=0.0 if record is None else record.verify_ms,
            step_ms=step_ms,
        )
