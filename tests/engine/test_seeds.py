"""What a seed promises: token and block reproduce whatever else is in the batch."""

from __future__ import annotations

import pytest

from dspark.engine.engine import Engine
from dspark.engine.schedule import Schedule
from dspark.request import Request, SamplingParams

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
