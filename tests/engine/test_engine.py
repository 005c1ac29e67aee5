"""The queue, the slots, cancellation, and what is refused."""

from __future__ import annotations

import math

import pytest

from dspark.engine.engine import Engine
from dspark.engine.speculation.schedule import Schedule
from dspark.errors import RequestError, UsageError
from dspark.request import Request, SamplingParams


def drain(engine):
    """Run to the end; events by request."""
    events = {}
    while engine.has_work:
        for event in engine.step():
            events.setdefault(event.request_id, []).append(event)
    return events


def test_a_queue_longer_than_the_slots(tiny, target):
    prompts = tiny.make_prompts(11, 64, seed=6)
    requests = [Request(tuple(p), SamplingParams(3 + i)) for i, p in enumerate(prompts)]
    expected = [tiny.decode(target, None, [request])[0].token_ids for request in requests]
    engine = Engine(target, tiny.make_drafter(target), max_requests=2, max_length=60)
    ids = [engine.add(request) for request in requests]
    events = drain(engine)
    assert sorted(events) == ids == list(range(11))
    for request_id, mine in events.items():
        assert [event.output is not None for event in mine] == [False] * (len(mine) - 1) + [True]
        output = mine[-1].output
        assert output.token_ids == expected[request_id]
        streamed = [piece.token_id for event in mine for piece in event.pieces]
        assert tuple(streamed) == output.token_ids
    assert engine.memory.pool.in_use == 0
    assert engine.step() == []


def test_reused_slots_leak_nothing(tiny, target):
    engine = Engine(target, tiny.make_drafter(target), max_requests=3, max_length=80)
    long = tiny.make_requests(tiny.make_prompts(6, 64, seed=1), max_new_tokens=50, temperature=1.0)
    engine.run(long)
    short = tiny.make_requests(tiny.make_prompts(7, 64, seed=2), max_new_tokens=8, temperature=1.0)
    fresh = Engine(target, tiny.make_drafter(target), max_requests=3, max_length=80)
    again, expected = engine.run(short), fresh.run(short)
    assert tiny.token_ids(again) == tiny.token_ids(expected)
    assert [o.stats for o in again] == [o.stats for o in expected]


def test_cancelling(tiny, talker):
    engine = Engine(talker, tiny.TargetDrafter(talker), max_requests=2, max_length=60)
    params = SamplingParams(30, ignore_eos=True)
    prompts = [(1, 2), (3, 4, 5), (6,), (7, 8)]
    running, other, waiting, last = (engine.add(Request(p, params)) for p in prompts)
    engine.step()
    engine.step()
    output = engine.cancel(running)
    assert output.finish_reason == "cancelled"
    assert len(output.token_ids) == 7  # one with the prompt, then five drafts and a bonus token
    assert output.text == talker.tokenizer.decode(output.token_ids, skip_special_tokens=True)
    nothing = engine.cancel(waiting)
    assert (nothing.token_ids, nothing.text, nothing.finish_reason) == ((), "", "cancelled")
    assert engine.cancel(running) is None
    assert engine.cancel(99) is None
    events = drain(engine)
    assert sorted(events) == [other, last]
    for request_id in (other, last):
        [expected] = tiny.decode(talker, None, [Request(prompts[request_id], params)])
        assert events[request_id][-1].output.token_ids == expected.token_ids


def test_the_clock_keeps_prompts_apart(tiny, target):
    engine = Engine(target, tiny.make_drafter(target), max_requests=2, max_length=60)
    engine.run([Request((1, 2, 3), SamplingParams(n)) for n in (9, 9, 2)])
    clock = engine.clock
    assert clock.prefills == 2  # two prompts at once, then the third
    assert clock.steps > 0
    assert min(clock.prefill_ms, clock.draft_ms, clock.schedule_ms, clock.verify_ms) > 0
    mean = clock.per_step()
    assert math.isclose(mean.draft_ms * clock.steps, clock.draft_ms)
    assert math.isclose(mean.verify_ms * clock.steps, clock.verify_ms)


def test_plain_decoding_spends_no_time_on_drafts(tiny, target):
    engine = Engine(target, max_length=30)
    engine.run([Request((1, 2), SamplingParams(6))])
    assert (engine.clock.draft_ms, engine.clock.schedule_ms, engine.clock.steps) == (0, 0, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"verifier": "hope"}, "verifier is 'hope'"),
        ({"max_requests": 0}, "max_requests is 0"),
        ({"max_length": 0}, "max_length is 0"),
        ({"block_size": 0}, "block size is 0, but must be between 1 and 5"),
        ({"block_size": 6}, "block size is 6, but must be between 1 and 5"),
    ],
)
def test_options_out_of_range(tiny, target, options, message):
    with pytest.raises(UsageError, match=message):
        Engine(target, tiny.make_drafter(target), **{"max_length": 20, **options})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("sometimes",), "schedule is 'sometimes'"),
        (("threshold",), "Give a threshold"),
        (("fixed", 0.5), "Give a threshold"),
        (("threshold", 1.5), "threshold is 1.5"),
        (("threshold", math.nan), "threshold is nan"),
    ],
)
def test_schedules_that_mean_nothing(settings, message):
    with pytest.raises(UsageError, match=message):
        Schedule(*settings)


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        (range(20), {}, "prompt has 20 tokens, but the context holds 20"),
        ((1, 64), {}, "prompt names token 64"),
        ((1, -1), {}, "prompt names token -1"),
        ((1,), {"stop": ("x",)}, "Stop strings need a tokenizer"),
        ((1,), {"logit_bias": {64: 1.0}}, "logit bias names token 64"),
        ((1,), {"logit_bias": dict.fromkeys(range(64), -math.inf)}, "bans every token"),
    ],
)
def test_requests_that_cannot_be_served(target, prompt, params, message):
    engine = Engine(target, max_length=20)
    good = Request((1, 2), SamplingParams(3))
    bad = Request(tuple(prompt), SamplingParams(**params))
    with pytest.raises(RequestError, match=message):
        engine.add(bad)
    with pytest.raises(RequestError, match=message):
        engine.run([good, bad])
    assert not engine.has_work  # the good one was not queued either
    assert len(engine.run([good])[0].token_ids) == 3


def test_an_empty_prompt():
    with pytest.raises(RequestError, match="prompt is empty"):
        Request(())
