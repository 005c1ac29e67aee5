"""Snapshot: an engine's queue, cache and last round, as immutable numbers."""

from __future__ import annotations

from dataclasses import dataclass

from dspark.engine.engine import Engine
from dspark.engine.speculation.round_record import RoundRecord
from dspark.scheduling.cost_table import CostPoint


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
