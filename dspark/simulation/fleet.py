"""Replicas behind a router, under open arrivals or a closed loop of users."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from dspark.errors import UsageError
from dspark.simulation.arrivals import Arrivals
from dspark.simulation.jobs import Job
from dspark.simulation.server import Counts, Limits, Server, Way

RouterName = Literal["least", "round-robin", "random"]


@dataclass(frozen=True)
class Fleet:
    """Where requests go.

    Attributes:
        limits: of each replica.
        replicas: how many, all alike.
        router: `least` sends a request to who has the fewest in flight, `round-robin` to each in
            turn, `random` to anyone.
        seed: of the answers' streams, and of `random`.
    """

    limits: Limits
    replicas: int = 1
    router: RouterName = "least"
    seed: int = 0

    def servers(self, way: Way) -> list[Server]:
        """New replicas.

        Raises:
            UsageError: more requests would run than the cost table covers.
        """
        tables = [way.costs] if way.tree_costs is None else [way.costs, way.tree_costs]
        most = min(max(point.requests for point in costs.points) for costs in tables)
        if self.limits.max_requests > most:
            raise UsageError(
                f"The cost table of {way.name} was measured for up to {most} requests, but "
                f"{self.limits.max_requests} are to run at once; measure more with dspark profile "
                f"--max-requests {self.limits.max_requests}."
            )
        return [Server(way, self.limits, self.seed) for _ in range(self.replicas)]

    def route(self) -> Callable[[Sequence[Server], Job], Server]:
        """A new router."""
        if self.router == "round-robin":
            return lambda servers, job: servers[job.request_id % len(servers)]
        if self.router == "random":
            generator = np.random.default_rng((self.seed, 1))
            return lambda servers, _: servers[int(generator.integers(len(servers)))]
        return lambda servers, _: min(servers, key=lambda server: server.in_flight)


@dataclass(frozen=True)
class Run:
    """A simulation.

    Attributes:
        jobs: the requests that count, in the order of arrival, all answered.
        servers: the replicas, with what they did.
        seconds: of the window in which all that comes counts.
        tokens: committed in it.
    """

    jobs: tuple[Job, ...]
    servers: tuple[Server, ...]
    seconds: float
    tokens: int


def open_loop(way: Way, arrivals: Arrivals, fleet: Fleet) -> Run:
    """Requests that come by themselves. The window is from the first arrival to the last.

    Raises:
        UsageError: the table does not cover the fleet's requests, or a request fits no cache.
    """
    _check_cache(arrivals, fleet)
    servers, route = fleet.servers(way), fleet.route()
    jobs = arrivals.jobs()
    clock, sent, in_window = _Clock(servers), 0, 0
    while sent < len(jobs) or clock.next_s < math.inf:
        if sent < len(jobs) and jobs[sent].sent_s <= clock.next_s:
            job = jobs[sent]
            sent += 1
            clock.until_s = jobs[sent].sent_s if sent < len(jobs) else math.inf
            clock.send(route(servers, job), job)
            if sent == len(jobs):
                in_window = sum(server.counts.tokens for server in servers)
        else:
            clock.turn()
    return Run(tuple(jobs), tuple(servers), jobs[-1].sent_s - jobs[0].sent_s, in_window)


def closed_loop(
    way: Way,
    arrivals: Arrivals,
    fleet: Fleet,
    users: int,
    *,
    count: int | None = None,
    warm_up_tokens: int = 0,
) -> Run:
    """So many users, each of whom sends the next request the moment its answer ends.

    As `evaluation.load.closed_loop`: all users stay busy until the counted requests are answered;
    that is the window, and further requests do not count.

    Args:
        way: how the replicas decode.
        arrivals: the requests, which are sent in turn; those behind the last are the first again.
        fleet: where they go.
        users: that are always there.
        count: requests that count, from the first on; None for all.
        warm_up_tokens: of an answer to each of the last `users` requests, before the window.

    Raises:
        UsageError: as `open_loop`.
    """
    _check_cache(arrivals, fleet)
    servers, route = fleet.servers(way), fleet.route()
    pool = arrivals.jobs()
    if warm_up_tokens:
        _warm_up(servers, [pool[-1 - i % len(pool)] for i in range(users)], warm_up_tokens)
    open_jobs = len(pool) if count is None else count
    jobs, counted = list[Job](), open_jobs
    clock, now_s = _Clock(servers), 0.0
    clock.until_s = math.inf if len(servers) == 1 else -math.inf

    def send(number: int) -> None:
        for _ in range(number):
            job = replace(pool[len(jobs) % len(pool)], request_id=len(jobs), sent_s=now_s)
            jobs.append(job)
            clock.queue(route(servers, job), job)
        clock.start(now_s)

    send(users)
    while open_jobs:
        now_s = clock.next_s
        ended = clock.turn(restart=False)
        open_jobs -= sum(job.request_id < counted for job in ended)
        if open_jobs:
            send(len(ended))
    tokens = sum(server.counts.tokens for server in servers)
    return Run(tuple(jobs[:counted]), tuple(servers), now_s, tokens)


def _warm_up(servers: Sequence[Server], jobs: Sequence[Job], tokens: int) -> None:
    """Have all answers of a few tokens, of which nothing counts."""
    clock = _Clock(servers)
    for i, job in enumerate(jobs):
        few = replace(job, request_id=-1 - i, answer_tokens=min(job.answer_tokens, tokens))
        clock.send(servers[i % len(servers)], few)
    while clock.next_s < math.inf:
        clock.turn()
    for server in servers:
        server.counts = Counts()


class _Clock:
    """When the running steps of some servers end.

    Attributes:
        until_s: before when no request comes.
    """

    def __init__(self, servers: Sequence[Server]) -> None:
        self._servers = servers
        self._numbers = {id(server): number for number, server in enumerate(servers)}
        self._ends: list[tuple[float, int]] = []
        self._idle = set(range(len(servers)))
        self.until_s = -math.inf

    @property
    def next_s(self) -> float:
        """When the next step ends; infinite where nobody runs."""
        return self._ends[0][0] if self._ends else math.inf

    def queue(self, server: Server, job: Job) -> None:
        """Send a request, which waits for `start` where the server is idle."""
        server.send(job)

    def send(self, server: Server, job: Job) -> None:
        """Send a request now; an idle server starts."""
        server.send(job)
        self._start(self._numbers[id(server)], job.sent_s)

    def start(self, now_s: float) -> None:
        """Have every idle server start that has work."""
        for number in tuple(self._idle):
            self._start(number, now_s)

    def turn(self, *, restart: bool = True) -> list[Job]:
        """End the next step; the requests that ended with it."""
        end_s, number = heapq.heappop(self._ends)
        self._idle.add(number)
        ended = self._servers[number].settle()
        if restart:
            self._start(number, end_s)
        return ended

    def _start(self, number: int, now_s: float) -> None:
        server = self._servers[number]
        if number in self._idle and server.has_work:
            self._idle.remove(number)
            heapq.heappush(self._ends, (server.step(now_s, self.until_s), number))


def _check_cache(arrivals: Arrivals, fleet: Fleet) -> None:
    most = int((arrivals.prompt_N + arrivals.answer_N).max())
    room = fleet.limits.cache_tokens
    if room is not None and most > room:
        raise UsageError(
            f"A request of {most} tokens does not fit a cache of {room}; give --cache-tokens more."
        )
