"""Measures whole steps under load: prompts, rounds on longer contexts, and what lies beside them.

Schedules compare steps, and correct their table by the rounds that they see. Capacity planning
adds steps up, so its table has to say what they take under load in the first place.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dspark.drafters.base import Drafter
from dspark.engine.engine import Engine
from dspark.engine.profile_loops import (
    OUTLIER,
    Loop,
    Now,
    Reading,
    Times,
    Users,
    mean_ms,
    random_request,
)
from dspark.engine.speculation.draft_scheduler import Scheduler
from dspark.engine.speculation.schedule import Schedule
from dspark.scheduling.cost_table import CostPoint, CostTable, PromptCost, StepExtra
from dspark.targets.target import Target

PROMPT_ROWS = (16, 64, 128, 256, 512)
LENGTHS = ((40, 48), (120, 24), (64, 64), (24, 32), (200, 40), (56, 56), (88, 48), (32, 72))
"""(prompt, answer) tokens of requests, where nobody says what they are like"""
_PROMPT_ROWS, _MOST_PROMPTS = 1024, 6  # read of each size, rows and steps at most
_BETWEEN = 3  # rounds between two prompts, so that each finds the caches as a server's would
# Visits of each way, in turn, so that a slow moment does not fall on one of them alone, and that so
# many requests are seen.
_VISITS, _SEEN = 3, 12


def measure_steps(
    target: Target,
    drafter: Drafter,
    costs: CostTable,
    *,
    rounds: int = 30,
    tree_nodes: int | None = None,
    lengths: Sequence[tuple[int, int]] = LENGTHS,
    now: Now = time.perf_counter,
) -> CostTable:
    """The table as steps under load have it, with prompts and whole steps.

    Users in closed loops (`profile_loops`) are answered plainly and with the drafter. Means count,
    since steps add up to means; a stall counts as twice the median. The table itself has the
    fastest visits of points on short contexts: drafting and verification are scaled to those of the
    loops, verification in a straight line between no draft and all.

    Args:
        target: the model.
        drafter: bound to it.
        costs: their table on this machine, of whole blocks of the drafter, or of trees.
        rounds: without a prompt, of each number of requests and each way of decoding, at most.
        tree_nodes: of the table's trees; None for chains.
        lengths: (prompt, answer) tokens of the users' requests in turn, as in the traffic that is
            planned for; cut to what the context holds.
        now: the clock, in seconds. That of the processor leaves other work on the machine out, and
            is right with one thread.
    """
    counts = sorted({point.requests for point in costs.points})
    whole = Scheduler(Schedule("fixed"), num_drafts=drafter.block_size)
    whole = whole if tree_nodes is None else whole.for_trees(tree_nodes)
    users = Users(target, drafter, tuple(lengths), now)
    prompts = _prompts(users)
    loads = {count: _under_load(users, whole, costs, count, rounds) for count in counts}
    return replace(
        costs,
        points=tuple(loads[point.requests].of(point) for point in costs.points),
        prompts=prompts,
        extras=tuple(load.extra(prompts, loads[counts[0]].plain) for load in loads.values()),
    )


def _prompts(users: Users) -> tuple[PromptCost, ...]:
    """Steps that read so many rows and draw first tokens, with nobody else there.

    More rows than a usual prompt has are several prompts. Sizes and engines are visited in turn, so
    that a slow moment does not fall on one of them alone.
    """
    target = users.target
    most = min(PROMPT_ROWS[-1], target.max_context // 2)
    sizes = sorted({min(rows, most) for rows in PROMPT_ROWS})
    usual = min(round(statistics.fmean(prompt for prompt, _ in users.lengths)), most)
    plain, drafting = (
        Engine(
            target,
            each,
            max_requests=-(-most // usual),
            max_length=min(usual + 64, target.max_context),
            step_tokens=most,
        )
        for each in (None, users.drafter)
    )
    spent: dict[tuple[Engine, int], list[float]] = {}
    seed = 0
    for number in range(_MOST_PROMPTS + 1):
        for rows in sizes:
            if number * rows > _PROMPT_ROWS:
                continue
            for engine in (plain, drafting):
                for start in range(0, rows, usual):
                    # None begins as another does: nothing of it is found in the prefix cache.
                    engine.add(
                        random_request(target, min(usual, rows - start), 64, seed := seed + 1)
                    )
                started = users.now()
                engine.step()
                if number:  # the first visit warms up
                    spent.setdefault((engine, rows), []).append(1e3 * (users.now() - started))
                for _ in range(_BETWEEN):
                    engine.step()
                for request in engine.roster.everyone:
                    engine.cancel(request.request_id)
    return tuple(
        PromptCost(rows, mean_ms(spent[drafting, rows]), mean_ms(spent[plain, rows]))
        for rows in sizes
    )


@dataclass(frozen=True)
class _Load:
    """What steps of so many requests take under load.

    Attributes:
        requests: R.
        drafts: K.
        plain, whole: the mean step without a drafter, and with whole blocks.
        schedule_ms: what `lagged` adds to the latter.
        read_plain, read_whole: steps of both kinds that read prompts.
        draft: factor of the table's drafting time.
        first, last: factors of its verification without drafts and with all of them.
    """

    requests: int
    drafts: int
    plain: Times
    whole: Times
    schedule_ms: float
    read_plain: Sequence[Reading]
    read_whole: Sequence[Reading]
    draft: float
    first: float
    last: float

    def of(self, point: CostPoint) -> CostPoint:
        """A point of the table as it is under load."""
        way = (point.tokens - point.requests) / (point.requests * self.drafts)
        factor = self.first + (self.last - self.first) * min(way, 1.0)
        return replace(
            point, verify_ms=factor * point.verify_ms, draft_ms=self.draft * point.draft_ms
        )

    def extra(self, prompts: Sequence[PromptCost], single: Times) -> StepExtra:
        """What lies beside rounds.

        Args:
            prompts: that are read alone.
            single: the mean plain step of one request.
        """
        rows = [prompt.rows for prompt in prompts]
        whole_ms, plain_ms = (
            _beside_ms(steps, ms, rows, [max(each - single.whole_ms, 0.0) for each in alone])
            for steps, ms, alone in (
                (self.read_whole, self.whole.whole_ms, [prompt.ms for prompt in prompts]),
                (self.read_plain, self.plain.whole_ms, [prompt.plain_ms for prompt in prompts]),
            )
        )
        return StepExtra(
            self.requests,
            self.plain.whole_ms,
            self.whole.rest_ms,
            self.schedule_ms,
            whole_ms,
            plain_ms,
        )


def _beside_ms(
    steps: Sequence[Reading], step_ms: float, rows: Sequence[int], alone_ms: Sequence[float]
) -> float:
    """What a step that reads prompts takes beyond one that reads none, and these prompts alone."""
    more = []
    for count, spent_ms in steps:
        expected_ms = step_ms + float(np.interp(count, rows, alone_ms))
        more.append(min(spent_ms, OUTLIER * expected_ms) - expected_ms)
    return max(statistics.fmean(more), 0.0) if more else 0.0


def _under_load(users: Users, whole: Scheduler, costs: CostTable, count: int, rounds: int) -> _Load:
    drafts, block_size = whole.num_drafts, users.drafter.block_size
    # No confidence reaches 1: blocks are drafted, and nothing of them is verified.
    threshold, weighing = (
        Scheduler(schedule, num_drafts=block_size, costs=costs)
        for schedule in (Schedule("threshold", 1.0), Schedule("lagged"))
    )
    loops = [Loop(users, each, count) for each in (None, threshold, whole, weighing)]
    visits = max(_VISITS, -(-_SEEN // count))
    for _ in range(visits):
        for loop in loops:
            loop.play(-(-rounds // visits))
    plain, none, fixed, lagged = (Times.mean(loop.steps) for loop in loops)
    curve = costs.verify_curve(count)
    return _Load(
        count,
        drafts,
        plain,
        fixed,
        max(lagged.rest_ms - fixed.rest_ms, 0.0),
        loops[0].reading,
        loops[2].reading,
        _ratio(fixed.draft_ms, costs.draft_ms(count)),
        _ratio(none.verify_ms, float(curve[0])),
        _ratio(fixed.verify_ms, float(curve[min(count * drafts, len(curve) - 1)])),
    )


def _ratio(spent_ms: float, table_ms: float) -> float:
    return spent_ms / table_ms if spent_ms > 0 and table_ms > 0 else 1.0
