"""Protection of plain decoding on simulated clocks: what drafting may lose."""

from __future__ import annotations

import numpy as np
import pytest

from dspark.scheduling.protection import FIRST, MOST, RARE, SHARE, TRY, Pace, Protection
from dspark.scheduling.step_times import StepTime

NUM_DRAFTS = 7


def plain_ms(requests, prompt_rows=0):
    return 20.0 + 2.0 * requests + 1.0 * prompt_rows


def play(
    protection,
    accepted,
    *,
    count,
    requests=4,
    dearer=1.0,
    slower=None,
    noise=0.0,
    seed=0,
    pace=None,
):
    """Rounds of drafts of which each request keeps `accepted(round, generator)`.

    Args:
        dearer: what a drafting round takes, in plain ones, with four rows of prompts now and then.
        slower: factor of all times by the number of the round.
        pace: evens the times that the protection is told.

    Returns:
        (ms of every round, its tokens, whether it drafted).
    """
    generator = np.random.default_rng(seed)
    spent, tokens, drafted = [], [], []
    for number in range(count):
        now = requests(number) if callable(requests) else requests
        drafts = protection.allows(now)
        prompt_rows = 4 if number % 5 == 2 else 0
        kept = [accepted(number, generator) if drafts else 0 for _ in range(now)]
        ms = plain_ms(now, prompt_rows) + (dearer - 1) * plain_ms(now) * drafts
        ms *= (slower(number) if slower else 1.0) * generator.lognormal(0, noise)
        share = min(0.3, (dearer - 1) / dearer / 2) if drafts else 0.0
        seen = StepTime(
            now,
            NUM_DRAFTS * now * drafts,
            prompt_rows,
            NUM_DRAFTS * drafts,
            share * ms,
            (1 - share) * ms,
            now + sum(kept),
        )
        protection.learn(pace.even(seen) if pace else seen)
        spent.append(ms)
        tokens.append(seen.tokens)
        drafted.append(drafts)
    return np.array(spent), np.array(tokens), np.array(drafted)


def over_plain(spent, tokens, requests=4):
    """Throughput over that of plain rounds, prompts read in the same time."""
    rows = 4 * np.mean(np.arange(len(spent)) % 5 == 2)
    plain = requests / (plain_ms(requests) + rows)
    return tokens.sum() / spent.sum() / plain


@pytest.mark.parametrize("dearer", [1.1, 2.0, 12.0])
@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_a_drafter_that_is_always_wrong_costs_a_few_rounds(dearer, noise):
    protection = Protection()
    spent, tokens, drafted = play(protection, lambda *_: 0, count=3000, dearer=dearer, noise=noise)
    assert drafted[:200].sum() < 200
    assert over_plain(spent[200:], tokens[200:]) > 0.97 * np.exp(-(noise**2) / 2)
    lost = spent[:200].sum() - tokens[:200].sum() / 4 * plain_ms(4)
    # In plain rounds: the credit, a look before giving up, tries' share of the time, and the round
    # in which the credit ends. Prompts take .8 ms a round.
    bound = FIRST + TRY / 2 + 200 * SHARE + dearer + 40 * noise
    assert lost < bound * plain_ms(4) + 200 * 0.8


def test_probes_become_exponentially_rarer():
    _, _, drafted = play(Protection(), lambda *_: 0, count=20_000, dearer=2.0)
    at = np.flatnonzero(drafted)
    pauses = np.diff(at)[np.diff(at) > 20]
    assert len(pauses) >= 6
    assert (np.diff(pauses[:4]) > 0).all()
    assert pauses[4:].min() >= 8 * pauses[0]


def test_a_good_drafter_drafts_nearly_always():
    for dearer, stay in ((1.5, 0.8), (1.4, 0.6), (3.0, 0.9)):
        kept = lambda _, g, stay=stay: min(int(g.geometric(1 - stay)) - 1, NUM_DRAFTS)  # noqa: E731
        _, _, drafted = play(Protection(), kept, count=2000, dearer=dearer, noise=0.1)
        assert drafted.mean() > 0.98
        assert not drafted.all()  # plain rounds are looked at now and then


def test_plain_rounds_are_looked_at_the_more_rarely_the_more_is_gained():
    _, _, drafted = play(Protection(), lambda *_: 3, count=2000, dearer=1.5)
    plain = np.flatnonzero(~drafted)
    assert plain[0] == 0
    assert 400 < np.diff(plain).max() <= RARE + 1
    _, _, drafted = play(Protection(), lambda *_: 0, count=500, dearer=1.0)  # neither gains
    assert 0.1 < (~drafted).mean() < 0.4


def test_right_only_at_the_start_is_found_out():
    """A thousand rounds of gains buy no more than a few of losses."""
    kept = lambda number, _: 5 if number < 1000 else 0  # noqa: E731
    spent, tokens, drafted = play(Protection(), kept, count=4000, dearer=2.0)
    assert drafted[:1000].mean() > 0.98
    # What gains have paid in, a look before giving up, and two tries with the rounds in which they
    # end; plain rounds are taken for up to a seventh dearer than they are, since some that were
    # looked at read prompts too.
    assert drafted[1000:1200].sum() <= (MOST + TRY / 2 + 2 * (TRY + 1)) * 8 / 7
    assert over_plain(spent[1200:], tokens[1200:]) > 0.97


def test_a_drafter_that_becomes_good_is_found_again():
    kept = lambda number, _: 0 if number < 500 else 5  # noqa: E731
    _, _, drafted = play(Protection(), kept, count=4000, dearer=2.0)
    assert drafted[:500].mean() < 0.1
    assert drafted[-500:].mean() > 0.98


