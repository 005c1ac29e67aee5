"""Simulated replicas, against obvious reckonings and against the engine."""

from collections import deque
from dataclasses import replace

import numpy as np
import pytest

from dspark.engine.speculation.draft_scheduler import Scheduler
from dspark.engine.speculation.schedule import Schedule
from dspark.errors import UsageError
from dspark.scheduling.cost_table import CostTable
from dspark.simulation.acceptance import synthetic
from dspark.simulation.arrivals import Arrivals, Lengths, drawn_arrivals
from dspark.simulation.decisions import Decisions
from dspark.simulation.fleet import Fleet, closed_loop, open_loop
from dspark.simulation.jobs import Job
from dspark.simulation.machine import Machine
from dspark.simulation.server import Limits, Way


def arrivals(*requests):
    at, prompts, answers = zip(*requests, strict=True)
    return Arrivals(np.array(at, float), np.array(prompts), np.array(answers))


def obvious_plain(requests, places):
    """Plain decoding of the table of `costs`: (first, end) of each request in seconds."""
    waiting, running, now, found = deque(enumerate(requests)), [], 0.0, {}
    left, first = {}, {}
    while waiting or running:
        if not running and waiting[0][1][0] > now:
            now = waiting[0][1][0]
        opening = []
        while waiting and waiting[0][1][0] <= now and len(running) + len(opening) < places:
            opening.append(waiting.popleft())
        decoding = len(running)
        step = 9 + decoding / 4 if decoding else 0.0
        rows = sum(request[1] for _, request in opening)
        if rows:
            step += 12 + rows / 8 - (9.25 if decoding else 0.0)
        now += step / 1e3
        for i in list(running):
            left[i] -= 1
        for i, request in opening:
            first[i], left[i] = now, request[2] - 1
            running.append(i)
        for i in list(running):
            if left[i] == 0:
                running.remove(i)
                found[i] = (first[i], now)
    return [found[i] for i in range(len(requests))]


def test_plain_decoding_takes_what_the_table_says(costs):
    requests = [
        (0.0, 8, 5),
        (0.01, 16, 9),
        (0.02, 24, 3),
        (0.3, 8, 4),
        (0.301, 8, 1),
        (0.31, 40, 2),
    ]
    run = open_loop(Way("off", costs), arrivals(*requests), Fleet(Limits(2)))
    expected = obvious_plain(requests, 2)
    assert [(job.first_s, job.end_s) for job in run.jobs] == [
        pytest.approx(times) for times in expected
    ]


def test_fixed_blocks_take_what_the_table_says(costs, alternating):
    """Rounds that keep 4, 0, 2, 1: 5 + 1 + 3 + 2 tokens behind the first one.

    That the answer ends in the last of them nobody knows before.
    """
    way = Way("fixed", costs, alternating)
    (job, _) = open_loop(way, arrivals((0.0, 8, 12), (9.0, 8, 1)), Fleet(Limits(1))).jobs
    prompt, block, rest = 13.0, 10 + 5 / 4 + 2.0, 1.0
    assert 1e3 * job.first_s == pytest.approx(prompt)
    assert 1e3 * job.end_s == pytest.approx(prompt + 4 * (block + rest))


def test_a_long_prompt_is_read_in_parts(costs):
    limits = Limits(1, step_tokens=20)
    (job, _) = open_loop(Way("off", costs), arrivals((0.0, 50, 1), (9.0, 8, 1)), Fleet(limits)).jobs
    parts = [12 + rows / 8 for rows in (20, 20, 10)]
    assert 1e3 * job.end_s == pytest.approx(sum(parts))


@pytest.mark.parametrize("name", ["fixed", "prefix", "lagged", "lookahead", "auto"])
@pytest.mark.parametrize("cache_tokens", [None, 160])
def test_everybody_is_answered_in_full_under_every_schedule(costs, name, cache_tokens):
    way = Way(name, costs, synthetic([0.7, 0.5, 0.4, 0.3]), Schedule(name))
    requests = drawn_arrivals(40, Lengths(20, 1), Lengths(12, 1), seed=1).at_rate(30)
    run = open_loop(way, requests, Fleet(Limits(8, cache_tokens=cache_tokens), 2))
    assert [job.tokens for job in run.jobs] == requests.answer_N.tolist()
    assert all(job.sent_s < job.first_s <= job.end_s for job in run.jobs)
    counts = [server.counts for server in run.servers]
    assert sum(c.tokens for c in counts) == requests.answer_N.sum()
    assert sum(c.gained for c in counts) == requests.answer_N.sum() - 40
    assert all(server.in_flight == 0 and not server.has_work for server in run.servers)
    assert cache_tokens or not any(c.preemptions for c in counts)


def test_who_gives_way_is_read_again_and_still_answered_in_order(costs):
    """Two requests of 48 tokens outgrow 5 pages: the later one waits for the earlier one."""
    requests = arrivals((0.0, 20, 28), (0.001, 20, 28))
    tight = open_loop(Way("off", costs), requests, Fleet(Limits(2, cache_tokens=80)))
    roomy = open_loop(Way("off", costs), requests, Fleet(Limits(2)))
    assert tight.servers[0].counts.preemptions == 1
    assert tight.jobs[1].end_s > roomy.jobs[1].end_s + 0.1
    assert tight.jobs[0].end_s <= roomy.jobs[0].end_s


