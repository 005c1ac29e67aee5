"""Several answers to one prompt, timeouts, cancellation of them all, and a full queue."""

from __future__ import annotations

import pytest

from dspark.engine.engine import Engine
from dspark.engine.model import Model
from dspark.errors import QueueFullError, RequestError, UsageError
from dspark.params import sample_seed
from dspark.request import VERIFIERS, Request, SamplingParams

PROMPT = (7, 20, 31)


class Time:
    """A clock that stands still until it is told to go on."""

    def __init__(self):
        self.seconds = 100.0

    def __call__(self):
        return self.seconds


def idle(engine):
    """Nothing waits, runs or holds memory."""
    return (
        not engine.has_work
        and engine.memory.pool.in_use == 0
        and not (engine._speculator and engine._speculator.context._count)
    )


@pytest.mark.parametrize("verifier", VERIFIERS)
def test_answers_are_those_of_their_own_seeds(tiny, target, verifier):
    params = SamplingParams(12, temperature=1.0, seed=4, n=5, logprobs=1)
    drafter = tiny.make_drafter(target)
    single = [
        Request(PROMPT, SamplingParams(12, temperature=1.0, seed=sample_seed(4, i), logprobs=1))
        for i in range(5)
    ]
    alone = [
        tiny.decode(target, drafter, [r], verifier=verifier, max_requests=1)[0] for r in single
    ]
    for batch in (1, 3, 8):
        engine = Engine(target, drafter, max_requests=batch, max_length=60, verifier=verifier)
        other = Request((1, 2), SamplingParams(6))
        outputs = engine.run([other, Request(PROMPT, params), other])
        assert len(outputs) == 7
        assert tiny.token_ids(outputs[1:6]) == tiny.token_ids(alone)
        assert outputs[0].token_ids == outputs[6].token_ids
        assert idle(engine)
    assert len(set(tiny.token_ids(alone))) == 5
    first = Request(PROMPT, SamplingParams(12, temperature=1.0, seed=4))
    assert tiny.decode(target, drafter, [first], verifier=verifier)[0].token_ids == (
        alone[0].token_ids
    )


def test_answers_have_consecutive_numbers(target):
    engine = Engine(target, max_requests=2, max_length=60)
    numbers = [engine.add(Request(PROMPT, SamplingParams(3, n=n))) for n in (1, 4, 2, 1)]
    assert numbers == [0, 1, 5, 7]
    ended = set()
    while engine.has_work:
        ended |= {event.request_id for event in engine.step() if event.output}
    assert ended == set(range(8))


def test_answers_at_temperature_zero_are_the_same(tiny, target):
    outputs = Engine(target, max_length=60).run([Request(PROMPT, SamplingParams(6, n=3))])
    assert len(set(tiny.token_ids(outputs))) == 1


def test_generate_gives_a_list_of_answers(talker):
    model = Model(talker)
    outputs = model.generate("the cat", n=3, temperature=1.0, max_new_tokens=5, seed=2)
    assert [output.prompt for output in outputs] == ["the cat"] * 3
    assert model.generate("the cat", temperature=1.0, max_new_tokens=5, seed=2) == outputs[0]
    both = model.generate(["the cat", "the dog"], n=2, temperature=1.0, max_new_tokens=5, seed=2)
    assert [output.prompt for output in both] == ["the cat"] * 2 + ["the dog"] * 2
    assert both[:2] == outputs[:2]
    with pytest.raises(UsageError, match="n is 2, but a stream shows one answer"):
        next(model.stream("the cat", n=2))


def test_cancelling_all_answers_frees_everything_at_once(tiny, target):
    engine = Engine(target, tiny.make_drafter(target), max_requests=3, max_length=80)
    first = engine.add(Request(PROMPT, SamplingParams(40, temperature=1.0, n=5)))
    other = engine.add(Request((1, 2), SamplingParams(5)))
    engine.step()
    engine.step()
    assert engine.cancel(first + 1).finish_reason == "cancelled"
    outputs = engine.cancel_all(first)
    assert [output.finish_reason for output in outputs] == ["cancelled"] * 4
    assert [len(output.token_ids) > 0 for output in outputs] == [True, True, False, False]
    assert engine.memory.pool.in_use == 0
    assert engine.cancel_all(first) == []
    ended = {}
    while engine.has_work:
        ended |= {event.request_id: event.output for event in engine.step()}
    assert sorted(ended) == [other]
    assert ended[other].finish_reason == "length"
    assert idle(engine)


