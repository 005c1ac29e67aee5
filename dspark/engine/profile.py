"""Measures what a step costs on this machine: the table that schedules weigh drafts with."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from dspark.drafters.base import Drafter
from dspark.engine.engine import Engine
from dspark.engine.requests.sequence import ActiveRequest
from dspark.engine.speculation.acceptance import Offer
from dspark.engine.speculation.draft_scheduler import Scheduler
from dspark.engine.speculation.schedule import Schedule
from dspark.request import Request, SamplingParams
from dspark.scheduling.cost_table import CostPoint, CostTable, MachineKey
from dspark.targets.target import Target

PROMPT_TOKENS = 64
WARM_UP = 2
Progress = Callable[[int, int], None]
"""(points measured, points in all)"""


def hardware_name(device: torch.device) -> str:
    """What the processor or accelerator calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine_key(target: Target, drafter_name: str) -> MachineKey:
    """What a cost table of this process's machine, threads and models belongs to."""
    dtype = str(target.dtype).removeprefix("torch.")
    if target.batch_invariant:
        dtype += " batch-invariant"
    if target.compiled:
        dtype += " compiled"
    if target.weights != "plain":
        dtype += f" {target.weights} weights"
    if target.cuda_graphs:
        dtype += " with CUDA graphs"
    return MachineKey(
        hardware=hardware_name(target.device),
        threads=torch.get_num_threads(),
        dtype=dtype,
        target=target.name,
        drafter=drafter_name,
    )


# From here on not every number of drafts is measured.
_MANY_DRAFTS = 16


class _Told(Scheduler):
    """Drafts what it can, and verifies as many of each request as it is told."""

    def __init__(self, num_drafts: int, tree_depth: int | None = None) -> None:
        super().__init__(Schedule(), num_drafts=num_drafts, tree_depth=tree_depth)
        self.told: list[int] = []
        self.most = num_drafts

    def limits(
        self,
        requests: Sequence[ActiveRequest],  # noqa: ARG002
        most: Sequence[int],
    ) -> list[int]:
        return [min(limit, self.most) for limit in most]

    def lengths(
        self,
        requests: Sequence[ActiveRequest],  # noqa: ARG002
        limits: Sequence[int],  # noqa: ARG002
        offer: Offer,
    ) -> list[int]:
        return self.told[: offer.num_requests]

    @property
    def reads_confidences(self) -> bool:
        return True


def measure_costs(
    target: Target,
    drafter: Drafter,
    machine: MachineKey,
    *,
    max_requests: int = 8,
    block_size: int | None = None,
    tree_nodes: int | None = None,
    repeats: int = 5,
    temperature: float = 0.0,
    limit_s: float | None = None,
    progress: Progress | None = None,
) -> CostTable:
    """Time rounds of 1, 2, 4, ... requests that verify none, a few, ... all of their drafts.

    They are the engine's own rounds on random prompts of 64 tokens, confidences included. The
    points are visited in turn, `repeats` times after one visit that warms up, so that a slow
    moment of the machine does not fall on one of them alone, and the fastest visits of each count:
    what else runs on a machine can make a round slower, never faster. What sampling, prompts that
    ride along and longer contexts add, schedules learn from their own rounds
    (`scheduling.step_times`).

    Args:
        target: the model.
        drafter: bound to it.
        machine: what the table will belong to.
        max_requests: the most requests to measure.
        block_size: drafts per round, at most the drafter's own, which is the default.
        tree_nodes: nodes of trees that are drafted in place of chains.
        repeats: rounds per point.
        temperature: of the requests.
        limit_s: no further visit begins after so many seconds; None for no limit.
        progress: told after every point of a visit.

    Raises:
        UsageError: a size is not possible.
    """
    counts = _steps(max_requests)
    rooms = {
        count: _engine(target, drafter, count, block_size, tree_nodes, repeats, temperature)
        for count in counts
    }
    plan = [(count, n) for count in counts for n in _drafts(count, rooms[count][1].num_drafts)]
    seen, warming = _Seen(), _Seen()
    done, started = 0, time.perf_counter()
    for visit in range(-1, repeats):  # the first visit warms up
        if visit > 0 and limit_s is not None and time.perf_counter() - started > limit_s:
            break
        for count, n in plan:
            engine, told = rooms[count]
            (seen if visit >= 0 else warming).visit(engine, told, count, n, temperature)
            done += 1
            if progress is not None:
                progress(done, len(plan) * (repeats + 1))
    return CostTable(tuple(seen.point(count, n) for count, n in plan), machine)


