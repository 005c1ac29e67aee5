"""EngineThread: the thread that owns an engine.

It carries out orders between steps and hands the results of a step to the event loop in one call.
So a step never waits for a client, and an order is carried out before the next step begins.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import TypeVar

from dspark.engine.engine import Engine
from dspark.engine.speculation.round_record import RoundRecord
from dspark.errors import UnavailableError
from dspark.request import Request
from dspark.serving.counters import Counters, Snapshot
from dspark.serving.learning.collector import TrafficCollector
from dspark.serving.round_events import Owner
from dspark.serving.streams import OutputStream, Step, Update

Updates = Sequence[tuple[OutputStream, Update]]
_logger = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass
class _Job:
    """An answer in progress: its owner, the stream that waits for it, and when it last grew."""

    owner: Owner
    output_stream: OutputStream
    last_s: float | None = None


class EngineLock:
    """Lets engines of one target step one at a time, first come, first served.

    A target captures features with hooks on its modules, so no two of its forwards may run at
    once. A plain lock is not fair: the thread that has just released it may take it again at once.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._given = self._served = 0

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Wait for a turn, and keep it until the context ends."""
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


class EngineThread:
    """Steps an engine that no other thread touches from `start` on.

    The event loop calls the public methods, which queue orders; the rest runs in the thread.

    Args:
        engine: has nothing to do yet.
        engine_lock: held for each step.
        collector: collects the requests that may be learned from, if any.
        deliver: called on the event loop with the updates of a step, and with the step while
            someone listens to rounds.
        finish: called on the event loop once the thread ends, with the streams that are still open
            and the error that ends them.

    Attributes:
        counters: counts of all rounds and steps, for metrics.
        fault: the error that ended the thread, if one did.
        snapshot: the engine's state after the last step or order.
        heard: whether someone listens to rounds.
    """

    def __init__(
        self,
        engine: Engine,
        engine_lock: EngineLock,
        collector: TrafficCollector | None,
        deliver: Callable[[Updates, Step | None], None],
        finish: Callable[[Sequence[OutputStream], UnavailableError], None],
    ) -> None:
        self._engine, self._engine_lock, self._collector = engine, engine_lock, collector
        self._deliver, self._finish = deliver, finish
        self.counters = Counters(engine.num_drafts, whole_blocks=engine.verifier == "block")
        self.fault: Exception | None = None
        self.snapshot = Snapshot.of(engine, None, 0.0)
        self.heard = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._work, name="dspark-engine", daemon=True)
        self._orders: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._jobs: dict[int, _Job] = {}
        self._record: RoundRecord | None = None
        self._deadline: float | None = None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start the thread.

        Args:
            loop: of `deliver`, `finish` and all futures.
        """
        self._loop = loop
        self._watch()
        if self._collector is not None:
            self._engine.collect(self._collector)
        self._thread.start()

    def order(self, act: Callable[[Engine], None]) -> None:
        """Run something in the thread between two steps."""
        self._orders.put(partial(act, self._engine))

    def call(self, act: Callable[[Engine], _T], result: asyncio.Future[_T]) -> None:
        """Run something in the thread between two steps, and resolve `result` with its value."""

        def order() -> None:
            try:
                if self._deadline is not None:
                    raise UnavailableError("The server is stopping; ask again once it is back.")
                value = act(self._engine)
            except Exception as error:
                self._tell(partial(_fail, result, error))
            else:
                self._tell(partial(_resolve, result, value))

        self._orders.put(order)

    def submit(
        self,
        output_stream: OutputStream,
        requests: Sequence[Request],
        live: bool,
        admitted: asyncio.Future[None],
    ) -> None:
        """Queue requests, all or none, whose answers go to `output_stream`."""

        def admit(engine: Engine) -> None:
            numbers = list[int]()
            try:
                if len(requests) > 1:
                    engine.roster.check_queue(output_stream.answers)
                for request in requests:
                    if self._collector is not None:
                        request = self._collector.admit(request)  # noqa: PLW2901
                    first = engine.add(request, live=live)
                    numbers += range(first, first + request.params.n)
            except Exception:
                for number in numbers:
                    engine.cancel(number)
                raise
            for answer, number in enumerate(numbers):
                self._jobs[number] = _Job((output_stream.name, answer), output_stream)

        self.call(admit, admitted)

    def cancel(self, output_stream: OutputStream) -> None:
        """End the open answers of a submission."""
        self._orders.put(partial(self._cancel, output_stream))

    def hear(self, wanted: bool) -> None:
        """Have drafters asked for confidences only while someone listens."""

        def order() -> None:
            self.heard = wanted
            self._watch()

        self._orders.put(order)

    def stop(self, deadline: float) -> None:
        """End the thread once the engine has no work, or at `deadline` (`time.monotonic`)."""

        def order() -> None:
            self._deadline = deadline if self._deadline is None else min(self._deadline, deadline)

        self._orders.put(order)

    def join(self) -> None:
        """Wait for the end of the thread."""
        self._thread.join()

    def take_rest(self) -> None:
        """Carry out the orders that are queued; for the event loop, once the thread has ended."""
        with contextlib.suppress(Empty):
            while True:
                self._orders.get_nowait()()

    # From here on: the thread.

    def _work(self) -> None:
        try:
            while self._take_orders():
                if self._engine.has_work:
                    self._step()
        except Exception as error:  # the engine's own fault: nobody may wait for ever
            _logger.exception("The engine failed; the server takes no more requests.")
            self.fault = error
        self._end_all()

    def _take_orders(self) -> bool:
        """Carry out orders, waiting for one if the engine has no work; False ends the thread."""
        idle = not self._engine.has_work and self._deadline is None
        if idle:
            self._orders.get()()
        self.take_rest()
        if idle:
            self.snapshot = Snapshot.of(self._engine, self._record, self.snapshot.step_ms)
        if self._deadline is None:
            return True
        return self._engine.has_work and time.monotonic() < self._deadline

    def _step(self) -> None:
        self._record = None
        with self._engine_lock.hold():
            started = time.perf_counter()
            events = self._engine.step()
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
        self.snapshot = Snapshot.of(self._engine, self._record, step_ms)
        step = None
        if self.heard:
            step = Step(self.counters.steps, self._record, events, owners, step_ms)
        if updates:
            self._tell(partial(self._deliver, updates, step))

    def _watch(self) -> None:
        confidences = self.heard or self._collector is not None
        self._engine.watch(self._take_note, confidences=confidences)

    def _take_note(self, record: RoundRecord) -> None:
        self._record = record
        if self._collector is not None:
            self._collector.note(record)

    def _cancel(self, output_stream: OutputStream) -> None:
        for number in [n for n, job in self._jobs.items() if job.output_stream is output_stream]:
            self._engine.cancel(number)
            del self._jobs[number]
        self.snapshot = Snapshot.of(self._engine, self._record, self.snapshot.step_ms)

    def _end_all(self) -> None:
        """End all answers in progress, refuse the orders that are left, and tell the loop."""
        if self.fault is None:
            for number in self._jobs:
                self._engine.cancel(number)
            error = UnavailableError("The server has stopped before the answer was complete.")
        else:
            error = UnavailableError("The engine has failed; restart the server.")
        self._deadline = time.monotonic()
        streams = {id(job.output_stream): job.output_stream for job in self._jobs.values()}
        self._jobs.clear()
        self.take_rest()
        self._tell(partial(self._finish, tuple(streams.values()), error))

    def _tell(self, act: Callable[[], None]) -> None:
        """Call something on the event loop; once that is closed, nobody waits for it."""
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(act)


def _resolve(future: asyncio.Future[_T], value: _T) -> None:
    if not future.done():
        future.set_result(value)


def _fail(future: asyncio.Future[_T], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