def test_a_machine_that_becomes_slower_for_all_is_no_reason_to_stop():
    slower = lambda number: 2.5 if number >= 700 else 1.0  # noqa: E731
    _, _, drafted = play(Protection(), lambda *_: 3, count=2000, dearer=1.5, slower=slower)
    assert drafted[700:].mean() > 0.95


def test_loads_have_accounts_of_their_own():
    """Alone drafting doubles the speed, in company it loses: either is found out."""
    protection = Protection()

    def run(requests, dearer, count):
        return play(protection, lambda *_: 1, count=count, requests=requests, dearer=dearer)[2]

    assert run(1, 1.1, 300).mean() > 0.95
    assert run(16, 3.0, 300).mean() < 0.2
    assert run(1, 1.1, 300).mean() > 0.95
    assert run(16, 3.0, 300).mean() < 0.05


def test_rounds_without_requests_say_nothing():
    protection = Protection()
    protection.learn(StepTime(0, 0, 500, 0, 0.0, 900.0, 0))
    assert not protection.allows(1)  # still the first round of all
    protection.learn(StepTime(1, 0, 0, 0, 0.0, 20.0, 1))
    assert protection.allows(1)
    assert not protection.allows(2)  # the first at this load


def test_the_same_times_make_the_same_decisions():
    first = play(Protection(), lambda n, _: n % 3, count=500, dearer=1.9)[2]
    again = play(Protection(), lambda n, _: n % 3, count=500, dearer=1.9)[2]
    assert (first == again).all()


def restless(seed):
    """Factors of a machine that becomes faster and slower by a fifth within seconds."""
    generator, level, found = np.random.default_rng(seed), 0.0, []
    for _ in range(3000):
        level = 0.98 * level + generator.normal(0, 0.2 * (1 - 0.98**2) ** 0.5)
        found.append(np.exp(level) * (6.0 if generator.random() < 0.01 else 1.0))
    return found.__getitem__


def test_a_restless_machine_keeps_no_good_drafter_from_drafting():
    kept = lambda _, g: min(int(g.geometric(0.4)) - 1, NUM_DRAFTS)  # noqa: E731
    shares = {True: [], False: []}
    for seed in range(6):
        for evened, found in shares.items():
            options = {"dearer": 2.0, "slower": restless(seed), "noise": 0.1, "seed": seed}
            pace = Pace() if evened else None
            _, _, drafted = play(Protection(), kept, count=3000, requests=1, pace=pace, **options)
            found.append(drafted.mean())
    assert np.mean(shares[True]) > 0.8
    assert np.mean(shares[False]) < np.mean(shares[True]) - 0.1  # the control: times as they come


def test_scatter_does_not_let_the_pace_drift():
    kept = lambda _, g: min(int(g.geometric(0.4)) - 1, NUM_DRAFTS)  # noqa: E731
    pace, options = Pace(), {"dearer": 2.0, "noise": 0.2, "requests": 1}
    _, _, drafted = play(Protection(), kept, count=40_000, pace=pace, **options)
    assert 0.5 < pace.value < 2
    assert drafted[-5000:].mean() > 0.6


def test_the_pace_follows_the_machine_and_not_the_shape_of_a_step():
    pace = Pace()
    for number in range(200):
        drafts = 7 * (number % 3 > 0)
        factor = 1.0 if number < 100 else 1.6
        step = StepTime(1, drafts, 0, drafts, factor * drafts, factor * (20.0 + 3 * drafts), 1)
        seen = pace.even(step)
        if number == 99:
            assert pace.value == pytest.approx(1.0)
            assert seen == step
    assert pace.value == pytest.approx(1.6, rel=0.05)
    assert seen.total_ms == pytest.approx(step.total_ms / 1.6, rel=0.06)


def test_the_pace_takes_no_slow_drafter_for_a_slow_machine():
    pace = Pace()
    for draft_ms in (5.0, 500.0) * 20:
        seen = pace.even(StepTime(1, 7, 0, 7, draft_ms, 30.0, 1))
        assert (pace.value, seen.draft_ms) == (1.0, draft_ms)


def test_a_single_stall_counts_for_little():
    pace = Pace()
    for verify_ms in (30.0,) * 20 + (3000.0,):
        seen = pace.even(StepTime(1, 7, 0, 7, 5.0, verify_ms, 1))
    assert seen.verify_ms < 2 * 30.0
    assert pace.value < 1.1


def test_prompts_beside_a_few_rounds_pay_for_no_useless_drafter():
    """What prompts take is known badly; the rounds without them tell."""
    protection, drafted = Protection(), []
    for number in range(600):
        now = protection.allows(1)
        prompt_rows = 8 if number % 24 == 23 else 0
        step_ms = 20.0 + 0.35 * now + 0.05 * prompt_rows
        protection.learn(StepTime(1, 7 * now, prompt_rows, 7 * now, 2.0 * now, step_ms, 1))
        drafted.append(now)
    assert sum(drafted[200:]) < 0.15 * 400


def test_catching_up_is_paid_for_but_says_nothing_of_drafting():
    """What was left for the drafter is read once, whatever the draft is worth."""
    gains, credits_ = [], []
    for catch_up_ms in (0.0, 33.0):
        protection = Protection()
        for _ in range(3):
            protection.learn(StepTime(1, 0, 0, 0, 0.0, plain_ms(1), 1))
        seen = StepTime(1, 1, 0, 1, 3.0, plain_ms(1), 2, catch_up_ms)
        gains.append(protection.learn(Pace().even(seen)))
        credits_.append(protection._account(1).credit)
    assert gains[0] == gains[1] == pytest.approx(1 - 3 / plain_ms(1))
    assert credits_[0] - credits_[1] == pytest.approx(33 / plain_ms(1))
