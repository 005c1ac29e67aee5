"""Schedules at work in the engine: what they verify, what they learn, and that outputs stay."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from dspark.engine.engine import Engine
from dspark.engine.speculation.acceptance import Offer
from dspark.engine.speculation.draft_scheduler import Scheduler
from dspark.engine.speculation.schedule import Schedule
from dspark.errors import UsageError
from dspark.request import Request, SamplingParams
from dspark.scheduling.calibration import Rounds
from dspark.scheduling.calibration_file import Calibration, calibrate
from dspark.scheduling.cost_table import CostPoint, CostTable, MachineKey
from dspark.scheduling.survival import confidence

MACHINE = MachineKey("test", 1, "float32", "tiny", "tiny")


def table(verify_ms, *, draft_ms=0.1, requests=(1, 2, 4), most=32):
    """Costs of steps by a function of tokens."""
    points = [
        CostPoint(tokens, count, verify_ms(tokens), draft_ms)
        for count in requests
        for tokens in range(count, most + 1)
    ]
    return CostTable(tuple(points), MACHINE)


def flat(_tokens):
    return 10.0


def steep(tokens):
    return float(tokens)


def staircase(tokens):
    return 10.0 * (1 + (tokens - 1) // 4)


class OfTable(Scheduler):
    """Believes its made-up table, whatever rounds really take."""

    def __init__(self, *args):
        super().__init__(*args)
        self._protection = SimpleNamespace(
            allows=lambda _requests, tries: True,
            depth=lambda _requests: None,
            rest=lambda _requests: 0.0,
            refreshes=False,
        )

    def learn_times(self, *_):
        pass


def scheduler(name, costs, *, verifier="block", num_drafts=5, calibration=None):
    return OfTable(Schedule(name), verifier, num_drafts, calibration, costs)


def decode(target, drafter, requests, schedule, *, verifier="block", records=None, at_once=2):
    engine = Engine(
        target,
        drafter,
        max_requests=at_once,
        max_length=96,
        verifier=verifier,
        schedule=schedule,
        watch=None if records is None else records.append,
    )
    return engine.run(requests), engine


def prompts(tiny, count, **params):
    return [
        Request(tuple(tokens), SamplingParams(24, seed=i, **params))
        for i, tokens in enumerate(tiny.make_prompts(count, 64, seed=5))
    ]


@pytest.mark.parametrize("name", ["prefix", "lagged", "lookahead"])
@pytest.mark.parametrize("costs", [flat, steep, staircase])
@pytest.mark.parametrize("verifier", ["token", "block", "coupled"])
def test_greedy_output_is_that_of_plain_decoding(tiny, target, name, costs, verifier):
    requests = prompts(tiny, 5)
    plain, _ = decode(target, None, requests, None)
    drafter = tiny.make_drafter(target)
    schedule = scheduler(name, table(costs), verifier=verifier)
    outputs, _ = decode(target, drafter, requests, schedule, verifier=verifier)
    assert [o.token_ids for o in outputs] == [o.token_ids for o in plain]


@pytest.mark.parametrize("name", ["prefix", "lagged", "lookahead"])
def test_coupled_output_is_that_of_plain_decoding_at_any_temperature(tiny, target, name):
    requests = prompts(tiny, 5, temperature=1.0)
    plain, _ = decode(target, None, requests, None, verifier="coupled")
    drafter = tiny.make_drafter(target)
    schedule = scheduler(name, table(staircase), verifier="coupled")
    outputs, _ = decode(target, drafter, requests, schedule, verifier="coupled")
    assert [o.token_ids for o in outputs] == [o.token_ids for o in plain]


def test_flat_costs_verify_everything_and_steep_ones_little(tiny, target):
    drafter = tiny.TargetDrafter(target, spoil=4)
    requests = prompts(tiny, 4, temperature=1.0)
    verified = {}
    for costs in (flat, steep):
        outputs, _ = decode(target, drafter, requests, scheduler("lagged", table(costs)))
        verified[costs] = sum(o.stats.verified for o in outputs) / sum(
            o.stats.rounds for o in outputs
        )
    assert verified[flat] > 3 * verified[steep]


def test_drafting_stops_where_it_does_not_pay_and_is_tried_again(tiny, target):
    """Drafting costs as much as ten steps: off, but for the first rounds and the probes."""
    records = []
    schedule = scheduler("lagged", table(flat, draft_ms=100.0))
    requests = [Request((1, 2, 3), SamplingParams(90, temperature=1.0))]
    drafter = tiny.make_drafter(target)
    [output], _ = decode(target, drafter, requests, schedule, records=records)
    drafted = [i for i, record in enumerate(records) if sum(map(len, record.drafts))]
    assert output.stats.rounds > 20
    assert 2 <= len(drafted) < 5
    assert max(np.diff(drafted)) >= 32  # a probe after a pause


@pytest.mark.parametrize("at_once", [1, 2])
def test_an_answer_alone_that_ends_before_the_next_probe_is_plain_once_asked(tiny, target, at_once):
    schedule = scheduler("lagged", table(flat, draft_ms=100.0))
    requests = [
        Request((1, 2, 3 + i), SamplingParams(60, seed=i, temperature=1.0, ignore_eos=True))
        for i in range(16)
    ]
    records, plain, asked = [], set(), set()
    engine = Engine(
        target,
        tiny.make_drafter(target),
        max_requests=at_once,
        max_length=96,
        schedule=schedule,
        watch=records.append,
    )
    decide = schedule._switch.decide
    schedule._switch.decide = lambda gain: (
        asked.update(r.request_id for r in engine.roster.running) or decide(gain)
    )
    waiting, outputs = list(requests), []
    while waiting or engine.has_work:
        while waiting and len(engine.roster.running) < at_once:
            engine.add(waiting.pop(0))
            outputs += [e.output for e in engine.step() if e.output]
        outputs += [e.output for e in engine.step() if e.output]
        plain |= {r.request_id for r in engine.roster.running if r.plain}
    drafted = [i for i, record in enumerate(records) if any(record.drafts)]
    assert len(asked) >= 15  # one that ends where the next begins may share its turn
    if at_once == 1:
        assert len(plain) >= 10
        assert plain <= asked
        assert len(drafted) >= 5
        assert drafted[-1] > 400  # probes go on
    else:  # company may change what pays
        assert not plain


def test_the_last_of_a_group_is_asked_again(tiny, target):
    """Two requests do not pay and one does; the pause of two is longer than the last answer."""
    points = [
        CostPoint(tokens, count, 10.0, 10.0 if count == 1 else 1000.0)
        for count in (1, 2)
        for tokens in range(count, 33)
    ]
    records = []
    schedule = scheduler("lagged", CostTable(tuple(points), MACHINE))
    requests = [
        Request((1, 2, 3 + i), SamplingParams(tokens, ignore_eos=True))
        for i, tokens in enumerate((62, 85))
    ]
    drafter = tiny.TargetDrafter(target, spoil=4)
    decode(target, drafter, requests, schedule, records=records)
    drafted = {1: [], 2: []}
    for record in records:
        drafted[len(record.request_ids)].append(any(record.drafts))
    assert np.mean(drafted[2]) < 0.2
    assert np.mean(drafted[1]) > 0.6


def test_context_after_a_pause_is_whole(tiny, target):
    """A probe drafts what a drafter proposes that has just read the same tokens as a prompt."""
    drafter = tiny.make_drafter(target)
    records = []
    schedule = scheduler("lagged", table(flat, draft_ms=100.0))
    schedule._foresight.probe = lambda plan, _requests: replace(plan, depth=5, budget=5)
    prompt = (1, 2, 3)
    decode(target, drafter, [Request(prompt, SamplingParams(90))], schedule, records=records)
    committed, checked = list(prompt), 0
    for record in records:
        if record.drafts[0] and len(committed) > 40:
            fresh = []
            again = Request(tuple(committed[:-1]), SamplingParams(8))  # its answer: the anchor
            decode(target, drafter, [again], Schedule(), records=fresh)
            expected = next(r.drafts[0] for r in fresh if r.drafts[0])
            count = min(len(expected), len(record.drafts[0]))
            assert record.drafts[0][:count] == expected[:count]
            checked += count
        committed += record.committed[0]
    assert checked >= 3


def test_lagged_budget_knows_nothing_of_this_round():
    """Confidences of this round move drafts between requests, never the sum."""
    requests = [
        SimpleNamespace(
            request_id=i,
            drafts=True,
            ready=True,
            request=SimpleNamespace(params=SamplingParams(8, temperature=1), reproducible=False),
        )
        for i in range(2)
    ]
    lengths = []
    for logits in ([[3.0] * 5, [-3.0] * 5], [[-3.0] * 5, [3.0] * 5], [[0.0] * 5, [0.1] * 5]):
        schedule = scheduler("lagged", table(lambda tokens: 10.0 if tokens <= 8 else 1000.0))
        limits = schedule.limits(requests, [5, 5])
        assert limits == [5, 5]
        offer = Offer(2, 5, np.array(logits))
        lengths.append(schedule.lengths(requests, limits, offer))
    assert [sum(pair) for pair in lengths] == [6, 6, 6]
    assert lengths[0] == [5, 1]
    assert lengths[1] == [1, 5]


@pytest.mark.parametrize(("single_share", "depth"), [(1.0, 5), (0.2, 2)])
def test_blocks_are_no_deeper_than_pays(single_share, depth):
    """A step of 4 rows is cheap and drafting is dear: two drafts each, if fewer cost less."""
    points = [
        CostPoint(tokens, 2, 10.0 if tokens <= 6 else 1000.0, 20.0, single_share)
        for tokens in range(2, 13)
    ]
    requests = [
        SimpleNamespace(
            request_id=i,
            drafts=True,
            ready=True,
            request=SimpleNamespace(params=SamplingParams(8), reproducible=False),
        )
        for i in range(2)
    ]
    schedule = scheduler("lagged", CostTable(tuple(points), MACHINE))
    assert schedule.limits(requests, [5, 5]) == [depth, depth]
    assert schedule.depth == (None if depth == 5 else depth)
    logits = np.zeros((2, depth))
    assert sum(schedule.lengths(requests, [depth, depth], Offer(2, depth, logits))) == 4


def test_more_requests_than_were_measured_are_verified_in_full(tiny, target):
    requests = prompts(tiny, 4, temperature=1.0)
    drafter = tiny.make_drafter(target)
    schedule = scheduler("lagged", table(steep, requests=(1,)))
    records = []
    decode(target, drafter, requests, schedule, records=records, at_once=4)
    crowded = [r for r in records if sum(map(bool, r.drafts)) > 1]
    assert crowded
    assert all(r.lengths == tuple(map(len, r.drafts)) for r in crowded)


def test_a_schedule_that_weighs_costs_needs_a_table():
    with pytest.raises(UsageError, match="needs a cost table"):
        Scheduler(Schedule("lagged"), "block", 5)


def test_calibration_is_applied_to_its_own_temperature_class_only():
    generator = np.random.default_rng(0)
    logits_NK = generator.normal(1.0, 1.0, (4000, 5))
    stays = generator.random((4000, 5)) < confidence(logits_NK / 4)
    accepted_N = np.logical_and.accumulate(stays, axis=1).sum(axis=1)
    entry = calibrate(Rounds.of(logits_NK, accepted_N, np.full(4000, 5)), "block", "sampled")
    schedule = scheduler("lagged", table(flat), calibration=Calibration((entry,)))
    requests = [
        SimpleNamespace(
            request_id=i,
            drafts=True,
            ready=True,
            request=SimpleNamespace(params=SamplingParams(8, temperature=t), reproducible=False),
        )
        for i, t in enumerate((1.0, 0.0))
    ]
    schedule.limits(requests, [5, 5])
    schedule.lengths(requests, [5, 5], Offer(2, 5, np.full((2, 5), 2.0)))
    sampled, greedy = schedule.acceptance.survival_DK[:, 0]
    assert greedy == confidence(np.array([[2.0]]))[0, 0]
    assert sampled < 0.75 < greedy


def test_trees_take_the_calibration_of_the_engines_rule():
    """Though the token rule judges them: its own entry kept no more (docs/LOG.md)."""
    generator = np.random.default_rng(1)
    logits_NK = generator.normal(1.0, 1.0, (2000, 5))
    entries = {}
    for verifier, sharpness in (("block", 1.0), ("token", 0.25)):
        stays = generator.random((2000, 5)) < confidence(logits_NK * sharpness)
        accepted_N = np.logical_and.accumulate(stays, axis=1).sum(axis=1)
        rounds = Rounds.of(logits_NK, accepted_N, np.full(2000, 5))
        entries[verifier] = calibrate(rounds, verifier, "sampled")
    chains = scheduler("lagged", table(flat), calibration=Calibration(tuple(entries.values())))
    params = SamplingParams(8, temperature=1.0)
    request = SimpleNamespace(request=SimpleNamespace(params=params, reproducible=False))
    logits_1K = np.full((1, 5), 2.0)
    expected = entries["block"].scaling.apply(logits_1K)
    for which in (chains, chains.for_trees(9)):
        assert (which.acceptance.confidences([request], logits_1K) == expected).all()
    assert not np.allclose(expected, entries["token"].scaling.apply(logits_1K))


def test_margins_become_chances_as_rounds_teach_them(tiny, target):
    """Every draft of the target itself stays, whatever its margin: the estimator finds out."""
    drafter = tiny.HeadlessDrafter(64)
    schedule = scheduler("lagged", table(flat), verifier="token", num_drafts=drafter.block_size)
    before = schedule.acceptance.logistic.apply([0.5])
    decode(target, drafter, prompts(tiny, 6, temperature=1.0), schedule, verifier="token")
    assert schedule.acceptance.logistic.apply([0.5]) != before


def test_penalised_requests_teach_the_shared_estimator_nothing(tiny, target):
    drafter = tiny.HeadlessDrafter(64)
    schedule = scheduler("lagged", table(flat), verifier="token", num_drafts=drafter.block_size)
    before = schedule.acceptance.logistic.apply([0.5])
    requests = prompts(tiny, 4, temperature=1.0, repetition_penalty=1.3)
    decode(target, drafter, requests, schedule, verifier="token")
    assert schedule.acceptance.logistic.apply([0.5]) == before


def test_what_is_known_of_a_request_ends_with_it(tiny, target):
    drafter = tiny.make_drafter(target)
    schedule = scheduler("lagged", table(flat))
    decode(target, drafter, prompts(tiny, 5, temperature=1.0), schedule)
    assert len(schedule.acceptance.history) == 0


def test_a_watch_can_come_and_go(tiny, target):
    """What is watched, and whether confidences are asked for, changes no token."""
    drafter = tiny.make_drafter(target)
    requests = prompts(tiny, 3)
    alone, _ = decode(target, drafter, requests, Schedule())
    engine = Engine(target, drafter, max_length=tiny.max_context)
    numbers = [engine.add(request) for request in requests]
    records, outputs, step = [], {}, 0
    while engine.has_work:
        engine.watch((None, records.append)[step % 2], confidences=step % 4 == 1)
        before = len(records)
        outputs |= {e.request_id: e.output for e in engine.step() if e.output}
        assert len(records) - before == step % 2
        if step % 2:
            known = records[-1].confidence_logits_RK is not None
            assert known == (step % 4 == 1 and any(records[-1].drafts))
        step += 1
    assert [outputs[n].token_ids for n in numbers] == [output.token_ids for output in alone]
    for record in records:
        assert record.budget is None
        assert record.rows >= len(record.request_ids) + sum(record.lengths)


def test_a_record_says_where_each_request_stood(tiny, target):
    records = []
    drafter = tiny.make_drafter(target)
    outputs, _ = decode(target, drafter, prompts(tiny, 1), Schedule(), records=records)
    (request,) = prompts(tiny, 1)
    said = [request.prompt_ids[-1]]
    for number, record in enumerate(records):
        assert record.rounds == (number,)
        assert record.anchors == (said[-1],)
        said += record.committed[0]
    assert tuple(said[1 : 1 + len(outputs[0].token_ids)]) == outputs[0].token_ids


def test_a_lagged_budget_is_told(tiny, target):
    records = []
    drafter = tiny.make_drafter(target)
    decode(target, drafter, prompts(tiny, 4), scheduler("lagged", table(flat)), records=records)
    decided = [record for record in records if any(record.lengths)]
    assert decided
    for record in decided:
        assert sum(record.lengths) <= record.budget


def test_a_watcher_sees_every_round(tiny, target):
    drafter = tiny.make_drafter(target)
    records = []
    outputs, engine = decode(target, drafter, prompts(tiny, 3), Schedule(), records=records)
    rounds = sum(sum(map(bool, record.drafts)) for record in records)
    assert sum(sum(record.lengths) for record in records) == sum(o.stats.verified for o in outputs)
    assert rounds > 0
    unread = 0
    for record in records:
        if record.confidence_logits_RK is None:
            assert not any(record.drafts)
            continue
        for row, drafts in zip(record.confidence_logits_RK, record.drafts, strict=True):
            assert np.isfinite(row).all() or (np.isnan(row).all() and not drafts)
            unread += bool(np.isnan(row).all())
    assert unread == 1  # the third request, which joins while another drafts
    total = sum(r.draft_ms + r.schedule_ms + r.verify_ms for r in records)
    clock = engine.clock
    assert total == pytest.approx(
        clock.prefill_ms + clock.draft_ms + clock.schedule_ms + clock.verify_ms
    )
