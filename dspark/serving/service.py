"""EngineService: an engine in a thread of its own, behind an asyncio interface.

Everything here runs on the event loop; `EngineThread` runs the engine.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import TypeVar

from dspark.engine.engine import Engine
from dspark.engine.requests.sequence import Piece
from dspark.errors import UnavailableError, UsageError
from dspark.request import Request
from dspark.serving.counters import Counters, Snapshot
from dspark.serving.engine_thread import EngineLock, EngineThread, Updates
from dspark.serving.learning.learner import Learner
from dspark.serving.streams import Listeners, OutputStream, Step, Subscription

_T = TypeVar("_T")


class EngineService:
    """Serves an engine that nothing else touches from `start` on.

    Args:
        engine: has no requests yet; only the service may `watch` it.
        engine_lock: shared by the services whose engines share a target; its own by default.
        learner: learns from the requests that allow it, if any.

    Attributes:
        engine: to read what never changes: its target, sizes and schedule.
        learner: the learner, until the service stops.
        engine_lock: held for each step.
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
        collector = None if learner is None else learner.collector
        self._thread = EngineThread(
            engine, self.engine_lock, collector, self._deliver, self._finish
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended = asyncio.Event()
        self._listeners = Listeners(self.token_text, self._thread.hear)
        self._closing = False
        self._names = 0

    @property
    def counters(self) -> Counters:
        """Counts of all rounds and steps, for metrics."""
        return self._thread.counters

    @property
    def fault(self) -> Exception | None:
        """The error that ended the engine's thread, if one did."""
        return self._thread.fault

    @property
    def accepting(self) -> bool:
        """Whether requests are taken now."""
        return self._loop is not None and not self._closing and self.fault is None

    def start(self) -> None:
        """Start the engine's thread; call it on the event loop that is to be served."""
        assert self._loop is None, "a service starts once"
        self._loop = asyncio.get_running_loop()
        if self.learner is not None:
            self.learner.start(self.order)
        self._thread.start(self._loop)

    async def stop(self, drain_s: float = 0.0) -> None:
        """Refuse new requests, let the others end, and cancel those left after `drain_s` seconds.

        Every open stream ends, by its own end or with an `UnavailableError`.
        """
        self._closing = True
        if self._loop is None:
            return
        self._thread.stop(time.monotonic() + drain_s)
        await self._ended.wait()
        self._thread.join()
        self._listeners.close()
        if self.learner is not None:
            await asyncio.to_thread(self.learner.stop)
            self.learner = None

    def order(self, act: Callable[[Engine], None]) -> None:
        """Run something in the engine's thread, between two steps, without waiting for it."""
        self._thread.order(act)

    async def submit(
        self, requests: Sequence[Request], *, name: str = "", live: bool = True
    ) -> OutputStream:
        """Queue requests, all or none.

        Args:
            requests: what to decode; each has `n` answers, which are numbered across requests.
            name: the id that `RoundEvent`s carry; by default one is made up.
            live: give the text token by token, not only whole at the end.

        Returns:
            The answers as they come. The caller must end it with `cancel`, which does nothing once
            all answers have ended.

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
        output_stream.on_cancel = partial(self._thread.cancel, output_stream)
        admitted: asyncio.Future[None] = loop.create_future()
        self._thread.submit(output_stream, tuple(requests), live, admitted)
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
            request_id: the name of its `submit`, which may be yet to come. None for all.
            size: events that wait for the listener at most; beyond these the oldest are dropped.

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
        self._thread.call(act, result)
        return await result

    def token_text(self, token_id: int) -> str:
        """The text of a token alone; its number where there is no tokenizer."""
        tokenizer = self.engine.target.tokenizer
        if tokenizer is None:
            return str(token_id)
        return str(tokenizer.decode([token_id], clean_up_tokenization_spaces=False))

    def snapshot(self) -> Snapshot:
        """The engine's state after the last step or order."""
        return self._thread.snapshot

    def _check_open(self) -> asyncio.AbstractEventLoop:
        if self.fault is not None:
            raise UnavailableError("The engine has failed; restart the server.")
        if self._loop is None or self._closing:
            raise UnavailableError("The server is stopping; ask again once it is back.")
        return self._loop

    def _deliver(self, updates: Updates, step: Step | None) -> None:
        for output_stream, update in updates:
            output_stream.put(update)
        if step is not None:
            self._listeners.publish(step)

    def _finish(self, streams: Sequence[OutputStream], error: UnavailableError) -> None:
        self._closing = True
        self._thread.take_rest()  # what was ordered while the thread ended
        for output_stream in streams:
            output_stream.fail(error)
        self._listeners.close()
        self._ended.set()
