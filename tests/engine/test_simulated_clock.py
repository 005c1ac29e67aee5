"""Schedules on a simulated clock: what a wrong table costs, and a useless drafter."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from dspark.engine.speculation.acceptance import Offer
from dspark.engine.speculation.draft_scheduler import QUIET, Scheduler
from dspark.engine.speculation.round_record import Spent
from dspark.engine.speculation.schedule import Schedule
from dspark.request import SamplingParams
from dspark.scheduling.cost_table import CostPoint, CostTable, MachineKey

NUM_DRAFTS = 7
MACHINE = MachineKey("test", 1, "float32", "tiny", "tiny")


class Machine:
    """Times of steps that are a line in rows, and of drafting.

    Args:
        step_ms: of a step without any row.
        row_ms: of a row.
        draft_ms: of a request's whole block; a single draft takes 40 % of it.
    """

    def __init__(self, step_ms, row_ms, draft_ms):
        self.step_ms, self.row_ms, self.each_ms = step_ms, row_ms, draft_ms

    def verify_ms(self, rows):
        return self.step_ms + self.row_ms * rows

    def draft_ms(self, requests, depth):
        return (2 + self.each_ms * requests) * (0.4 + 0.6 * (depth - 1) / (NUM_DRAFTS - 1))

    def table(self):
        points = [
            CostPoint(
                requests + drafts,
                requests,
                self.verify_ms(requests + drafts),
                self.draft_ms(requests, NUM_DRAFTS),
                0.4,
            )
            for requests in (1, 2, 4, 8, 16, 32)
            for drafts in (0, requests, 2 * requests, 4 * requests, 7 * requests)
        ]
        return CostTable(tuple(points), MACHINE)


FLAT = Machine(20.0, 0.05, 0.05)  # a step is nearly all dispatch, or the reading of weights
LINEAR = Machine(8.0, 3.0, 0.4)  # arithmetic alone


def decode(
    schedule,
    machine,
    requests,
    *,
    rounds=240,
    useful=True,
    noise=0.1,
    seed=0,
    left_ms=0.0,
    told=True,
):
    """Tokens per millisecond of so many requests that live 24 rounds each.

    A draft stays with the chance that its confidence says, or never where the drafter is useless;
    confidences differ between requests and wander. A round without drafts leaves so much for the
    next draft to catch up with, of which the scheduler is told, or not.
    """
    people, generator, clock = (np.random.default_rng((seed, i)) for i in range(3))
    ids = list(range(requests))
    means, spent_ms, tokens, left = people.normal(1.2, 1.0, requests), 0.0, 0, 0.0
    for number in range(rounds):
        pause = max(1, 24 // requests)
        slot, prompt_rows = number // pause % requests, 0
        if number and number % pause == 0:
            schedule.forget(ids[slot])
            ids[slot], means[slot], prompt_rows = 10_000 + number, people.normal(1.2, 1.0), 8
        active = [
            SimpleNamespace(
                request_id=i,
                drafts=True,
                ready=True,
                request=SimpleNamespace(
                    params=SamplingParams(8), mask=None, reproducible=False, learn=True
                ),
            )
            for i in ids
        ]
        limits = schedule.limits(active, [NUM_DRAFTS] * requests)
        depth = schedule.depth or NUM_DRAFTS
        lengths, draft_ms = [0] * requests, 0.0
        logits = generator.normal(means[:, None], 0.7, (requests, NUM_DRAFTS))
        if max(limits):
            offer = Offer(
                requests, depth, logits[:, :depth] if schedule.reads_confidences else None
            )
            lengths = schedule.lengths(active, limits, offer)
            draft_ms = machine.draft_ms(requests, depth) * clock.lognormal(0, noise) + left
        catch_up_ms, left = (left, 0.0) if draft_ms else (0.0, left + left_ms)
        stays = generator.random(logits.shape) < useful / (1 + np.exp(-logits))
        runs = np.logical_and.accumulate(stays, axis=1).sum(axis=1)
        accepted = [int(min(run, length)) for run, length in zip(runs, lengths, strict=True)]
        rows = requests + sum(lengths)
        verify_ms = machine.verify_ms(rows + prompt_rows) * clock.lognormal(0, noise)
        drafts = SimpleNamespace(lengths=lengths, proposed=limits)
        spent = Spent(rows + prompt_rows, draft_ms, 0.0, verify_ms, catch_up_ms * told)
        schedule.learn(active, drafts, accepted, spent)
        spent_ms += draft_ms + verify_ms
        tokens += requests + sum(accepted)
    return tokens / spent_ms


def made(name, costs=None):
    return Scheduler(Schedule(name), "block", NUM_DRAFTS, None, costs)


def best(machine, requests, **options):
    """Of plain decoding and of fixed blocks."""
    fixed = decode(made("fixed"), machine, requests, **options)
    plain = made("fixed")
    plain.limits = lambda _requests, most: [0] * len(most)
    return max(fixed, decode(plain, machine, requests, **options))


@pytest.mark.parametrize("requests", [1, 8, 32])
@pytest.mark.parametrize(
    ("machine", "table"),
    [
        (FLAT, FLAT),
        (LINEAR, LINEAR),
        (FLAT, Machine(10.0, 1.0, 0.05)),  # rows are said to be dear
        (LINEAR, Machine(60.0, 0.4, 0.2)),  # rows are said to be cheap
        (FLAT, Machine(60.0, 0.15, 0.15)),  # measured on a busy machine
    ],
)
def test_lagged_is_hardly_below_the_best_even_with_a_wrong_table(machine, table, requests):
    ours = decode(made("lagged", table.table()), machine, requests)
    assert ours > 0.97 * best(machine, requests)


def test_without_corrections_a_wrong_table_costs_much():
    """The control: what the rounds tell is what mends it."""
    believer = made("lagged", Machine(10.0, 1.0, 0.05).table())
    believer.learn_times = lambda *_: None
    believer._protection.allows = lambda *_, **__: True
    ours = decode(believer, FLAT, 32)
    assert ours < 0.9 * best(FLAT, 32)


class Cold(Machine):
    """Its first draft takes as long as 15 steps: weights are packed, kernels are built."""

    drafts = 0

    def draft_ms(self, requests, depth):
        self.drafts += 1
        return super().draft_ms(requests, depth) + (300.0 if self.drafts == 1 else 0.0)


@pytest.mark.parametrize("name", ["auto", "lagged"])
def test_what_the_first_draft_builds_is_not_held_against_drafting(name):
    cold = Cold(20.0, 0.05, 0.05)
    costs = None if name == "auto" else FLAT.table()
    ours = decode(made(name, costs), cold, 1)
    warm = decode(made(name, costs), FLAT, 1)
    assert cold.drafts > 100
    assert ours > 0.93 * warm  # 300 ms of some 5,300


def test_what_a_rest_leaves_to_catch_up_with_does_not_make_drafts_seem_dear():
    """With a useless drafter, which rests for long; the control is a scheduler that is not told."""
    scales = []
    for told in (True, False):
        schedule = made("lagged", LINEAR.table())
        decode(schedule, LINEAR, 1, rounds=1500, useful=False, left_ms=0.5, told=told)
        times = schedule._foresight.times("greedy")
        scales.append(times.draft_ms(1, 1) / LINEAR.draft_ms(1, 1))
    assert scales[0] == pytest.approx(1.0, abs=0.1)
    assert scales[1] > 1.2


@pytest.mark.parametrize("name", ["auto", "lagged"])
@pytest.mark.parametrize("machine", [FLAT, LINEAR])
@pytest.mark.parametrize("requests", [1, 12])
def test_a_useless_drafter_costs_hardly_anything(name, machine, requests):
    """Its confidences promise as much as ever."""
    costs = None if name == "auto" else machine.table()
    options = {"useful": False, "rounds": 600}
    ours = decode(made(name, costs), machine, requests, **options)
    assert ours > 0.97 * best(machine, requests, **options)


@pytest.mark.parametrize("machine", [FLAT, LINEAR])
@pytest.mark.parametrize("requests", [1, 12])
def test_control_without_protection_a_useless_drafter_costs_more(machine, requests):
    """The cheapest of these, one request on the flat machine, drafts for 2.4 ms beside 20.1."""
    options = {"useful": False, "rounds": 120}
    unprotected = decode(made("fixed"), machine, requests, **options)
    assert unprotected < 0.93 * best(machine, requests, **options)


@pytest.mark.parametrize("machine", [FLAT, LINEAR])
@pytest.mark.parametrize("requests", [4, 16, 32])
def test_finding_out_costs_a_few_rounds_at_most(machine, requests):
    """Several requests show at once what one shows in many rounds, by a draft each."""
    options = {"useful": False, "rounds": 100}
    plain = best(machine, requests, **options)
    assert decode(made("auto"), machine, requests, **options) > 0.95 * plain


@pytest.mark.parametrize("learns", [True, False])
def test_who_learns_sees_whole_blocks_where_tries_are_shallow(learns):
    """A calibration of block verification learns from rounds alone that verify all drafts."""
    schedule, shortest = made("auto"), []
    schedule.learns = learns
    lengths = schedule.lengths

    def spy(requests, limits, offer):
        found = lengths(requests, limits, offer)
        shortest.append(min(found))
        return found

    schedule.lengths = spy
    decode(schedule, Machine(20.0, 2.0, 0.1), 16, rounds=400)
    assert np.mean(shortest) < 3
    assert (NUM_DRAFTS in shortest) == learns


def test_control_whole_blocks_as_tries_cost_more():
    options = {"useful": False, "rounds": 100}
    careless = made("auto")
    careless._protection.depth = lambda _requests: None
    plain = best(LINEAR, 16, **options)
    assert decode(careless, LINEAR, 16, **options) < 0.92 * plain


@pytest.mark.parametrize("requests", [1, 16])
def test_auto_drafts_where_that_is_faster(requests):
    ours = decode(made("auto"), FLAT, requests)
    assert ours > 0.97 * best(FLAT, requests)


@pytest.mark.parametrize(("machine", "unasked"), [(FLAT, True), (LINEAR, False)])
def test_whole_blocks_that_are_best_for_long_are_verified_unasked(machine, unasked):
    """One user's rounds, beside which deciding weighs most.

    Where rows are dear, whole blocks are best for long only in requests of rare luck.
    """
    schedule, seen = made("lagged", machine.table()), []
    lengths = schedule.lengths

    def spy(*args):
        found = lengths(*args)
        seen.append((schedule.reads_confidences, found))
        return found

    schedule.lengths = spy
    decode(schedule, machine, 1)
    blind = [found for reads, found in seen if not reads]
    assert len(blind) > len(seen) / 2 if unasked else len(blind) < len(seen) / 4
    assert all(found == [NUM_DRAFTS] for found in blind)


def drafting_rounds(schedule, requests, *, sleeps, rounds=1200):
    """Rounds that draft for the same requests with a drafter that is always wrong; slept ones."""
    active = [
        SimpleNamespace(
            request_id=i,
            drafts=True,
            ready=True,
            request=SimpleNamespace(
                params=SamplingParams(8), mask=None, reproducible=False, learn=False
            ),
        )
        for i in range(requests)
    ]
    company, drafted, slept = object(), [], 0
    for number in range(rounds):
        if sleeps and schedule.sleeps(company):
            slept += 1
            continue
        limits, lengths, draft_ms = schedule.limits(active, [NUM_DRAFTS] * requests), None, 0.0
        lengths = [0] * requests
        if max(limits):
            depth = schedule.depth or NUM_DRAFTS
            logits = np.full((requests, depth), -2.0)
            offer = Offer(requests, depth, logits if schedule.reads_confidences else None)
            lengths = schedule.lengths(active, limits, offer)
            draft_ms = LINEAR.draft_ms(requests, depth)
            drafted.append(number)
        rows = requests + sum(lengths)
        spent = Spent(rows, draft_ms, 0.0, LINEAR.verify_ms(rows))
        drafts = SimpleNamespace(lengths=lengths, proposed=limits)
        schedule.learn(active, drafts, [0] * requests, spent)
    return drafted, slept


@pytest.mark.parametrize("requests", [1, 8])
@pytest.mark.parametrize("name", ["auto", "lagged"])
def test_rounds_that_are_slept_through_leave_tries_where_they_are(name, requests):
    costs = LINEAR.table() if name == "lagged" else None
    asked, none = drafting_rounds(made(name, costs), requests, sleeps=False)
    awake, slept = drafting_rounds(made(name, costs), requests, sleeps=True)
    assert (none, len(awake)) == (0, len(asked))
    # What plain rounds take is learned from fewer of them, so a pause may end a little elsewhere.
    assert np.abs(np.subtract(awake, asked)).max() <= QUIET
    assert slept > 0.7 * 1200


def test_another_company_wakes_the_scheduler():
    schedule = made("auto")
    number = 400
    drafting_rounds(schedule, 1, sleeps=True, rounds=number)
    assert schedule.asleep
    assert not schedule.sleeps(object())
    assert not schedule.asleep
