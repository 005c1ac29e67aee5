"""EngineService: the engine in a thread of its own, behind an asyncio interface.

One thread owns the engine: it takes orders (submit, cancel, ...) between steps and hands what a
step brought to the event loop in one call. Everything else here runs on the loop. So a step never
waits for a client, and whatever is ordered has happened before the next step begins.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import TypeVar

from dspark.engine.engine import Engine
from dspark.engine.requests.sequence import Piece
from dspark.engine.speculation.round_record import RoundRecord
from dspark.errors import UnavailableError, UsageError
from dspark.request import Request
from dspark.serving.counters import Counters, Snapshot
from dspark.serving.learning.learner import Learner
from dspark.serving.round_events import Owner
from dspark.serving.streams import Listeners, OutputStream, Step, Subscription, Update

_logger = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass
class _Job:
    """An answer that the engine is at: whose it is, who waits for it, and its last output."""

    owner: Owner
    output_stream: OutputStream
    last_s: float | None = None


class EngineLock:
    """Lets engines of one target step one at a time, in the order in which they came.

    A target captures features with hooks on its modules, so no two of its forwards may run at
    once. A plain lock would do, but may be taken again and again by whoever has just held it.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._given = self._served = 0

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Wait for a turn, and hold it."""
        with self._changed:
            number = self._given
            self._given += 1
            self._changed.wait_for(lambda: self._served == number)
        try:
            yield
        finally:
            with self._changed:
                self._served += 1
                self._changed.notify_all()


class EngineService:
    """Owns an engine that nobody else touches from `start` on.

    Args:
        engine: has nothing to do yet. It may be watched by the service alone.
        engine_lock: of the services whose engines share a target; its own by default.
        learner: learns from requests that may be learned from; None for nobody.

    Attributes:
        engine: for what never changes: its target, sizes and schedule.
        learner: who learns.
        engine_lock: held for each step.
        counters: counts of all rounds and steps, for metrics.
        fault: what ended the engine's thread, if that was an error.
    """

    def __init__(
        self,
        engine: Engine,
        engine_lock: EngineLock | None = None,
        learner: Learner | None = None,
    ) -> None:
        self.engine = engine
        self.learner = learner
        self.engine_lock = engine_lock or EngineLock()
        self.counters = Counters(engine.num_drafts, whole_blocks=engine.verifier == "block")
        self.fault: Exception | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._ended: asyncio.Event | None = None
        self._orders: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._jobs: dict[int, _Job] = {}  # of the thread alone
        self._listeners = Listeners(self.token_text, self._hear)  # of the loop alone
        self._heard = False
        self._record: RoundRecord | None = None
        self._deadline: float | None = None
        self._closing = False
        self._names = 0
        self._snapshot = Snapshot.of(engine, None, 0.0)

    @property
    def accepting(self) -> bool:
        """Whether requests are taken now."""
        return self._thread is not None and not self._closing and self.fault is None

    def start(self) -> None:
        """Start the engine's thread; call it on the event loop that is to be served."""
        assert self._thread is None, "a service starts once"
        self._loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        self.engine.watch(self._take_note, confidences=self.learner is not None)
        if self.learner is not None:
            self.engine.collect(self.learner.collector)
            self.learner.start(self.order)
        self._thread = threading.Thread(target=self._work, name="dspark-engine", daemon=True)
        self._thread.start()

    async def stop(self, drain_s: float = 0.0) -> None:
        """Take no more requests, let those that run end, and cancel what is left after `drain_s`.

        Every open stream ends: by its own end, or with an `UnavailableError`.
        """
        self._closing = True
        if self._thread is None or self._ended is None:
            return
        deadline = time.monotonic() + drain_s

        def close() -> None:
            self._deadline = deadline if self._deadline is None else min(self._deadline, deadline)

        self._orders.put(close)
        await self._ended.wait()
        self._thread.join()
        self._listeners.close()
        if self.learner is not None:
            await asyncio.to_thread(self.learner.stop)
            self.learner = None

    def order(self, act: Callable[[Engine], None]) -> None:
        """Have something done to the engine, in its thread and between two steps."""
        self._orders.put(partial(act, self.engine))

    async def submit(
        self, requests: Sequence[Request], *, name: str = "", live: bool = True
    ) -> OutputStream:
        """Queue requests, all or none.

        Args:
            requests: what to decode; each has as many answers as its `n`, numbered on.
            name: the id that `RoundEvent`s carry; by default one is made up.
            live: give the text token by token, not only whole at the end.

        Returns:
            The answers as they come. Whoever takes it must end it with `cancel`, which does
            nothing once all answers have ended.

        Raises:
            RequestError: as `Engine.add`; then none is queued.
            QueueFullError: too many requests wait already.
            UnavailableError: the service is stopping, or its engine has failed.
        """
        loop = self._check_open()
        self._names += 1
        output_stream = OutputStream(
            name or f"local-{self._names}", sum(r.params.n for r in requests)
        )
        output_stream.on_cancel = partial(self._order_cancel, output_stream)
        admitted: asyncio.Future[None] = loop.create_future()
        self._orders.put(partial(self._admit, output_stream, tuple(requests), live, admitted))
        try:
            await admitted
        except BaseException:
            output_stream.cancel()
            raise
        return output_stream

    async def stream(self, request: Request) -> AsyncIterator[Piece]:
        """Decode one request, yielding its tokens as they are decided.

        Closing the generator cancels the request before the next step.

        Raises:
            RequestError, QueueFullError, UnavailableError: as `submit`; or what ended the request.
            NumericsError: the model computed NaN or infinite numbers.
            UsageError: the request wants several answers, which a stream cannot tell apart.
        """
        if request.params.n != 1:
            raise UsageError(f"n is {request.params.n}, but a stream shows one answer; use submit.")
        output_stream = await self.submit([request])
        try:
            async for updates in output_stream:
                for update in updates:
                    for piece in update.pieces:
                        yield piece
                    if update.output is not None:
                        update.output.checked()
        finally:
            output_stream.cancel()

    def subscribe(self, request_id: str | None = None, *, size: int = 256) -> Subscription:
        """Listen to the rounds of one request, or of all.

        Args:
            request_id: what its `submit` was named; it need not have come yet. None for all.
            size: events that wait for the listener; beyond these the oldest are dropped.

        Returns:
            An async iterator, which ends when it is closed or the service stops. Close it.
        """
        ended = self._closing or self.fault is not None
        return self._listeners.add(request_id, size, ended=ended)

    async def call(self, act: Callable[[Engine], _T]) -> _T:
        """Run something in the engine's thread, between two steps.

        Raises:
            UnavailableError: the service is stopping, or its engine has failed.
        """
        loop = self._check_open()
        result: asyncio.Future[_T] = loop.create_future()

        def order() -> None:
            try:
                self._refuse_late()
                value = act(self.engine)
            except Exception as error:
                self._tell(partial(_fail, result, error))
            else:
                self._tell(partial(_resolve, result, value))

        self._orders.put(order)
        return await result

    def token_text(self, token_id: int) -> str:
        """The text of a token alone; its number where there is no tokenizer."""
        tokenizer = self.engine.target.tokenizer
        if tokenizer is None:
            return str(token_id)
        return str(tokenizer.decode([token_id], clean_up_tokenization_spaces=False))

    def snapshot(self) -> Snapshot:
        """How things stood after the last step or order."""
        return self._snapshot

    def _check_open(self) -> asyncio.AbstractEventLoop:
        if self.fault is not None:
            raise UnavailableError("The engine has failed; restart the server.")
        if self._loop is None or self._closing:
            raise UnavailableError("The server is stopping; ask again once it is back.")
        return self._loop

    def _hear(self, wanted: bool) -> None:
        """Have drafters asked for confidences only while someone listens."""

        def order() -> None:
            self._heard = wanted
            confidences = wanted or self.learner is not None
            self.engine.watch(self._take_note, confidences=confidences)

        self._orders.put(order)

    def _order_cancel(self, output_stream: OutputStream) -> None:
        self._orders.put(partial(self._cancel, output_stream))

    # From here on: the engine's thread.

    def _work(self) -> None:
        try:
            while self._take_orders():
                if self.engine.has_work:
                    self._step()
        except Exception as error:  # the engine's own fault: nobody may wait for ever
            _logger.exception("The engine failed; the server takes no more requests.")
            self.fault = error
        self._end_all()

    def _take_orders(self) -> bool:
        """Do what was ordered, waiting for it where there is nothing else to do; False to end."""
        idle = not self.engine.has_work and self._deadline is None
        if idle:
            self._orders.get()()
        self._take_rest()
        if idle:
            self._snapshot = Snapshot.of(self.engine, self._record, self._snapshot.step_ms)
        if self._deadline is None:
            return True
        return self.engine.has_work and time.monotonic() < self._deadline

    def _take_rest(self) -> None:
        with contextlib.suppress(Empty):
            while True:
                self._orders.get_nowait()()

    def _step(self) -> None:
        self._record = None
        with self.engine_lock.hold():
            started = time.perf_counter()
            events = self.engine.step()
            ended = time.perf_counter()
        step_ms = (ended - started) * 1e3
        self.counters.add_step(step_ms, self._record)
        updates, owners = list[tuple[OutputStream, Update]](), dict[int, Owner]()
        for event in events:
            job = self._jobs.get(event.request_id)
            if job is None:
                continue
            if event.pieces:
                if job.last_s is not None:
                    self.counters.gaps.add(ended - job.last_s)
                job.last_s = ended
            owners[event.request_id] = job.owner
            updates.append((job.output_stream, Update(job.owner[1], event.pieces, event.output)))
            if event.output is not None:
                del self._jobs[event.request_id]
        self._snapshot = Snapshot.of(self.engine, self._record, step_ms)
        step = None
        if self._heard:
            step = Step(self.counters.steps, self._record, events, owners, step_ms)
        if updates:
            self._tell(partial(self._deliver, updates, step))

    def _refuse_late(self) -> None:
        if self._deadline is not None:
            raise UnavailableError("The server is stopping; ask again once it is back.")

    def _take_note(self, record: RoundRecord) -> None:
        self._record = record
        if self.learner is not None:
            self.learner.collector.note(record)

    def _admit(
        self,
        output_stream: OutputStream,
        requests: Sequence[Request],
        live: bool,
        admitted: asyncio.Future[None],
    ) -> None:
        engine, answer, numbers = self.engine, 0, list[int]()
        try:
            self._refuse_late()
            if len(requests) > 1:
                engine.roster.check_queue(output_stream.answers)
            for request in requests:
                if self.learner is not None:
                    request = self.learner.collector.admit(request)  # noqa: PLW2901
                first = engine.add(request, live=live)
                numbers += range(first, first + request.params.n)
        except Exception as error:
            for number in numbers:
                engine.cancel(number)
            self._tell(partial(_fail, admitted, error))
            return
        for answer, number in enumerate(numbers):
            self._jobs[number] = _Job((output_stream.name, answer), output_stream)
        self._tell(partial(_resolve, admitted, None))

    def _cancel(self, output_stream: OutputStream) -> None:
        for number in [n for n, job in self._jobs.items() if job.output_stream is output_stream]:
            self.engine.cancel(number)
            del self._jobs[number]
        self._snapshot = Snapshot.of(self.engine, self._record, self._snapshot.step_ms)

    def _end_all(self) -> None:
        """End what is left, here and in orders that were never taken, and say so."""
        if self.fault is None:
            for number in self._jobs:
                self.engine.cancel(number)
            error = UnavailableError("The server has stopped before the answer was complete.")
        else:
            error = UnavailableError("The engine has failed; restart the server.")
        self._deadline = time.monotonic()
        streams = {id(job.output_stream): job.output_stream for job in self._jobs.values()}
        self._jobs.clear()
        self._take_rest()
        self._tell(partial(self._finish, tuple(streams.values()), error))

    def _tell(self, act: Callable[[], None]) -> None:
        """Have the loop do something; a loop that is gone has nobody who waits."""
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(act)

    # Called on the loop by the engine's thread.

    def _deliver(self, updates: Sequence[tuple[OutputStream, Update]], step: Step | None) -> None:
        for output_stream, update in updates:
            output_stream.put(update)
        if step is not None:
            self._listeners.publish(step)

    def _finish(self, streams: Sequence[OutputStream], error: UnavailableError) -> None:
        self._closing = True
        self._take_rest()  # what was ordered while the thread ended
        for output_stream in streams:
            output_stream.fail(error)
        self._listeners.close()
        assert self._ended is not None
        self._ended.set()


def _resolve(future: asyncio.Future[_T], value: _T) -> None:
    if not future.done():
        future.set_result(value)


def _fail(future: asyncio.Future[_T], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
