"""A capacity plan: figures of simulated runs, the rate within a service level, and frontiers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dspark.evaluation.load.report import best_at, matched
from dspark.simulation.arrivals import Arrivals
from dspark.simulation.fleet import Fleet, Run, closed_loop, open_loop
from dspark.simulation.server import Counts, Way

PERCENTILES = (50, 95, 99)
_HALVINGS = 7  # of the range in which the largest rate is searched: to 1 % of the capacity
_HOUR_S, _MILLION = 3600.0, 1e6


@dataclass(frozen=True)
class ServiceLevel:
    """What most requests must get.

    Attributes:
        ttft_ms: time to first token at most.
        tokens_per_s: of a user, after the first token, at least; None for any speed.
        percentile: share of requests for which each must hold, in percent.
    """

    ttft_ms: float = 1000.0
    tokens_per_s: float | None = None
    percentile: float = 95.0

    def met(self, run: Run) -> bool:
        """Whether a run keeps it."""
        if np.percentile(_ttft_ms(run), self.percentile) > self.ttft_ms:
            return False
        speeds = _speeds(run)
        if self.tokens_per_s is None or not len(speeds):
            return True
        return bool(np.percentile(speeds, 100 - self.percentile) >= self.tokens_per_s)


@dataclass(frozen=True)
class Row:
    """Figures of one run.

    Attributes:
        schedule: the way of decoding.
        rate: requests per second; None in a closed loop.
        users: in a closed loop those that are always there; else how many requests were in flight
            in the mean (Little's law).
        tokens_per_s: of all replicas together.
        ttft_ms: time to first token at p50, p95 and p99.
        tokens_per_s_per_user: speed after the first token that 50, 95 and 99 % of users reach.
        mean_tokens_per_s_per_user: its mean, as `dspark bench` has it.
        accepted_length: tokens gained per round of a request.
        verified_per_request: rows per round of a request sent to the target, the anchor's included.
        busy: share of the time in which a replica worked.
        preemptions: requests that gave their pages up.
        cost_per_million_tokens: of the price given; None without one.
    """

    schedule: str
    rate: float | None
    users: float
    tokens_per_s: float
    ttft_ms: Mapping[str, float]
    tokens_per_s_per_user: Mapping[str, float | None]
    mean_tokens_per_s_per_user: float | None
    accepted_length: float
    verified_per_request: float
    busy: float
    preemptions: int
    cost_per_million_tokens: float | None


def row_of(way: Way, run: Run, *, users: int | None = None, price: float | None = None) -> Row:
    """The figures of a run.

    Args:
        way: who ran.
        run: what became of it.
        users: of a closed loop; None for open arrivals.
        price: of a replica's hour.
    """
    counts = _total(run)
    ttft_ms, speeds = _ttft_ms(run), _speeds(run)
    tokens_per_s = run.tokens / run.seconds
    in_flight_s = sum(job.end_s - job.sent_s for job in run.jobs)
    until_s = max(job.end_s for job in run.jobs)
    cost = None
    if price is not None:
        cost = price * len(run.servers) / _HOUR_S / tokens_per_s * _MILLION
    return Row(
        schedule=way.name,
        rate=None if users is not None else (len(run.jobs) - 1) / run.seconds,
        users=float(users) if users is not None else in_flight_s / until_s,
        tokens_per_s=tokens_per_s,
        ttft_ms={f"p{p}": float(np.percentile(ttft_ms, p)) for p in PERCENTILES},
        tokens_per_s_per_user={
            f"p{p}": float(np.percentile(speeds, 100 - p)) if len(speeds) else None
            for p in PERCENTILES
        },
        mean_tokens_per_s_per_user=float(speeds.mean()) if len(speeds) else None,
        accepted_length=counts.gained / max(counts.rounds, 1),
        verified_per_request=1 + counts.verified / max(counts.rounds, 1),
        busy=min(counts.busy_s / (until_s * len(run.servers)), 1.0),
        preemptions=counts.preemptions,
        cost_per_million_tokens=cost,
    )


def _ttft_ms(run: Run) -> Any:
    return np.array([1e3 * (job.first_s - job.sent_s) for job in run.jobs])


def _speeds(run: Run) -> Any:
    """Of each request with more than one token."""
    return np.array(
        [(j.tokens - 1) / (j.end_s - j.first_s) for j in run.jobs if j.end_s > j.first_s]
    )


def _total(run: Run) -> Counts:
    names = Counts.__dataclass_fields__
    return Counts(**{n: sum(getattr(s.counts, n) for s in run.servers) for n in names})


def capacity(way: Way, arrivals: Arrivals, fleet: Fleet, count: int = 400) -> float:
    """Requests per second of a fleet that is never idle, by the first `count` of them."""
    users = fleet.limits.max_requests * fleet.replicas
    run = closed_loop(way, arrivals.first(max(count, 2 * users)), fleet, users)
    return run.tokens / run.seconds / float(arrivals.answer_N.mean())


def max_rate(way: Way, arrivals: Arrivals, fleet: Fleet, level: ServiceLevel) -> float:
    """The largest rate, in requests per second, at which a fleet keeps a service level.

    The same requests, with the same bursts, come faster or slower. It is searched below what the
    fleet does when it is never idle, by halving; 0 where even 1 % of that is too much.
    """
    low, high = 0.0, 1.2 * capacity(way, arrivals, fleet)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        kept = level.met(open_loop(way, arrivals.at_rate(middle), fleet))
        low, high = (middle, high) if kept else (low, middle)
    return low


@dataclass(frozen=True)
class Plan:
    """What was simulated.

    Attributes:
        rows: per rate and way, in the order in which these were given.
        frontier: per number of users in a closed loop and way.
        max_rate: per way, requests per second within the service level.
        level: the service level.
    """

    rows: tuple[Row, ...]
    frontier: tuple[Row, ...]
    max_rate: Mapping[str, float]
    level: ServiceLevel


@dataclass(frozen=True)
class Study:
    """What is to be simulated.

    Attributes:
        ways: who decodes.
        arrivals: the requests; their own rate is simulated where no other is given.
        fleet: where they go.
        rates: requests per second.
        users: of the closed loops.
        level: the service level.
        price: of a replica's hour.
        search: how many of the requests each step of the search for the largest rate takes, and
            each closed loop.
    """

    ways: Sequence[Way]
    arrivals: Arrivals
    fleet: Fleet
    rates: Sequence[float] = ()
    users: Sequence[int] = ()
    level: ServiceLevel = field(default_factory=ServiceLevel)
    price: float | None = None
    search: int = 300

    @property
    def runs(self) -> int:
        """Steps that `carry_out` tells of."""
        return len(self.ways) * (len(self.rates) + len(self.users) + 1)

    def carry_out(self, tell: Callable[[int], None] = lambda _: None) -> Plan:
        """Simulate everything.

        Args:
            tell: the number of finished runs; the search for a largest rate counts as one.

        Raises:
            UsageError: as `fleet.open_loop`.
        """
        fewer = self.arrivals.first(self.search)
        rows, frontier, rates, done = list[Row](), list[Row](), dict[str, float](), 0
        for rate in self.rates:
            for way in self.ways:
                run = open_loop(way, self.arrivals.at_rate(rate), self.fleet)
                rows.append(row_of(way, run, price=self.price))
                tell(done := done + 1)
        for users in self.users:
            counted = self.arrivals.first(max(4 * users, min(self.search, 32 * users)))
            for way in self.ways:
                run = closed_loop(way, counted, self.fleet, users)
                frontier.append(row_of(way, run, users=users, price=self.price))
                tell(done := done + 1)
        for way in self.ways:
            rates[way.name] = max_rate(way, fewer, self.fleet, self.level)
            tell(done := done + 1)
        return Plan(tuple(rows), tuple(frontier), rates, self.level)


Line = list[tuple[float, float]]


def lines(rows: Sequence[Row]) -> dict[str, Line]:
    """Per way its frontier, (mean speed of a user, throughput), by rising numbers of users."""
    found: dict[str, Line] = {}
    for row in sorted(rows, key=lambda row: row.users):
        if row.mean_tokens_per_s_per_user is not None:
            point = (row.mean_tokens_per_s_per_user, row.tokens_per_s)
            found.setdefault(row.schedule, []).append(point)
    return found


def gains(rows: Sequence[Row], baseline: str) -> list[dict[str, Any]]:
    """What each way's points gain on a baseline (the paper: 60 to 85 % on MTP-1).

    Returns:
        Per row of another way: `schedule`, `users`; `speed`, its per-user speed over the
        baseline's at the same throughput; `throughput`, its throughput over the baseline's at the
        same per-user speed. None where the baseline does not get there.
    """
    theirs = lines(rows).get(baseline, [])
    found = []
    for row in rows:
        speed = row.mean_tokens_per_s_per_user
        if row.schedule == baseline or speed is None:
            continue
        same_throughput, same_speed = matched(theirs, row.tokens_per_s), best_at(theirs, speed)
        found.append(
            {
                "schedule": row.schedule,
                "users": row.users,
                "speed": None if same_throughput is None else speed / same_throughput,
                "throughput": None if same_speed is None else row.tokens_per_s / same_speed,
            }
        )
    return found
