"""Measures whole steps under load: prompts, rounds on longer contexts, and what lies beside them.

Schedules compare steps, and correct their table by the rounds that they see. Capacity planning
adds steps up, so its table has to say what they take under load in the first place.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from dspark.drafters.base import Drafter
from dspark.engine.engine import Engine
from dspark.engine.speculation.draft_scheduler import Scheduler
from dspark.engine.speculation.schedule import Schedule
from dspark.request import Request, SamplingParams
from dspark.scheduling.cost_table import CostPoint, CostTable, PromptCost, StepExtra
from dspark.targets.target import Target

PROMPT_ROWS = (16, 64, 128, 256, 512)
_PROMPT_ROWS, _MOST_PROMPTS = 1024, 6  # read of each size, rows and prompts at most
_BETWEEN = 3  # rounds between two prompts, so that each finds the caches as a server's would
_WARM_UP = 4
_CONTEXTS = (48, 80, 112)  # where rounds begin, a visit each
_SPREAD = (-32, 16, -16, 0, 32)  # contexts of requests that run together differ
_ANSWER = 128
_PATIENCE = 4  # steps for each round that is wanted: drafting may pause where drafts never stay
_MOST_FACTOR = 4.0  # of a prompt beside other requests
_OUTLIER = 2.0  # what a stall counts as, in medians
Now = Callable[[], float]


def measure_steps(
    target: Target,
    drafter: Drafter,
    costs: CostTable,
    *,
    rounds: int = 30,
    tree_nodes: int | None = None,
    now: Now = time.perf_counter,
) -> CostTable:
    """The table as steps under load have it, with prompts and whole steps.

    Rounds follow one another on contexts of 16 to 240 tokens that differ between requests, prompts
    are read between rounds, and means count, since steps add up to means; a stall counts as twice
    the median. The table itself has the fastest visits of points on short contexts: drafting and
    verification are scaled to these, verification in a straight line between no draft and all.

    Args:
        target: the model.
        drafter: bound to it.
        costs: their table on this machine, of whole blocks of the drafter, or of trees.
        rounds: of each number of requests and each way of decoding.
        tree_nodes: of the table's trees; None for chains.
        now: the clock, in seconds. That of the processor leaves other work on the machine out, and
            is right with one thread.
    """
    most = min(PROMPT_ROWS[-1], target.max_context // 2)
    sizes = sorted({min(rows, most) for rows in PROMPT_ROWS})
    prompts = _prompts(target, drafter, sizes, now)
    counts = sorted({point.requests for point in costs.points})
    whole = Scheduler(Schedule("fixed"), num_drafts=drafter.block_size)
    whole = whole if tree_nodes is None else whole.for_trees(tree_nodes)
    pair = target, drafter, whole
    loads = {count: _under_load(pair, costs, count, rounds, now) for count in counts}
    found = {row.rows: row.plain_ms for row in prompts}
    alone_ms = found[_rows_beside(sizes)] - loads[counts[0]].extra.plain_ms
    extras = tuple(
        replace(
            loads[count].extra,
            prompt_factor=_factor(_beside_ms(target, _rows_beside(sizes), count, now), alone_ms),
        )
        for count in counts
    )
    return replace(
        costs,
        points=tuple(loads[point.requests].of(point) for point in costs.points),
        prompts=prompts,
        extras=extras,
    )


def _prompts(
    target: Target, drafter: Drafter, sizes: Sequence[int], now: Now
) -> tuple[PromptCost, ...]:
    """Steps that read a prompt and draw its first token, with nobody else there.

    Sizes and engines are visited in turn, so that a slow moment does not fall on one of them alone.
    """
    plain, drafting = (
        Engine(target, each, max_requests=1, max_length=sizes[-1] + 64, step_tokens=sizes[-1])
        for each in (None, drafter)
    )
    spent: dict[tuple[Engine, int], list[float]] = {}
    for number in range(_MOST_PROMPTS + 1):
        for rows in sizes:
            if number * rows > _PROMPT_ROWS:
                continue
            for engine in (plain, drafting):
                # None begins as another does: nothing of it is to be found in the prefix cache.
                engine.add(_request(target, rows, 64, number * sizes[-1] + rows))
                started = now()
                engine.step()
                if number:  # the first visit warms up
                    spent.setdefault((engine, rows), []).append(1e3 * (now() - started))
                for _ in range(_BETWEEN):
                    engine.step()
                for request in engine.roster.everyone:
                    engine.cancel(request.request_id)
    return tuple(
        PromptCost(rows, _mean(spent[drafting, rows]), _mean(spent[plain, rows])) for rows in sizes
    )


def _factor(beside_ms: float, alone_ms: float) -> float:
    """How many times as much a prompt takes beside other requests; 1 where neither is to be seen.

    A difference of noise alone must not multiply the cost of long prompts.
    """
    return min(max(beside_ms / alone_ms, 1.0), _MOST_FACTOR) if alone_ms > 0 else 1.0


def _rows_beside(sizes: Sequence[int]) -> int:
    """Rows of the prompts that are read beside decoding requests."""
    return sizes[min(1, len(sizes) - 1)]


def _beside_ms(target: Target, rows: int, count: int, now: Now) -> float:
    """What a prompt adds to a plain step of so many requests, whose attention it shares."""
    length = min(target.max_context, 2 * rows + _ANSWER)
    prompt = min(rows, length // 2)
    engine = Engine(
        target,
        max_requests=count + 1,
        max_length=length,
        step_tokens=(count + 1) * length,
        prefix_reuse=False,
    )
    for number in range(count):
        engine.add(_request(target, prompt, length - prompt, number))
    for _ in range(_WARM_UP):
        engine.step()
    without, beside = list[float](), list[float]()
    for number in range(_WARM_UP + 1):
        started = now()
        engine.step()
        ended = now()
        added = engine.add(_request(target, rows, 8, count + number))
        begun = now()
        engine.step()
        if number:  # the first prompt warms up
            without.append(1e3 * (ended - started))
            beside.append(1e3 * (now() - begun))
        engine.cancel(added)
    return _mean(beside) - _mean(without)


def _mean(times: Iterable[float]) -> float:
    """The mean of some times, stalls cut; 0 of none."""
    found = list(times)
    if not found:
        return 0.0
    most = _OUTLIER * statistics.median(found)
    return statistics.fmean(min(each, most) for each in found)


@dataclass(frozen=True)
class _Times:
    """Milliseconds of a step without prompts: of parts, and of what is left."""

    draft_ms: float
    verify_ms: float
    rest_ms: float

    @classmethod
    def mean(cls, steps: Sequence[_Times]) -> _Times:
        """The mean step."""
        parts = zip(*((each.draft_ms, each.verify_ms, each.rest_ms) for each in steps), strict=True)
        return cls(*map(_mean, parts)) if steps else cls(0.0, 0.0, 0.0)

    @property
    def whole_ms(self) -> float:
        """A step."""
        return self.draft_ms + self.verify_ms + self.rest_ms


@dataclass(frozen=True)
class _Load:
    """What steps of so many requests take under load.

    Attributes:
        extra: beside their rounds.
        drafts: K.
        draft: factor of the table's drafting time.
        first, last: factors of its verification without drafts and with all of them.
    """

    extra: StepExtra
    drafts: int
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


def _under_load(
    pair: tuple[Target, Drafter, Scheduler],
    costs: CostTable,
    count: int,
    rounds: int,
    now: Now,
) -> _Load:
    target, drafter, whole = pair
    drafts = whole.num_drafts
    # No confidence reaches 1: blocks are drafted, and nothing of them is verified.
    threshold, weighing = (
        Scheduler(schedule, num_drafts=drafter.block_size, costs=costs)
        for schedule in (Schedule("threshold", 1.0), Schedule("lagged"))
    )
    schedulers = (None, threshold, whole, weighing)
    seen: list[list[_Times]] = [[] for _ in schedulers]
    for context in _CONTEXTS:  # in turn, so that a slow moment does not fall on one of them alone
        load = count, context, rounds // len(_CONTEXTS)
        for scheduler, steps in zip(schedulers, seen, strict=True):
            steps.extend(_steps(target, drafter, scheduler, load, now))
    plain, none, fixed, lagged = map(_Times.mean, seen)
    curve = costs.verify_curve(count)
    return _Load(
        StepExtra(count, plain.whole_ms, fixed.rest_ms, max(lagged.rest_ms - fixed.rest_ms, 0.0)),
        drafts,
        _ratio(fixed.draft_ms, costs.draft_ms(count)),
        _ratio(none.verify_ms, float(curve[0])),
        _ratio(fixed.verify_ms, float(curve[min(count * drafts, len(curve) - 1)])),
    )


def _ratio(spent_ms: float, table_ms: float) -> float:
    return spent_ms / table_ms if table_ms > 0 else 1.0


def _steps(
    target: Target,
    drafter: Drafter,
    scheduler: Scheduler | None,
    load: tuple[int, int, int],
    now: Now,
) -> list[_Times]:
    """Steps without prompts of so many requests, from a context on, so many rounds.

    Of a schedule that reads confidences those rounds count in which it does: it lets others go
    undecided, and they cost as much as those of whole blocks.
    """
    count, prompt, rounds = load
    length = min(target.max_context, prompt + _SPREAD[-1] + _ANSWER)
    prompt = min(prompt, length // 2)
    engine = Engine(
        target,
        None if scheduler is None else drafter,
        max_requests=count,
        max_length=length,
        step_tokens=count * length,
        prefix_reuse=False,
        schedule=scheduler,
        tree_nodes=scheduler.num_drafts if scheduler is not None and scheduler.of_trees else None,
    )
    number, steps, weighs = 0, list[_Times](), scheduler is not None and scheduler.schedule.protects
    for _ in range(_PATIENCE * (rounds + _WARM_UP)):
        if len(steps) == rounds + _WARM_UP:
            break
        while len(engine.roster.everyone) < count:
            own = prompt + _SPREAD[number % len(_SPREAD)] if prompt > _SPREAD[-1] else prompt
            engine.add(_request(target, own, length - own, number := number + 1))
        reads = any(not request.ready for request in engine.roster.everyone)
        before, wall, started = replace(engine.clock), time.perf_counter(), now()
        engine.step()
        spent_ms, wall_ms = 1e3 * (now() - started), 1e3 * (time.perf_counter() - wall)
        share = spent_ms / wall_ms  # parts are timed by the wall's clock
        draft_ms = share * (engine.clock.draft_ms - before.draft_ms)
        verify_ms = share * (engine.clock.verify_ms - before.verify_ms)
        asked = scheduler is None or (draft_ms > 0 and scheduler.reads_confidences >= weighs)
        if not reads and asked:
            steps.append(_Times(draft_ms, verify_ms, spent_ms - draft_ms - verify_ms))
    for request in engine.roster.everyone:
        engine.cancel(request.request_id)
    return steps[_WARM_UP:] or steps


def _request(target: Target, prompt: int, answer: int, seed: int) -> Request:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(target.vocab_size, (prompt,), generator=generator)
    return Request(tuple(tokens.tolist()), SamplingParams(answer, ignore_eos=True))
