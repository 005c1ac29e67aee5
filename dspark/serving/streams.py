"""OutputStream: one submission's outputs, handed from the engine's thread to the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from dspark.engine.requests.sequence import Piece
from dspark.errors import DSparkError
from dspark.request import Output


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
