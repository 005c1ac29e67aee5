"""What a fit tells whoever started it while it runs."""

from __future__ import annotations

from typing import Protocol


class Watcher(Protocol):
    """Is told of stages, their progress and remarks."""

    def begin(self, stage: str, planned_s: float | None) -> None:
        """A stage begins, which is planned to take so long."""
        ...

    def advance(self, done: float, total: float, left_s: float) -> None:
        """The stage has done so much of so much; all stages together have so many seconds left."""
        ...

    def end(self, stage: str, seconds: float, *, skipped: bool) -> None:
        """A stage has ended, or was done by an earlier run."""
        ...

    def say(self, sentence: str) -> None:
        """Something that a user should know."""
        ...


class Silent:
    """A watcher that shows nothing."""

    def begin(self, stage: str, planned_s: float | None) -> None:
        """Nothing."""

    def advance(self, done: float, total: float, left_s: float) -> None:
        """Nothing."""

    def end(self, stage: str, seconds: float, *, skipped: bool) -> None:
        """Nothing."""

    def say(self, sentence: str) -> None:
        """Nothing."""
