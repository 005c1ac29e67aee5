"""Streams from the engine's thread to the event loop: outputs, and round events.

An `OutputStream` brings one submission its updates; a `Subscription` brings a listener round
events, which `Listeners` delivers after each step.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dspark.engine.requests.sequence import Event, Piece
from dspark.engine.speculation.round_record import RoundRecord
from dspark.errors import DSparkError
from dspark.request import Output
from dspark.serving.round_events import Owner, RoundEvent, TokenText, plain_event, round_events


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


class OutputStream:
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

    def __aiter__(self) -> OutputStream:
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


@dataclass
class Step:
    """What a step did.

    Attributes:
        number: of the step, from 1.
        record: of its round; None under plain decoding.
        events: of its requests.
        owners: of those that belong to someone, by the engine's number.
        ms: what it took.
        time_s: when it ended, seconds since 1970.
    """

    number: int
    record: RoundRecord | None
    events: Sequence[Event]
    owners: dict[int, Owner]
    ms: float
    time_s: float = field(default_factory=time.time)


class Listeners:
    """The subscriptions of one service; it belongs to the event loop.

    Args:
        text: of tokens.
        on_change: told whenever someone comes or goes whether anyone is there.
    """

    def __init__(self, text: TokenText, on_change: Callable[[bool], None]) -> None:
        self._text = text
        self._on_change = on_change
        self._all: list[Subscription] = []

    def add(self, request_id: str | None, size: int, *, ended: bool) -> Subscription:
        """A new subscription, as `EngineService.subscribe`.

        Args:
            request_id: whose rounds; None for everyone's.
            size: events that wait at most.
            ended: whether none will come any more; it is then closed.
        """
        listener = Subscription(request_id, size, self._remove)
        if ended:
            listener.close()
            return listener
        self._all.append(listener)
        self._on_change(True)
        return listener

    def _remove(self, listener: Subscription) -> None:
        if listener in self._all:
            self._all.remove(listener)
        self._on_change(bool(self._all))

    def close(self) -> None:
        """Let all of them end."""
        for listener in list(self._all):
            listener.close()

    def publish(self, step: Step) -> None:
        """Give a step's rounds to those who want them; nothing is made that nobody wants."""
        wanted = {listener.request_id for listener in self._all}
        owners = {n: o for n, o in step.owners.items() if None in wanted or o[0] in wanted}
        for event in self._events(step, owners) if owners else ():
            for listener in self._all:
                if listener.request_id in (None, event.request_id):
                    listener.put(event)

    def _events(self, step: Step, owners: dict[int, Owner]) -> list[RoundEvent]:
        if step.record is not None:
            pieces = {event.request_id: event.pieces for event in step.events}
            return round_events(step.record, pieces, owners, self._text, step.time_s)
        requests = len(step.events)
        return [
            plain_event(
                owners[event.request_id],
                step.number,
                event.pieces[0],
                requests,
                step.ms,
                step.time_s,
            )
            for event in step.events
            if event.request_id in owners and event.pieces
        ]
