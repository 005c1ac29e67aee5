"""What waits on the event loop for what the engine's thread brings."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from dspark.engine.sequence import Piece
from dspark.errors import DSparkError
from dspark.request import Output
from dspark.serving.round_events import RoundEvent


@dataclass(frozen=True)
class Update:
    """What a step brought for one answer.

    Attributes:
        answer: number of the answer, from 0.
        pieces: its new tokens.
        output: the whole answer, once it has ended.
    """

    answer: int
    pieces: tuple[Piece, ...]
    output: Output | None


class Ticket:
    """The answers to one submission, as they come: an async iterator, for one task.

    Each item holds all updates that have come since the last one; it ends with the last answer.

    Args:
        name: of the submission.
        answers: how many there will be.

    Attributes:
        on_cancel: tells the engine.
    """

    def __init__(self, name: str, answers: int) -> None:
        self.name = name
        self.answers = answers
        self.on_cancel: Callable[[], None] | None = None
        self._open = answers
        self._updates: list[Update] = []
        self._error: DSparkError | None = None
        self._ready = asyncio.Event()

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come."""
        return not self._open and not self._updates

    def __aiter__(self) -> Ticket:
        return self

    async def __anext__(self) -> list[Update]:
        """All that has come, at least one update.

        Raises:
            UnavailableError: the service ended before the answers did.
        """
        if not self._updates and self._open and self._error is None:
            await self._ready.wait()
        self._ready.clear()
        if self._updates:
            updates, self._updates = self._updates, []
            return updates
        if self._error is not None and self._open:
            raise self._error
        raise StopAsyncIteration

    def put(self, update: Update) -> None:
        """Take what a step brought."""
        self._updates.append(update)
        if update.output is not None:
            self._open -= 1
        self._ready.set()

    def fail(self, error: DSparkError) -> None:
        """End the answers that are still open with an error."""
        self._error = error
        self._ready.set()

    def cancel(self) -> None:
        """End the answers that are still open, before the engine's next step."""
        if self._open and self._error is None and self.on_cancel is not None:
            self.on_cancel()
            self.on_cancel = None


class Subscription:
    """Round events for one listener: an async iterator with a buffer that drops the oldest.

    Args:
        request_id: whose; None for everyone's.
        size: events that wait at most.
        on_close: told once.

    Attributes:
        dropped: events that were dropped because the listener was too slow.
    """

    def __init__(
        self, request_id: str | None, size: int, on_close: Callable[[Subscription], None]
    ) -> None:
        self.request_id = request_id
        self.dropped = 0
        self._events: deque[RoundEvent] = deque(maxlen=size)
        self._on_close: Callable[[Subscription], None] | None = on_close
        self._ready = asyncio.Event()

    def __aiter__(self) -> Subscription:
        return self

    async def __anext__(self) -> RoundEvent:
        """The oldest event that has not been dropped."""
        while not self._events:
            if self._on_close is None:
                raise StopAsyncIteration
            self._ready.clear()
            await self._ready.wait()
        return self._events.popleft()

    async def wait(self, seconds: float) -> list[RoundEvent]:
        """All that wait, once there are any; none where none came in time, or ever will."""
        if not self._events and self._on_close is not None:
            self._ready.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._ready.wait(), max(seconds, 0.0))
        return self.take()

    def take(self) -> list[RoundEvent]:
        """All that wait, at once."""
        taken = list(self._events)
        self._events.clear()
        return taken

    def put(self, event: RoundEvent) -> None:
        """Take an event, in place of the oldest where the buffer is full."""
        self.dropped += len(self._events) == self._events.maxlen
        self._events.append(event)
        self._ready.set()

    def close(self) -> None:
        """Hear no more; what waits may still be taken."""
        if self._on_close is not None:
            on_close, self._on_close = self._on_close, None
            on_close(self)
            self._ready.set()

    async def aclose(self) -> None:
        """`close`, as `contextlib.aclosing` calls it."""
        self.close()
