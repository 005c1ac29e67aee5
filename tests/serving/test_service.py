"""The engine in its thread: what comes out, who is told, and that everyone's wait ends."""

import asyncio
import contextlib

import pytest

from dspark.errors import QueueFullError, RequestError, UnavailableError, UsageError
from dspark.request import Request, SamplingParams
from dspark.serving.service import EngineService


@pytest.fixture
def requests(model, kit):
    def make(count, tokens, **params):
        return [
            Request(
                model.encode(kit.prompts[i % 3], raw=False),
                SamplingParams(tokens, seed=i, **params),
            )
            for i in range(count)
        ]

    return make


@pytest.fixture
def play(model, kit):
    """Run a coroutine function on a started service, and stop that."""

    def run(work, **options):
        engine = model.open_engine(
            **{"max_requests": 4, "max_length": 256, "schedule": "fixed", **options}
        )

        async def main():
            service = EngineService(engine)
            service.start()
            try:
                return await work(service)
            finally:
                await service.stop()
                assert engine.memory.pool.in_use == 0
                assert not engine.has_work

        return kit.run(main())

    return run


async def until(service, holds):
    for _ in range(4000):
        if holds(service.snapshot()):
            return
        await asyncio.sleep(0.005)
    raise AssertionError(service.snapshot())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_streams_give_what_the_engine_gives(model, requests, play, temperature):
    wanted = requests(6, 24, temperature=temperature)
    alone = [model.engine([r], schedule="fixed").run([r])[0].token_ids for r in wanted]

    async def work(service):
        async def tokens(request):
            return tuple([piece.token_id async for piece in service.stream(request)])

        return await asyncio.gather(*map(tokens, wanted))

    assert play(work) == alone


def test_closing_a_stream_cancels_before_the_next_step(requests, play):
    (request,) = requests(1, 200, ignore_eos=True)

    async def work(service):
        stream = service.stream(request)
        await anext(stream)
        await stream.aclose()
        seen = service.snapshot().steps
        await until(service, lambda now: now.running == 0)
        assert service.snapshot().steps <= seen + 1
        assert service.snapshot().pages_held == 0

    play(work)


def test_a_submission_that_nobody_waits_for_is_cancelled(requests, play):
    busy, left = requests(2, 200, ignore_eos=True)

    async def work(service):
        stream = service.stream(busy)
        await anext(stream)
        task = asyncio.create_task(service.submit([left]))
        await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await stream.aclose()
        await until(service, lambda now: now.running == now.queued == 0)

    play(work)


def test_all_or_none_are_admitted(requests, play):
    good, *rest = requests(3, 200, ignore_eos=True)
    too_long = Request((1,) * 300, SamplingParams(4))

    async def work(service):
        with pytest.raises(RequestError, match="300 tokens"):
            await service.submit([good, too_long])
        assert not service.engine.has_work
        output_stream = await service.submit([good])
        await anext(output_stream)
        with pytest.raises(QueueFullError):
            await service.submit(rest)
        assert (service.snapshot().running, service.snapshot().queued) == (1, 0)
        output_stream.cancel()

    play(work, max_requests=1, max_queue=1)


def test_answers_are_numbered_over_all_requests(requests, play, model):
    first, second = requests(2, 6)
    first = Request(first.prompt_ids, SamplingParams(6, n=2, temperature=1.0, seed=3))

    async def work(service):
        found = {}
        async for updates in await service.submit([first, second]):
            found |= {u.answer: u.output.token_ids for u in updates if u.output}
        return found

    outputs = model.engine([first, second], schedule="fixed").run([first, second])
    assert play(work) == {i: output.token_ids for i, output in enumerate(outputs)}


def test_a_stream_shows_one_answer(requests, play):
    (request,) = requests(1, 6, n=2)

    async def work(service):
        with pytest.raises(UsageError, match="n is 2"):
            await anext(service.stream(request))

    play(work)


def test_stopping_lets_answers_end(model, requests, play):
    (request,) = requests(1, 30)

    async def work(service):
        stream = service.stream(request)
        tokens = [(await anext(stream)).token_id]
        stopping = asyncio.create_task(service.stop(30.0))
        await asyncio.sleep(0)
        assert not service.accepting
        with pytest.raises(UnavailableError, match="stopping"):
            await service.submit([request])
        tokens += [piece.token_id async for piece in stream]
        await stopping
        return tuple(tokens)

    assert play(work) == model.engine([request]).run([request])[0].token_ids