def test_a_timeout_ends_what_runs_and_what_waits_within_one_step(tiny, talker):
    time = Time()
    engine = Engine(talker, tiny.make_drafter(talker), max_requests=2, max_length=90, now=time)
    params = SamplingParams(60, ignore_eos=True)
    slow, endless, waiting = (
        engine.add(Request((i, 2), params, timeout_s=timeout), prompt=f"{i}")
        for i, timeout in ((1, 3.0), (2, None), (3, 2.0))
    )
    engine.step()
    time.seconds += 1.9
    assert all(event.output is None for event in engine.step())
    time.seconds += 0.1
    events = {event.request_id: event for event in engine.step()}
    assert set(events) == {slow, endless, waiting}
    assert events[waiting].output.finish_reason == "timeout"
    assert (events[waiting].output.token_ids, events[waiting].pieces) == ((), ())
    time.seconds += 5
    events = {event.request_id: event for event in engine.step()}
    output = events[slow].output
    assert (output.finish_reason, output.error, output.prompt) == ("timeout", None, "1")
    assert len(output.token_ids) >= 3
    assert output.text == talker.tokenizer.decode(output.token_ids, skip_special_tokens=True)
    [plain] = tiny.decode(talker, None, [Request((1, 2), params)])
    assert output.token_ids == plain.token_ids[: len(output.token_ids)]
    [expected] = tiny.decode(talker, None, [Request((2, 2), params)], max_length=90)
    ended = None
    while engine.has_work:
        [event] = engine.step()
        ended = event.output
    assert ended.token_ids == expected.token_ids
    assert idle(engine)


def test_answers_time_out_together_and_an_idle_engine_still_tells(target):
    time = Time()
    engine = Engine(target, max_requests=1, max_length=60, now=time)
    engine.add(Request(PROMPT, SamplingParams(9, n=3), timeout_s=1.0))
    time.seconds += 1.0
    assert [event.output.finish_reason for event in engine.step()] == ["timeout"] * 3
    assert engine.step() == []
    assert idle(engine)


def test_a_timeout_that_never_comes_changes_nothing(tiny, target):
    request = Request(PROMPT, SamplingParams(9))
    timed = Request(PROMPT, SamplingParams(9), timeout_s=1e9)
    assert tiny.decode(target, None, [timed]) == tiny.decode(target, None, [request])


def test_a_full_queue_says_so(target):
    engine = Engine(target, max_requests=2, max_length=60, max_queue=3)
    request = Request(PROMPT, SamplingParams(4))
    for _ in range(5):
        engine.add(request)
    message = "3 requests wait already, and 1 more would pass the limit of 3"
    with pytest.raises(QueueFullError, match=message):
        engine.add(request)
    engine.step()
    with pytest.raises(QueueFullError, match=message):
        engine.add(request)
    engine.cancel(4)
    with pytest.raises(QueueFullError, match="2 requests wait already, and 2 more"):
        engine.add(Request(PROMPT, SamplingParams(4, n=2)))
    engine.add(request)
    while engine.has_work:
        engine.step()
    assert engine._next_id == 6  # who was refused got no number
    assert idle(engine)


def test_no_queue_at_all_and_more_requests_than_it_holds(tiny, target):
    engine = Engine(target, max_requests=2, max_length=60, max_queue=0)
    requests = tiny.make_requests(tiny.make_prompts(7, 64), max_new_tokens=5)
    outputs = engine.run(requests)
    assert tiny.token_ids(outputs) == tiny.token_ids(tiny.decode(target, None, requests))
    for call in (engine.add, lambda request: engine.run([request])):
        with pytest.raises(RequestError, match="n is 3, but no more than 2 requests can run"):
            call(Request(PROMPT, SamplingParams(5, n=3)))
    assert idle(engine)


def test_a_queue_limit_below_zero(target):
    with pytest.raises(UsageError, match="max_queue is -1"):
        Engine(target, max_length=60, max_queue=-1)
