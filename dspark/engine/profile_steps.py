"""Measures whole steps: what reading prompts takes, and what a step takes beside its rounds.

Schedules compare steps and need none of it; capacity planning adds steps up.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import torch

from dspark.drafters.base import Drafter
from dspark.engine.engine import Engine
from dspark.engine.profile import fast_mean
from dspark.engine.speculation.draft_scheduler import Scheduler
from dspark.engine.speculation.schedule import Schedule
from dspark.request import Request, SamplingParams
from dspark.scheduling.cost_table import CostTable, PromptCost, StepExtra
from dspark.targets.target import Target

PROMPT_ROWS = (16, 64, 128, 256, 512)
_WARM_UP = 4
_PROMPT = 32


def measure_steps(
    target: Target, drafter: Drafter, costs: CostTable, *, repeats: int = 5
) -> CostTable:
    """The table with prompts and whole steps, measured by the engine's own steps.

    Args:
        target: the model.
        drafter: bound to it.
        costs: their table on this machine.
        repeats: of each prompt; of rounds three times as many. The fastest third counts, as in
            `profile.measure_costs`.
    """
    most = min(PROMPT_ROWS[-1], target.max_context // 2)
    sizes = sorted({min(rows, most) for rows in PROMPT_ROWS})
    prompts = tuple(PromptCost(n, _prompt_ms(target, drafter, n, repeats)) for n in sizes)
    counts = sorted({point.requests for point in costs.points})
    extras = tuple(_extra(target, drafter, costs, count, 3 * repeats) for count in counts)
    return replace(costs, prompts=prompts, extras=extras)


def _prompt_ms(target: Target, drafter: Drafter, rows: int, repeats: int) -> float:
    """A step of an idle engine that reads a prompt and draws its first token."""
    engine = Engine(target, drafter, max_requests=1, max_length=rows + 8, step_tokens=rows)
    spent = []
    for number in range(repeats + 1):
        engine.add(_request(target, rows, 2, number))
        started = time.perf_counter()
        engine.step()
        spent.append(1e3 * (time.perf_counter() - started))
        for request in list(engine.roster.running):
            engine.cancel(request.request_id)
    return fast_mean(spent[1:])


def _extra(
    target: Target, drafter: Drafter, costs: CostTable, count: int, rounds: int
) -> StepExtra:
    """What steps of so many requests take beside drafting and verification."""
    num_drafts = drafter.block_size
    lagged = Scheduler(Schedule("lagged"), num_drafts=num_drafts, costs=costs)
    fixed = Scheduler(Schedule("fixed"), num_drafts=num_drafts)
    plain_ms = [sum(step) for step in _steps(target, None, None, count, rounds)]
    rest_ms = [rest for _, rest in _steps(target, drafter, fixed, count, rounds)]
    # Nothing of a step under `lagged` but its rounds' own parts, and what schedules read from them.
    decided_ms = [rest for _, rest in _steps(target, drafter, lagged, count, rounds)]
    rest = fast_mean(rest_ms)
    return StepExtra(count, fast_mean(plain_ms), rest, max(fast_mean(decided_ms) - rest, 0.0))


def _steps(
    target: Target, drafter: Drafter | None, scheduler: Scheduler | None, count: int, rounds: int
) -> Iterator[tuple[float, float]]:
    """Of steps without prompts: drafting and verification, and the rest, in milliseconds."""
    engine = Engine(
        target,
        drafter,
        max_requests=count,
        max_length=min(target.max_context, _PROMPT + 1024),
        step_tokens=count * _PROMPT,
        prefix_reuse=False,
        schedule=scheduler,
    )
    seen = number = 0
    while seen < rounds + _WARM_UP:
        while len(engine.roster.everyone) < count:
            room = engine.max_length - _PROMPT
            engine.add(_request(target, _PROMPT, room, number := number + 1))
        reads = any(not request.ready for request in engine.roster.everyone)
        before, started = replace(engine.clock), time.perf_counter()
        engine.step()
        whole_ms = 1e3 * (time.perf_counter() - started)
        rounds_ms = engine.clock.draft_ms - before.draft_ms
        rounds_ms += engine.clock.verify_ms - before.verify_ms
        if not reads:
            seen += 1
            if seen > _WARM_UP:
                yield rounds_ms, whole_ms - rounds_ms
    for request in list(engine.roster.everyone):
        engine.cancel(request.request_id)


def _request(target: Target, prompt: int, answer: int, seed: int) -> Request:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(target.vocab_size, (prompt,), generator=generator)
    return Request(tuple(tokens.tolist()), SamplingParams(answer, ignore_eos=True))
