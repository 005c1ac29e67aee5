"""Closed-loop load: a fixed number of users on an engine, each with one request in flight.

A user whose answer is complete sends the next request at once. The first N requests count, the same
ones for every engine; while any of them is unanswered, users keep sending further requests. All
users are therefore busy from the first request to the last counted answer: there is no ramp-down,
and no schedule gains by finishing on an emptying engine.

Engines that are compared step in turn, each on a clock of its own that runs in its steps only: a
slow moment of the machine falls on all of them alike.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

from dspark.engine.engine import Engine
from dspark.engine.timing import Clock
from dspark.errors import RequestError
from dspark.request import Output, Request, Stats, merge_stats

WARM_UP_TOKENS = 12
Supply = Callable[[int], Request]
"""Returns the i-th request to send, from 0."""


@dataclass(frozen=True)
class Answer:
    """One answered request; times in seconds of its engine's own clock, from 0.

    Attributes:
        sent_s: time of sending.
        first_s: arrival of its first tokens.
        end_s: arrival of its last tokens.
        first_tokens: number of tokens in the first event.
        output: the answer.
    """

    sent_s: float
    first_s: float
    end_s: float
    first_tokens: int
    output: Output

    @property
    def ttft_ms(self) -> float:
        """Time to first token."""
        return 1e3 * (self.first_s - self.sent_s)

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens per second after the first tokens; None if there were no others."""
        later = len(self.output.token_ids) - self.first_tokens
        return later / (self.end_s - self.first_s) if later > 0 else None


@dataclass(frozen=True)
class LoadRun:
    """One run of the loop.

    Attributes:
        users: requests in flight at all times.
        seconds: of the engine's steps from the first request to the last counted answer.
        tokens: committed in that time, by counted and other requests.
        answers: the counted ones, in sending order.
        clock: the engine's timings of that time.
    """

    users: int
    seconds: float
    tokens: int
    answers: tuple[Answer, ...]
    clock: Clock

    @property
    def tokens_per_s(self) -> float:
        """Throughput."""
        return self.tokens / self.seconds

    @property
    def user_speeds(self) -> list[float]:
        """Tokens per second of every counted request that has a speed."""
        return [speed for a in self.answers if (speed := a.tokens_per_s) is not None]

    @property
    def stats(self) -> Stats:
        """The counts of the counted requests."""
        return merge_stats([answer.output for answer in self.answers])


@dataclass
class _Flight:
    """A request in flight; `first_s` is None until its first tokens arrive."""

    index: int
    sent_s: float
    first_s: float | None = None
    first_tokens: int = 0


class _Loop:
    """The state of one run; `spent_s` is the time of its steps so far."""

    def __init__(
        self, engine: Engine, supply: Supply, users: int, count: int, now: Callable[[], float]
    ) -> None:
        self.engine, self.supply, self.users, self.count = engine, supply, users, count
        self.now, self.before = now, replace(engine.clock)
        self.flights: dict[int, _Flight] = {}
        self.answers: dict[int, Answer] = {}
        self.sent, self.tokens, self.spent_s = 0, 0, 0.0

    def step(self) -> None:
        """Send a request of every user who has none in flight, and take one step."""
        started = self.now()
        while len(self.flights) < self.users:
            number = self.engine.add(self.supply(self.sent))
            self.flights[number] = _Flight(self.sent, self.spent_s)
            self.sent += 1
        events = self.engine.step()
        self.spent_s += self.now() - started
        for event in events:
            flight = self.flights[event.request_id]
            self.tokens += len(event.pieces)
            if flight.first_s is None and event.pieces:
                flight.first_s, flight.first_tokens = self.spent_s, len(event.pieces)
            if event.output is not None:
                del self.flights[event.request_id]
                self._answered(flight, event.output, self.spent_s)

    def _answered(self, flight: _Flight, output: Output, at_s: float) -> None:
        if output.finish_reason == "error" or flight.first_s is None:
            raise RequestError(
                f"Request {flight.index} failed under load, so no speed can be reported; send it "
                "alone to see why."
            )
        if flight.index < self.count:
            self.answers[flight.index] = Answer(
                flight.sent_s, flight.first_s, at_s, flight.first_tokens, output
            )

    @property
    def done(self) -> bool:
        """Whether all counted requests are answered."""
        return len(self.answers) == self.count

    def end(self) -> LoadRun:
        """Leave the engine idle; what the run gave."""
        for number in self.flights:
            self.engine.cancel(number)
        answers = tuple(self.answers[i] for i in range(self.count))
        clock = clock_since(self.engine.clock, self.before)
        return LoadRun(self.users, self.spent_s, self.tokens, answers, clock)


def closed_loop(
    engine: Engine,
    supply: Supply,
    *,
    users: int,
    count: int,
    now: Callable[[], float] = time.perf_counter,
) -> LoadRun:
    """Keep an engine under the load of `users` users until the counted requests are answered.

    Args:
        engine: idle, with room for `users` requests. It is left idle: requests in flight at the end
            are cancelled.
        supply: returns the i-th request.
        users: requests in flight.
        count: number of counted requests, from the first one on.
        now: the clock, in seconds.

    Raises:
        RequestError: a request does not fit the engine, or failed.
    """
    return closed_loops([engine], supply, users=users, count=count, now=now)[0]


def closed_loops(
    engines: Sequence[Engine],
    supply: Supply,
    *,
    users: int,
    count: int,
    now: Callable[[], float] = time.perf_counter,
) -> list[LoadRun]:
    """`closed_loop` of each engine, step by step in turn: next is whose steps have taken least.

    Args:
        engines: as there, and so are the others.
        supply: as there; every engine gets the same requests.
        users: as there.
        count: as there.
        now: as there.

    Raises:
        RequestError: as there.
    """
    loops = [_Loop(engine, supply, users, count, now) for engine in engines]
    while going := [loop for loop in loops if not loop.done]:
        min(going, key=lambda loop: loop.spent_s).step()
    return [loop.end() for loop in loops]


def out_of_step(supply: Supply, users: int) -> Supply:
    """The same requests, each user's first one shortened so that users end one after another.

    Users who begin at once, with answers of one length, stay in step where each step commits one
    token: prompts are then read together, and a run ends with the last token of all. Drafting
    breaks the step, so it would pay for prompts whose answers the run does not see.
    """

    def shortened(number: int) -> Request:
        request = supply(number)
        if number >= users:
            return request
        tokens = math.ceil(request.params.max_new_tokens * (number + 1) / users)
        return replace(request, params=replace(request.params, max_new_tokens=tokens))

    return shortened


def clock_since(clock: Clock, before: Clock) -> Clock:
    """The difference between a clock and an earlier copy."""
    return Clock(
        **{f.name: getattr(clock, f.name) - getattr(before, f.name) for f in fields(Clock)}
    )


def warm_up(engine: Engine, requests: Sequence[Request], tokens: int = WARM_UP_TOKENS) -> None:
    """Decode a few tokens of requests to warm up the engine."""
    for request in requests:
        few = min(tokens, request.params.max_new_tokens)
        engine.add(replace(request, params=replace(request.params, max_new_tokens=few)))
    while engine.has_work:
        engine.step()
