"""Closed-loop load: a fixed number of users on one engine, each with one request in flight.

A user whose answer is complete sends the next request at once. The first N requests count, the same
ones for every engine; while any of them is unanswered, users keep sending further requests. All
users are therefore busy from the first request to the last counted answer: there is no ramp-down,
and no schedule gains by finishing on an emptying engine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

from dspark.engine.engine import Engine
from dspark.engine.timing import Clock
from dspark.errors import RequestError
from dspark.request import Output, Request, Stats, merge_stats

Supply = Callable[[int], Request]
"""Returns the i-th request to send, from 0."""


@dataclass(frozen=True)
class Answer:
    """One answered request; times in seconds since the first request was sent.

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
        seconds: from the first request to the last counted answer.
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
    """The state of one run."""

    def __init__(
        self, engine: Engine, supply: Supply, count: int, now: Callable[[], float]
    ) -> None:
        self.engine, self.supply, self.count, self.now = engine, supply, count, now
        self.flights: dict[int, _Flight] = {}
        self.answers: dict[int, Answer] = {}
        self.sent, self.tokens = 0, 0
        self.started = now()

    def send(self, users: int, at_s: float) -> None:
        """Send the next request of `users` users."""
        for _ in range(users):
            number = self.engine.add(self.supply(self.sent))
            self.flights[number] = _Flight(self.sent, at_s)
            self.sent += 1

    def step(self) -> tuple[int, float]:
        """One engine step; the number of finished answers, and the time."""
        events = self.engine.step()
        at_s = self.now() - self.started
        ended = 0
        for event in events:
            flight = self.flights[event.request_id]
            self.tokens += len(event.pieces)
            if flight.first_s is None and event.pieces:
                flight.first_s, flight.first_tokens = at_s, len(event.pieces)
            if event.output is not None:
                del self.flights[event.request_id]
                self._answered(flight, event.output, at_s)
                ended += 1
        return ended, at_s

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
    before = replace(engine.clock)
    loop = _Loop(engine, supply, count, now)
    loop.send(users, 0.0)
    at_s = 0.0
    while not loop.done:
        ended, at_s = loop.step()
        if not loop.done:
            loop.send(ended, at_s)
    clock = _since(engine.clock, before)
    for number in loop.flights:
        engine.cancel(number)
    answers = tuple(loop.answers[i] for i in range(count))
    return LoadRun(users, at_s, loop.tokens, answers, clock)


def _since(clock: Clock, before: Clock) -> Clock:
    """The difference between a clock and an earlier copy."""
    return Clock(
        **{f.name: getattr(clock, f.name) - getattr(before, f.name) for f in fields(Clock)}
    )


def warm_up(engine: Engine, requests: Sequence[Request], tokens: int) -> None:
    """Decode a few tokens of requests to warm up the engine."""
    for request in requests:
        few = min(tokens, request.params.max_new_tokens)
        engine.add(replace(request, params=replace(request.params, max_new_tokens=few)))
    while engine.has_work:
        engine.step()
