"""Capacity plans: percentiles, the rate within a service level, published figures."""

import math

import numpy as np
import pytest

from dspark.engine.speculation.schedule import Schedule
from dspark.scheduling.cost_table import CostPoint, CostTable, MachineKey, PromptCost
from dspark.simulation.acceptance import synthetic
from dspark.simulation.arrivals import Lengths, drawn_arrivals
from dspark.simulation.fleet import Fleet, Run, closed_loop, open_loop
from dspark.simulation.jobs import Job
from dspark.simulation.planning import ServiceLevel, Study, gains, max_rate, row_of
from dspark.simulation.server import Limits, Server, Way


def a_run(costs, waits, speeds, seconds=100.0):
    """Requests of 11 tokens that waited so long and then went so fast."""
    jobs = []
    for i, (wait, speed) in enumerate(zip(waits, speeds, strict=True)):
        jobs.append(Job(i, 1, 11, float(i), None, i + wait, i + wait + 10 / speed, 11))
    server = Server(Way("off", costs), Limits(1))
    server.counts.tokens = 11 * len(jobs)
    return Run(tuple(jobs), (server,), seconds, 11 * len(jobs))


def test_percentiles_of_times_are_upper_and_of_speeds_lower(costs):
    run = a_run(costs, np.arange(101) / 1e3, 100 + np.arange(101))
    row = row_of(Way("off", costs), run, price=3.6)
    assert list(row.ttft_ms.values()) == pytest.approx([50, 95, 99])
    assert list(row.tokens_per_s_per_user.values()) == pytest.approx([150, 105, 101])
    assert row.tokens_per_s == pytest.approx(11 * 101 / 100)
    assert row.cost_per_million_tokens == pytest.approx(1000 / row.tokens_per_s)
    assert ServiceLevel(95.1, 104.9).met(run)
    assert not ServiceLevel(94.9).met(run)
    assert not ServiceLevel(95.1, 105.1).met(run)


def test_the_largest_rate_is_where_the_service_level_breaks(costs):
    way, fleet = Way("off", costs), Fleet(Limits(4))
    requests = drawn_arrivals(300, Lengths(16), Lengths(10), seed=5)
    level = ServiceLevel(ttft_ms=60)
    found = max_rate(way, requests, fleet, level)
    assert level.met(open_loop(way, requests.at_rate(found), fleet))
    assert not level.met(open_loop(way, requests.at_rate(1.1 * found), fleet))
    assert max_rate(way, requests, fleet, ServiceLevel(ttft_ms=0.1)) == 0
    twice = max_rate(way, requests, Fleet(Limits(4), 2), level)
    assert twice > 2 * found  # and more, since who waits is sent where nobody does


def test_a_study_does_what_it_counts(costs):
    ways = (Way("off", costs), Way("lagged", costs, synthetic([0.7, 0.5]), Schedule("lagged")))
    requests = drawn_arrivals(30, Lengths(8), Lengths(4))
    study = Study(ways, requests, Fleet(Limits(4)), (5.0, 10.0), (1, 4))
    told = []
    plan = study.carry_out(told.append)
    assert told == list(range(1, study.runs + 1))
    assert [(row.rate, row.schedule) for row in plan.rows] == [
        (pytest.approx(rate), name) for rate in (5.0, 10.0) for name in ("off", "lagged")
    ]
    assert [(row.users, row.schedule) for row in plan.frontier] == [
        (users, name) for users in (1.0, 4.0) for name in ("off", "lagged")
    ]
    assert set(plan.max_rate) == {"off", "lagged"}
    again = Study(ways, requests, Fleet(Limits(4)), (5.0, 10.0), (1, 4)).carry_out()
    assert again == plan


def test_gains_are_taken_at_equal_throughput_and_at_equal_speed(costs):
    def rows(name, points):
        found = []
        for users, speed, throughput in points:
            run = a_run(costs, [0.1] * 5, [speed] * 5, seconds=55 / throughput)
            found.append(row_of(Way(name, costs), run, users=users))
        return found

    found = gains(rows("mtp1", [(1, 40, 40), (2, 20, 80)]) + rows("x", [(2, 60, 60)]), "mtp1")
    assert found == [
        {"schedule": "x", "users": 2.0, "speed": pytest.approx(2.0), "throughput": None}
    ]


# DeepSeek-V4 on 8 x MI355X, 7 drafts: tokens/s at 4, 32, 64 and 256 users, as published for vLLM.
USERS = (4, 32, 64, 256)
PLAIN, FIXED, ADAPTIVE = (
    (382, 2393, 4095, 8879),
    (970, 4756, 6712, 7852),
    (902, 4501, 7144, 13325),
)


def test_published_figures_of_another_engine_in_shape():
    """Plain and fixed columns make the table; the adaptive column is then what is foretold.

    Neither survivals nor the cost of drafting are published: an accepted length of 3.4, falling
    geometrically, and 1 ms are assumed.
    """
    length, draft_ms = 3.4, 1.0
    stays = next(p / 1e4 for p in range(10_000) if sum((p / 1e4) ** k for k in range(8)) > length)
    points = []
    for users, plain, fixed in zip(USERS, PLAIN, FIXED, strict=True):
        plain_ms, block_ms = 1e3 * users / plain, 1e3 * users * length / fixed - draft_ms
        points.append(CostPoint(users, users, plain_ms, draft_ms))
        points.append(CostPoint(8 * users, users, max(block_ms, plain_ms), draft_ms))
    free = (PromptCost(1, 1.0), PromptCost(8192, 1.0))  # answers alone were timed
    table = CostTable(tuple(points), MachineKey("MI355X", 1, "fp8", "v4", "v4"), free)
    acceptance = synthetic([stays**k for k in range(1, 8)])
    ways = (
        Way("off", table),
        Way("fixed", table, acceptance),
        Way("lagged", table, acceptance, Schedule("lagged")),
    )
    for users, *published in zip(USERS, PLAIN, FIXED, ADAPTIVE, strict=True):
        requests = drawn_arrivals(2 * users, Lengths(1), Lengths(64))
        runs = [closed_loop(w, requests, Fleet(Limits(users, 8192)), users) for w in ways]
        plain, fixed, lagged = (run.tokens / run.seconds for run in runs)
        for ours, theirs in zip((plain, fixed, lagged), published, strict=True):
            assert abs(math.log(ours / theirs)) < math.log(1.2), (users, ours, theirs)
        assert lagged > 0.97 * max(plain, fixed)
        assert (fixed < plain) == (users == 256)
        if users >= 64:
            assert lagged > 1.05 * max(plain, fixed)