def test_stopping_ends_what_is_left_with_an_error(requests, play):
    wanted = requests(6, 230, ignore_eos=True)  # two of them wait

    async def work(service):
        streams = [await service.submit([request]) for request in wanted]
        listener = service.subscribe()
        await service.stop(0.0)
        for output_stream in streams:
            with pytest.raises(UnavailableError, match="before the answer was complete"):
                async for _ in output_stream:
                    pass
        async for _ in listener:  # it ends
            pass

    play(work)


def test_an_engine_that_fails_leaves_nobody_waiting(requests, kit, model):
    wanted = requests(2, 100)
    engine = model.open_engine(max_requests=2, max_length=256)

    async def work():
        service = EngineService(engine)
        service.start()
        streams = [await service.submit([request]) for request in wanted]
        await anext(streams[0])
        engine.target.forward, kept = fail, engine.target.forward
        try:
            for output_stream in streams:
                with pytest.raises(UnavailableError, match="engine has failed"):
                    async for _ in output_stream:
                        pass
        finally:
            engine.target.forward = kept
        assert isinstance(service.fault, ZeroDivisionError)
        with pytest.raises(UnavailableError, match="engine has failed"):
            await service.submit(wanted)
        await service.stop()

    def fail(*_args, **_options):
        raise ZeroDivisionError

    kit.run(work())


def test_rounds_tell_what_the_engine_did(requests, play):
    (request,) = requests(1, 40)

    async def work(service):
        listener = service.subscribe("mine")
        other = service.subscribe("other")
        output_stream = await service.submit([request], name="mine")
        outputs = [u.output async for updates in output_stream for u in updates if u.output]
        listener.close()
        other.close()
        assert [event async for event in other] == []
        return outputs[0], [event async for event in listener], service

    output, events, service = play(work)
    emitted = []
    for event in events:
        kept = [draft.token_id for draft in event.drafts if draft.accepted]
        assert kept == [draft.token_id for draft in event.drafts][: len(kept)]
        if emitted:
            assert event.anchor.token_id == emitted[-1]
        emitted += kept + ([event.next_token.token_id] if event.next_token else [])
        sent = [draft.sent for draft in event.drafts]
        assert sent == sorted(sent, reverse=True)
        assert (event.request_id, event.answer) == ("mine", 0)
        assert event.verify_ms > 0
    assert tuple(emitted) == output.token_ids
    assert [event.round for event in events] == list(range(len(events)))
    assert sum(len(event.drafts) for event in events) == output.stats.drafted
    assert sum(d.sent for event in events for d in event.drafts) == output.stats.verified
    assert sum(d.accepted for event in events for d in event.drafts) == output.stats.accepted
    whole = next(event for event in events if event.drafts)
    survival = 1.0
    for draft in whole.drafts:  # the drafter was asked for confidences because someone listened
        survival *= draft.confidence
        assert draft.survival == pytest.approx(survival)
    assert whole.rows == 1 + len(whole.drafts)
    assert service.counters.drift.observed > 0


def test_nobody_listens_nothing_is_computed(requests, play):
    (request,) = requests(1, 20)

    async def work(service):
        assert [piece async for piece in service.stream(request)]
        return service.counters

    counters = play(work, schedule="fixed")
    assert counters.drift.observed == 0
    assert counters.rounds > 0


def test_a_slow_listener_loses_the_oldest_and_nobody_waits(requests, play):
    (request,) = requests(1, 40, ignore_eos=True)

    async def work(service):
        listener = service.subscribe(size=3)
        output = [piece async for piece in service.stream(request)]
        listener.close()
        events = [event async for event in listener]
        return len(output), events, listener.dropped

    count, events, dropped = play(work)
    assert count == 40
    assert len(events) == 3
    assert [event.round for event in events] == [dropped, dropped + 1, dropped + 2]
    assert dropped > 5


def test_plain_decoding_has_events_too(requests, play, model):
    (request,) = requests(1, 12)

    async def work(service):
        listener = service.subscribe()
        tokens = [piece.token_id async for piece in service.stream(request)]
        listener.close()
        return tokens, [event async for event in listener]

    tokens, events = play(work, schedule="off")
    assert [event.next_token.token_id for event in events] == tokens
    assert not any(event.drafts for event in events)


def test_something_runs_between_two_steps(play):
    async def work(service):
        assert await service.call(lambda engine: engine.max_requests) == 4
        with pytest.raises(ZeroDivisionError):
            await service.call(lambda _engine: 1 // 0)

    play(work)
