"""A step's rows are divided so that nobody waits for more than one budget."""

from __future__ import annotations

import random

import pytest

from dspark.engine.requests.sequence import ActiveRequest
from dspark.engine.requests.step_plan import fair_shares, plan_step
from dspark.request import Request, SamplingParams


def active(number, prompt, *, cached=0, output=0, new=50):
    request = Request(tuple(range(1, prompt + 1)), SamplingParams(new))
    made = ActiveRequest(number, request, "", frozenset(), 1000, None)
    made.tokens += [7] * output
    made.cached = cached
    return made


def slow_shares(wants, total):
    """One unit at a time, round and round."""
    shares, left = [0] * len(wants), total
    while left and any(s < w for s, w in zip(shares, wants, strict=True)):
        for i, want in enumerate(wants):
            if left and shares[i] < want:
                shares[i] += 1
                left -= 1
    return shares


def test_shares_equal_those_dealt_out_one_by_one_but_for_the_remainder():
    generator = random.Random(0)
    for _ in range(500):
        wants = [generator.randint(0, 30) for _ in range(generator.randint(1, 6))]
        total = generator.randint(0, 90)
        mine, slow = fair_shares(wants, total), slow_shares(wants, total)
        assert sum(mine) == sum(slow) == min(total, sum(wants))
        assert all(s <= w for s, w in zip(mine, wants, strict=True))
        assert all(abs(a - b) < len(wants) for a, b in zip(mine, slow, strict=True))


def test_who_may_draft_comes_first_and_prompts_share_what_is_left():
    ready = active(0, 10, cached=12, output=3)
    short, long = active(1, 5), active(2, 400)
    plan = plan_step([long, ready, short], 100, num_drafts=7)
    assert plan.judged == (ready, short)
    assert [(c.request, c.count) for c in plan.reading] == [(long, 100 - 8 - 5)]


def test_verification_is_never_cut_and_prompts_get_a_quarter():
    ready = [active(i, 4, cached=5, output=2) for i in range(40)]
    plan = plan_step([*ready, active(99, 400)], 64, num_drafts=7)
    assert len(plan.ready) == 40
    assert plan.reading[0].count == 16


@pytest.mark.parametrize("budget", [1, 2, 3])
def test_the_smallest_budget_still_reads(budget):
    plan = plan_step([active(0, 4, cached=5, output=2), active(1, 9)], budget)
    assert plan.reading[0].count >= 1


def test_a_request_that_was_read_again_drafts_in_the_next_round():
    """Its anchor must not be judged without drafts: the draws would be other ones."""
    resumed = active(0, 10, cached=0, output=6)
    assert (resumed.unread, resumed.ready) == (15, False)
    plan = plan_step([resumed], 100)
    assert (plan.judged, plan.reading[0].count) == ((), 15)
    resumed.cached = 15
    assert resumed.ready
    assert plan_step([resumed], 100).ready == (resumed,)
