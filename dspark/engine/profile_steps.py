"""Measures whole steps under load: prompts, rounds on longer contexts, and what lies beside them.

Schedules compare steps, and correct their table by the rounds that they see. Capacity planning
adds steps up, so its table has to say what they take under load in the first place.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

import torch

from dspark.drafters.base import Drafter
from dspark.engine.engine import Engine
from dspark.engine.speculation.draft_scheduler import Scheduler
from dspark.engine.speculation.schedule import Schedule
from dspark.request import Request, SamplingParams
from dspark.scheduling.cost_table import CostPoint, CostTable, PromptCost, StepExtra
from dspark.targets.target import Target

PROMPT_ROWS = (16, 64, 128, 256, 512)
_WARM_UP, _VISITS = 4, 3
_BETWEEN = 3  # rounds between two prompts, so that each finds the caches as a server's would
_PROMPT, _ANSWER = 64, 128
_PATIENCE = 4  # steps for each round that is wanted: drafting may pause where drafts never stay


def measure_steps(
    target: Target, drafter: Drafter, costs: CostTable, *, rounds: int = 30
) -> CostTable:
    """The table as steps under load have it, with prompts and whole steps.

    Rounds follow one another on contexts of 64 to 192 tokens, prompts are read between rounds,
    and medians count, where the table has the fastest visits of points on short contexts: drafting
    and verification are scaled to these, verification in a straight line between no draft and all.

    Args:
        target: the model.
        drafter: bound to it.
        costs: their table on this machine, of whole blocks of the drafter.
        rounds: of each number of requests and each way of decoding.
    """
    most = min(PROMPT_ROWS[-1], target.max_context // 2)
    sizes = sorted({min(rows, most) for rows in PROMPT_ROWS})
    prompts = tuple(PromptCost(n, _prompt_ms(target, drafter, n)) for n in sizes)
    counts = sorted({point.requests for point in costs.points})
    loads = {count: _under_load(target, drafter, costs, count, rounds) for count in counts}
    return replace(
        costs,
        points=tuple(loads[point.requests].of(point) for point in costs.points),
        prompts=prompts,
        extras=tuple(load.extra for load in loads.values()),
    )


def _prompt_ms(target: Target, drafter: Drafter, rows: int, repeats: int = 5) -> float:
    """A step that reads a prompt and draws its first token, with nobody else there."""
    engine = Engine(
        target, drafter, max_requests=1, max_length=rows + 64, step_tokens=rows, prefix_reuse=True
    )
    spent = []
    for number in range(repeats + 1):
        engine.add(_request(target, rows, 64, number))
        started = time.perf_counter()
        engine.step()
        spent.append(1e3 * (time.perf_counter() - started))
        for _ in range(_BETWEEN):
            engine.step()
        for request in engine.roster.everyone:
            engine.cancel(request.request_id)
    return statistics.median(spent[1:])


@dataclass(frozen=True)
class _Times:
    """Medians of steps without prompts, in milliseconds: of parts, and of what is left."""

    draft_ms: float
    verify_ms: float
    rest_ms: float

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
    target: Target, drafter: Drafter, costs: CostTable, count: int, rounds: int
) -> _Load:
    drafts = drafter.block_size
    # No confidence reaches 1: blocks are drafted, and nothing of them is verified.
    schedules = (None, Schedule("threshold", 1.0), Schedule("fixed"), Schedule("lagged"))
    visits: dict[Schedule | None, list[_Times]] = {schedule: [] for schedule in schedules}
    for _ in range(_VISITS):  # in turn, so that a slow moment does not fall on one of them alone
        for schedule, seen in visits.items():
            if schedule is None:
                seen.append(_times(target, None, None, count, rounds // _VISITS))
                continue
            scheduler = Scheduler(schedule, num_drafts=drafts, costs=costs)
            seen.append(_times(target, drafter, scheduler, count, rounds // _VISITS))
    plain, none, fixed, lagged = (_median(seen) for seen in visits.values())
    curve = costs.verify_curve(count)
    return _Load(
        StepExtra(count, plain.whole_ms, fixed.rest_ms, max(lagged.rest_ms - fixed.rest_ms, 0.0)),
        drafts,
        _ratio(fixed.draft_ms, costs.draft_ms(count)),
        none.verify_ms / float(curve[0]),
        fixed.verify_ms / float(curve[min(count * drafts, len(curve) - 1)]),
    )


def _median(visits: Sequence[_Times]) -> _Times:
    return _Times(
        *(statistics.median(column) for column in zip(*map(astuple, visits), strict=True))
    )


def _ratio(spent_ms: float, table_ms: float) -> float:
    return spent_ms / table_ms if table_ms > 0 else 1.0


def _times(
    target: Target, drafter: Drafter | None, scheduler: Scheduler | None, count: int, rounds: int
) -> _Times:
    """Steps of so many requests, without those that read a prompt."""
    length = min(target.max_context, _PROMPT + _ANSWER)
    prompt = min(_PROMPT, length // 2)
    engine = Engine(
        target,
        drafter,
        max_requests=count,
        max_length=length,
        step_tokens=count * prompt,
        prefix_reuse=False,
        schedule=scheduler,
    )
    number, parts = 0, list[tuple[float, float, float]]()
    for _ in range(_PATIENCE * (rounds + _WARM_UP)):
        if len(parts) == rounds + _WARM_UP:
            break
        while len(engine.roster.everyone) < count:
            engine.add(_request(target, prompt, length - prompt, number := number + 1))
        reads = any(not request.ready for request in engine.roster.everyone)
        before, started = replace(engine.clock), time.perf_counter()
        engine.step()
        whole_ms = 1e3 * (time.perf_counter() - started)
        draft_ms = engine.clock.draft_ms - before.draft_ms
        verify_ms = engine.clock.verify_ms - before.verify_ms
        # A step of `lagged` that drafts nothing, as its first one, says nothing of its decisions.
        if not reads and (scheduler is None or draft_ms > 0):
            parts.append((draft_ms, verify_ms, whole_ms - draft_ms - verify_ms))
    for request in engine.roster.everyone:
        engine.cancel(request.request_id)
    warm = parts[_WARM_UP:] or parts or [(0.0, 0.0, 0.0)]
    return _Times(*(statistics.median(column) for column in zip(*warm, strict=True)))


def _request(target: Target, prompt: int, answer: int, seed: int) -> Request:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(target.vocab_size, (prompt,), generator=generator)
    return Request(tuple(tokens.tolist()), SamplingParams(answer, ignore_eos=True))
