"""The pace of a run that must end in time: it changes the number of steps, not the clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

MARKS = (0.1, 0.3, 0.6, 0.85)
"""Shares of the time after which a run compares what it has done with what it planned."""
TOLERANCE = 0.03


class Pace:
    """Plans the steps of a run anew where its speed is not what was expected.

    At each mark the time that is left is divided by the seconds that a step took since the mark
    before. The learning rate follows the new number of steps, so its decay still reaches its end.

    Args:
        seconds: that the run may take from its first step on.
        marks: shares of them, ascending, after which to look.
        tell: told after every step of (steps done, steps in all).
        now: the clock, in seconds.

    Attributes:
        seconds_per_step: as last measured; None before the first mark.
        changes: how often the number of steps was changed.
    """

    def __init__(
        self,
        seconds: float,
        *,
        marks: Sequence[float] = MARKS,
        tell: Callable[[int, int], None] | None = None,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._seconds, self._tell, self._now = seconds, tell, now
        self._marks = list(marks)
        self._begun: float | None = None
        self._since = (0.0, 0)
        self.seconds_per_step: float | None = None
        self.changes = 0

    def begin(self, done: int) -> None:
        """Start the clock, `done` steps having been done by earlier sittings."""
        self._begun = self._now()
        self._since = (self._begun, done)

    def steps(self, done: int, total: int) -> int:
        """How many steps the run is to have, now that `done` are done; at least those.

        Past its time a run ends after the step that it is in.
        """
        assert self._begun is not None
        now = self._now()
        left = self._begun + self._seconds - now
        wanted = total
        if done < total and left <= 0:
            wanted = done
        elif done < total and self._marks and now - self._begun >= self._marks[0] * self._seconds:
            wanted = self._planned(now, left, done, total)
        self.changes += wanted != total
        if self._tell is not None:
            self._tell(done, wanted)
        return wanted

    def _planned(self, now: float, left: float, done: int, total: int) -> int:
        while self._marks and now - (self._begun or 0.0) >= self._marks[0] * self._seconds:
            self._marks.pop(0)
        since, first = self._since
        self.seconds_per_step = (now - since) / max(done - first, 1)
        self._since = (now, done)
        wanted = max(done + int(left / self.seconds_per_step), done + 1)
        return total if abs(wanted - total) <= TOLERANCE * total else wanted
