"""Closed loops whose steps are timed.

Contexts differ, answers end one after another, pages lie scattered, and the next prompts are read
beside those that decode, as in a server.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from dspark.drafters.base import Drafter
from dspark.engine.engine import Engine
from dspark.engine.speculation.draft_scheduler import Scheduler
from dspark.request import Request, SamplingParams
from dspark.targets.target import Target

_WARM_UP = 2
OUTLIER = 2.0  # what a stall counts as, in medians
_PATIENCE = 4  # steps for each that is wanted: some read prompts, and drafting may pause
_GOLDEN = (math.sqrt(5) - 1) / 2  # its multiples spread evenly between 0 and 1
Now = Callable[[], float]
Reading = tuple[int, float]
"""(rows of prompts, milliseconds) of a step that reads them while all others decode"""


def mean_ms(times: Iterable[float]) -> float:
    """The mean of some times, stalls cut; 0 of none."""
    found = list(times)
    if not found:
        return 0.0
    most = OUTLIER * statistics.median(found)
    return statistics.fmean(min(each, most) for each in found)


@dataclass(frozen=True)
class Times:
    """Milliseconds of a step without prompts: of parts, and of what is left."""

    draft_ms: float
    verify_ms: float
    rest_ms: float

    @classmethod
    def mean(cls, steps: Sequence[Times]) -> Times:
        """The mean step."""
        parts = zip(*((each.draft_ms, each.verify_ms, each.rest_ms) for each in steps), strict=True)
        return cls(*map(mean_ms, parts)) if steps else cls(0.0, 0.0, 0.0)

    @property
    def whole_ms(self) -> float:
        """A step."""
        return self.draft_ms + self.verify_ms + self.rest_ms


@dataclass(frozen=True)
class Users:
    """Who sends requests, and what serves them.

    Attributes:
        target: the model.
        drafter: bound to it.
        lengths: (prompt, answer) tokens of the requests in turn; cut to what the context holds.
        now: the clock, in seconds.
    """

    target: Target
    drafter: Drafter
    lengths: tuple[tuple[int, int], ...]
    now: Now

    def request(self, number: int, share: float = 1.0) -> Request:
        """A request of which so much of the answer is still to come; the rest is in the prompt."""
        prompt, answer = self.lengths[number % len(self.lengths)]
        prompt = min(prompt, self.target.max_context // 2)
        answer = min(answer, self.target.max_context - prompt)
        left = min(max(round(share * answer), 2), answer)
        return random_request(self.target, prompt + answer - left, left, number)

    @property
    def longest(self) -> int:
        """Tokens of a request at most."""
        return min(max(map(sum, self.lengths)), self.target.max_context)


class Loop:
    """So many users, each of whom sends the next request when an answer ends.

    Args:
        users: who they are.
        scheduler: of the drafts; None decodes plainly.
        count: how many.

    Attributes:
        steps: those without a prompt. Of a schedule that protects plain decoding those count in
            which it reads confidences: it lets others go undecided, and they cost as much as those
            of whole blocks.
        reading: those with one.
    """

    def __init__(self, users: Users, scheduler: Scheduler | None, count: int) -> None:
        self._users, self._scheduler, self._count, self._sent = users, scheduler, count, 0
        trees = scheduler is not None and scheduler.of_trees
        self._engine = Engine(
            users.target,
            None if scheduler is None else users.drafter,
            max_requests=count,
            max_length=users.longest,
            step_tokens=count * users.longest,
            schedule=scheduler,
            tree_nodes=scheduler.num_drafts if scheduler is not None and trees else None,
        )
        self.steps, self.reading = list[Times](), list[Reading]()
        for _ in range(count):  # leave pages as a server does that has answered others
            self._send(0.0)
        while self._engine.has_work:
            self._engine.step()

    def play(self, steps: int) -> None:
        """Begin anew, anywhere in answers, and go on for so many steps without a prompt at most."""
        for request in self._engine.roster.everyone:
            self._engine.cancel(request.request_id)
        for _ in range(self._count):
            self._send(self._sent * _GOLDEN % 1.0)
        for _ in range(_WARM_UP):
            self._engine.step()
        wanted = len(self.steps) + steps
        for _ in range(_PATIENCE * steps):
            if len(self.steps) >= wanted:
                return
            while len(self._engine.roster.everyone) < self._count:
                self._send(1.0)
            self._step()

    def _send(self, share: float) -> None:
        self._sent += 1
        self._engine.add(self._users.request(self._sent, share))

    def _step(self) -> None:
        engine, now = self._engine, self._users.now
        unread = [request.unread for request in engine.roster.everyone if not request.ready]
        before, wall, started = replace(engine.clock), time.perf_counter(), now()
        engine.step()
        spent_ms, wall_ms = 1e3 * (now() - started), 1e3 * (time.perf_counter() - wall)
        if unread:
            if len(unread) < self._count:
                self.reading.append((sum(unread), spent_ms))
            return
        share = spent_ms / wall_ms  # parts are timed by the wall's clock
        draft_ms = share * (engine.clock.draft_ms - before.draft_ms)
        verify_ms = share * (engine.clock.verify_ms - before.verify_ms)
        asked, scheduler = True, self._scheduler
        if scheduler is not None:
            weighs = scheduler.schedule.protects
            asked = draft_ms > 0 and scheduler.reads_confidences >= weighs
        if asked:
            self.steps.append(Times(draft_ms, verify_ms, spent_ms - draft_ms - verify_ms))


def random_request(target: Target, prompt: int, answer: int, seed: int) -> Request:
    """A request of random tokens, answered in full."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(target.vocab_size, (prompt,), generator=generator)
    return Request(tuple(tokens.tolist()), SamplingParams(answer, ignore_eos=True))