@pytest.mark.parametrize(
    ("router", "places"), [("least", [0, 1, 1, 0]), ("round-robin", [0, 1, 0, 1])]
)
def test_routers(costs, router, places):
    """The second request is short: the third and fourth find its replica empty, then not."""
    requests = arrivals((0.0, 8, 90), (0.001, 8, 1), (0.1, 8, 90), (0.101, 8, 1))
    seen = []
    fleet = Fleet(Limits(4), 2, router)
    route, servers = fleet.route(), fleet.servers(Way("off", costs))
    for i, (_, prompt, answer) in enumerate(
        zip(requests.at_s_N, requests.prompt_N, requests.answer_N, strict=True)
    ):
        job = Job(i, int(prompt), int(answer), 0.0)
        server = route(servers, job)
        server.send(job)
        seen.append(servers.index(server))
        if i == 1 and router == "least":
            server.in_flight -= 1  # it has ended
    assert seen == places


def test_more_replicas_wait_less(costs):
    requests = drawn_arrivals(200, Lengths(20), Lengths(20), seed=2).at_rate(60)

    def wait(replicas, router="least"):
        run = open_loop(Way("off", costs), requests, Fleet(Limits(2), replicas, router))
        return np.mean([job.first_s - job.sent_s for job in run.jobs])

    assert wait(1) > 2 * wait(2) > 4 * wait(4)
    assert wait(4, "least") < wait(4, "random")


def test_a_closed_loop_keeps_its_users_busy(costs):
    requests = drawn_arrivals(20, Lengths(8), Lengths(10))
    run = closed_loop(Way("off", costs), requests, Fleet(Limits(4)), 4)
    assert len(run.jobs) == 20
    for job in run.jobs[4:]:
        assert any(other.end_s == pytest.approx(job.sent_s) for other in run.jobs)
    # 4 users, 9 rounds of 10 ms behind a step that reads 4 prompts of 8.
    assert run.tokens / run.seconds == pytest.approx(4 * 10 / (0.016 + 9 * 0.01), rel=0.02)


def test_what_a_table_does_not_know_is_refused_or_guessed(costs):
    requests = drawn_arrivals(4, Lengths(8), Lengths(4))
    with pytest.raises(UsageError, match="--max-requests 9"):
        open_loop(Way("off", costs), requests, Fleet(Limits(9)))
    with pytest.raises(UsageError, match="cache"):
        open_loop(Way("off", costs), requests, Fleet(Limits(1, cache_tokens=4)))
    bare = Machine(CostTable(costs.points, costs.machine), 4)
    assert bare.plain_ms(2) == pytest.approx(10.5)
    assert bare.prompt_ms(9, 0, drafter=True) == pytest.approx(10.25 + 8 / 4)
    shared = tuple(replace(extra, prompt_ms=float(extra.requests)) for extra in costs.extras)
    dearer = Machine(replace(costs, extras=shared), 4)
    alone, beside = (dearer.prompt_ms(80, n, drafter=True) for n in (0, 3))
    assert (alone, beside) == (pytest.approx(22), pytest.approx(22 - 9.25 + 3))
    assert bare.rest_ms(3) == bare.schedule_ms(3) == 0
    assert Machine(costs, 4).verify_ms(8, 100) == pytest.approx(10 + 108 / 4)


def test_lagged_pays_for_drafts_only_where_they_are_worth_it(costs):
    """With a table in which rows are dear, whole blocks lose, and `lagged` does not."""
    dear = CostTable(
        tuple(type(p)(p.tokens, p.requests, 2.0 + 4.0 * p.tokens, 1.0, 0.5) for p in costs.points),
        costs.machine,
    )
    acceptance = synthetic([0.5, 0.25, 0.1, 0.05])
    requests = drawn_arrivals(60, Lengths(4), Lengths(60))

    def speed(name, schedule=None):
        way = Way(name, dear, acceptance if schedule else None, Schedule(schedule or "fixed"))
        run = closed_loop(way, requests, Fleet(Limits(8)), 8)
        return run.tokens / run.seconds

    assert speed("fixed", "fixed") < 0.8 * speed("off")
    assert speed("lagged", "lagged") > 0.95 * speed("off")


@pytest.mark.parametrize("name", ["lagged", "prefix"])
@pytest.mark.parametrize("share", [0.05, 0.3, 0.9])
def test_held_decisions_change_hardly_a_figure(costs, monkeypatch, share, name):
    """As against a scheduler that is asked in every round."""
    way = Way(name, costs, synthetic([0.8, 0.6, 0.5, 0.4]), Schedule(name))
    requests = drawn_arrivals(120, Lengths(20, 0.5), Lengths(60, 0.5)).at_rate(share * 16)
    decided, runs = [], []
    limits = Scheduler.limits

    def counted(*given):
        decided[-1] += 1
        return limits(*given)

    monkeypatch.setattr(Scheduler, "limits", counted)
    for hold in (Decisions._hold, lambda *_, **__: None):
        monkeypatch.setattr(Decisions, "_hold", hold)
        decided.append(0)
        runs.append(open_loop(way, requests, Fleet(Limits(8))))
    held, asked = (run.servers[0].counts for run in runs)
    assert decided[0] < 0.5 * decided[1]
    for figure, within in (("tokens", 0.02), ("steps", 0.02), ("busy_s", 0.01)):
        assert getattr(held, figure) == pytest.approx(getattr(asked, figure), rel=within)
    # A held round verifies whole blocks where the asked scheduler now and then cuts one: up to a
    # tenth more drafts, in hardly any more time.
    assert held.verified == pytest.approx(asked.verified, rel=0.1)
    spent = [np.mean([job.end_s - job.sent_s for job in run.jobs]) for run in runs]
    assert spent[0] == pytest.approx(spent[1], rel=0.05)  # queues make more of a hundredth
