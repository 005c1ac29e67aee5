"""What a seed promises: the same text, by `coupled` always, by token and block in any company."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from dspark.engine.engine import Engine
from dspark.engine.speculation.draft_scheduler import Scheduler
from dspark.engine.speculation.schedule import Schedule
from dspark.request import Request, SamplingParams
from dspark.scheduling.cost_table import CostPoint, CostTable, MachineKey

SETTINGS = {
    "off": {"schedule": Schedule("off")},
    "fixed": {"schedule": Schedule("fixed")},
    "threshold": {"schedule": Schedule("threshold", 0.5)},
}


@pytest.mark.parametrize("verifier", ["token", "block"])
@pytest.mark.parametrize(
    ("name", "schedule"),
    [*(("dspark", schedule) for schedule in SETTINGS), ("eagle3", "fixed"), ("mtp", "fixed")],
)
def test_a_seed_reproduces_in_any_company(tiny, target, name, schedule, verifier):
    if name == "dspark":
        drafter = tiny.make_drafter(target)
    else:
        drafter = tiny.make_eagle3(target, mtp=name == "mtp")
    options = {"verifier": verifier, **SETTINGS[schedule]}
    prompts = tiny.make_prompts(6, 64, seed=8)
    requests = tiny.make_requests(prompts, max_new_tokens=12, temperature=0.9, seed=50)
    alone = [tiny.decode(target, drafter, [r], max_requests=1, **options)[0] for r in requests]
    for batch in (2, 4):
        together = tiny.decode(target, drafter, requests, max_requests=batch, **options)
        assert tiny.token_ids(together) == tiny.token_ids(alone)
    backwards = tiny.decode(target, drafter, requests[::-1], max_requests=3, **options)
    assert tiny.token_ids(backwards)[::-1] == tiny.token_ids(alone)


def test_company_that_joins_late_and_asks_for_other_processors(tiny, target):
    drafter = tiny.MarkovDrafter(64)
    request = Request((4, 5, 6), SamplingParams(20, temperature=1.0, seed=3))
    [alone] = tiny.decode(target, drafter, [request])
    others = [
        SamplingParams(4, temperature=0.0),
        SamplingParams(9, temperature=0.7, top_k=5, presence_penalty=0.5, seed=1),
        SamplingParams(6, temperature=2.0, top_p=0.5, logit_bias={3: 1.0}, seed=2),
    ]
    engine = Engine(target, drafter, max_requests=3, max_length=96)
    mine = engine.add(request)
    output = None
    while engine.has_work:
        if others:
            engine.add(Request((7, 8), others.pop()))
        for event in engine.step():
            if event.request_id == mine and event.output:
                output = event.output
    assert output is not None
    assert output.token_ids == alone.token_ids


def test_different_seeds_differ(tiny, target):
    drafter = tiny.make_drafter(target)
    requests = [
        Request((1, 2), SamplingParams(12, temperature=1.0, seed=seed)) for seed in range(16)
    ]
    outputs = tiny.token_ids(tiny.decode(target, drafter, requests))
    assert len(set(outputs)) == 16
    again = tiny.token_ids(tiny.decode(target, drafter, requests))
    assert outputs == again
    huge = Request((1, 2), SamplingParams(12, temperature=1.0, seed=2**63 - 1))
    assert tiny.decode(target, drafter, [huge])[0].finish_reason == "length"


def random_requests(tiny, rng, count):
    """Requests of every kind, half of them greedy or without filters, with seeds of their own."""
    choices = (
        {"temperature": 1.0},
        {"temperature": 0.8, "top_p": 0.9},
        {"temperature": 1.3, "top_k": 9, "presence_penalty": 0.4},
        {"temperature": 0.0},
        {"temperature": 0.7, "logit_bias": {3: 1.0}, "repetition_penalty": 1.2},
    )
    prompts = tiny.make_prompts(count, 64, seed=rng.randrange(1000))
    return [
        Request(
            tuple(prompt),
            SamplingParams(rng.randint(3, 14), seed=rng.randrange(1 << 40), **rng.choice(choices)),
            reproducible=True,
        )
        for prompt in prompts
    ]


def stairs():
    """Costs in stairs, so that budgets hang on who else runs."""
    points = tuple(
        CostPoint(tokens, count, 5.0 + 2.0 * (tokens // 8), 1.0)
        for count in (1, 2, 4, 8)
        for tokens in range(count, 6 * count + 1, max(count // 2, 1))
    )
    return CostTable(points, MachineKey("test", 1, "float32", "tiny", "tiny"))


def random_engine(tiny, target, rng):
    """An engine with a drafter, verifier, schedule, block size, load and cache of its own."""
    drafter = rng.choice(
        (
            tiny.make_drafter(target, head="rnn"),
            tiny.make_eagle3(target),
            tiny.MarkovDrafter(64, block_size=5),
            tiny.TargetDrafter(target, spoil=3),
        )
    )
    verifier, block_size = rng.choice(("block", "token", "coupled")), rng.randint(1, 5)
    at_once = rng.randint(1, 6)
    schedules = ("auto", "fixed", "lagged", "prefix", "lookahead", "off")
    schedule = Schedule(rng.choice(schedules))
    if rng.random() < 0.2:
        schedule = Schedule("threshold", rng.random())
    if schedule.weighs_costs:
        schedule = Scheduler(schedule, verifier, block_size, None, stairs())
    return Engine(
        target,
        drafter,
        max_requests=at_once,
        max_length=tiny.max_context,
        verifier=verifier,
        schedule=schedule,
        block_size=block_size,
        step_tokens=rng.choice((None, 8, 40)),
        prefix_reuse=rng.random() < 0.7,
    )


@pytest.mark.parametrize("number", range(20))
def test_reproducible_requests_are_plain_decoding_under_any_load(tiny, target, number):
    """One text each: plainly and alone, or beside others that come and go, however drafted."""
    rng = random.Random(number)
    requests = random_requests(tiny, rng, 10)
    plain = tiny.decode(target, None, requests, max_requests=1)
    engine, outputs = random_engine(tiny, target, rng), {}
    waiting = list(enumerate(requests))
    numbers = {}
    while waiting or engine.has_work:
        if waiting and (rng.random() < 0.4 or not engine.has_work):
            index, request = waiting.pop(rng.randrange(len(waiting)))
            numbers[engine.add(request)] = index
        if rng.random() < 0.1:  # one that is verified as the engine's others are
            params = SamplingParams(rng.randint(1, 9), temperature=1.0, seed=rng.randrange(99))
            engine.add(Request((7, 8, 9), params))
        for event in engine.step():
            if event.output is not None:
                outputs[numbers.get(event.request_id)] = event.output.checked()
    assert tiny.token_ids([outputs[i] for i in range(len(requests))]) == tiny.token_ids(plain)


def test_several_answers_to_a_reproducible_request(tiny, target):
    """Each has a seed of its own, and they are the same ones however they are decoded."""
    request = Request((4, 5, 6), SamplingParams(12, temperature=1.0, seed=9, n=4), None)
    request = replace(request, reproducible=True)
    plain = tiny.token_ids(tiny.decode(target, None, [request]))
    assert len(set(plain)) == 4
    for schedule, at_once in (("auto", 4), ("fixed", 3), ("fixed", 1)):
        options = {"schedule": Schedule(schedule), "max_requests": at_once}
        outputs = tiny.decode(target, tiny.make_drafter(target), [request], **options)
        assert tiny.token_ids(outputs) == plain