@dataclass
class _Seen:
    """Milliseconds of every visit: of verification by point, of drafting by requests."""

    verify: dict[tuple[int, int], list[float]] = field(default_factory=dict)
    draft: dict[int, list[float]] = field(default_factory=dict)
    single: dict[int, list[float]] = field(default_factory=dict)

    def visit(self, engine: Engine, told: _Told, count: int, n: int, temperature: float) -> None:
        """Time a round that verifies n drafts of `count` requests."""
        _refill(engine, told, count, temperature)
        told.told = [n // count + (i < n % count) for i in range(count)]
        before = replace(engine.clock)
        engine.step()
        spent_ms = engine.clock.verify_ms - before.verify_ms
        self.verify.setdefault((count, n), []).append(spent_ms)
        self.draft.setdefault(count, []).append(engine.clock.draft_ms - before.draft_ms)
        if n == count:  # once a visit of all points
            _refill(engine, told, count, temperature)
            self.single.setdefault(count, []).append(_single_draft_ms(engine, told, count))

    def point(self, count: int, n: int) -> CostPoint:
        """The point's fastest visits."""
        draft_ms = _fast(self.draft[count])
        return CostPoint(
            tokens=count + n,
            requests=count,
            verify_ms=_fast(self.verify[count, n]),
            draft_ms=draft_ms,
            single_share=_share(_fast(self.single[count]), draft_ms),
        )


def _single_draft_ms(engine: Engine, told: _Told, count: int) -> float:
    """What drafting takes in a round that drafts one token of each request."""
    told.told, told.depth, told.most = [0] * count, 1, 1
    before = engine.clock.draft_ms
    engine.step()
    told.depth, told.most = None, told.num_drafts
    return engine.clock.draft_ms - before


def _fast(times: Sequence[float]) -> float:
    """The mean of the fastest third: one lucky clock reading is not enough."""
    count = (len(times) + 2) // 3
    return statistics.fmean(sorted(times)[:count])


def _share(part: float, whole: float) -> float:
    return min(part / whole, 1.0) if whole > 0 else 1.0


def _engine(
    target: Target,
    drafter: Drafter,
    count: int,
    block_size: int | None,
    tree_nodes: int | None,
    repeats: int,
    temperature: float,
) -> tuple[Engine, _Told]:
    """An engine for `count` requests (`_refill`)."""
    num_drafts = block_size or drafter.block_size
    told = _Told(num_drafts) if tree_nodes is None else _Told(tree_nodes, num_drafts)
    prompt = _prompt_tokens(target)
    visits = (repeats + 1) * (len(_drafts(count, tree_nodes or num_drafts)) + 1) + WARM_UP
    room = min(visits * (num_drafts + 1) + 1, target.max_context - prompt)
    engine = Engine(
        target,
        drafter,
        max_requests=count,
        max_length=prompt + room,
        step_tokens=count * prompt,  # all prompts are read in the first step
        prefix_reuse=False,
        schedule=told,
        block_size=block_size,
        tree_nodes=tree_nodes,
        strict=True,
    )
    _refill(engine, told, count, temperature)
    return engine, told


def _refill(engine: Engine, told: _Told, count: int, temperature: float) -> None:
    """Have `count` requests running that have read their prompts and have room for a round."""
    running = engine.roster.running
    if len(running) == count and all(r.room > engine.num_drafts + 1 for r in running):
        return
    for request in list(running):
        engine.cancel(request.request_id)
    target, prompt = engine.target, _prompt_tokens(engine.target)
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        tokens = torch.randint(target.vocab_size, (prompt,), generator=generator)
        params = SamplingParams(
            engine.max_length - prompt, temperature=temperature, seed=i, ignore_eos=True
        )
        engine.add(Request(tuple(tokens.tolist()), params))
    told.told = [0] * count
    for _ in range(WARM_UP):
        engine.step()


def _prompt_tokens(target: Target) -> int:
    return min(PROMPT_TOKENS, target.max_context // 2)


def _steps(most: int) -> list[int]:
    """1, 2, 4, ... up to `most`, which is the last."""
    steps = [1]
    while steps[-1] * 2 < most:
        steps.append(steps[-1] * 2)
    return steps if most == 1 else [*steps, most]


def _drafts(count: int, num_drafts: int) -> list[int]:
    """Numbers of drafts to measure with `count` requests: every one for one, fewer for more."""
    if count == 1 and num_drafts > _MANY_DRAFTS:  # of trees: as far as a chain, then wider apart
        return [*range(8), *range(7 + 4, num_drafts, 4), num_drafts]
    if count == 1:
        return list(range(num_drafts + 1))
    lengths = {0, 1, 2, (num_drafts + 1) // 2, num_drafts}
    return sorted(count * length for length in lengths if length <= num_drafts)
