"""The pace of a run that must end in time: it changes the number of steps, not the clock."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

FIRST_LOOK, NEXT_LOOK = 0.1, 0.25
"""Shares of what is left, of time or of steps, after which a run looks at its speed."""
LAST_LOOK = 0.03
"""Share of the time that is too short for another plan."""
TOLERANCE = 0.03


class Pace:
    """Plans the steps of a run anew where its speed is not what was expected.

    At each look the time that is left is divided by the seconds that a step took since the look
    before. The learning rate follows the new number of steps, so its decay still reaches its end.

    Args:
        seconds: that the run may take from its first step on.
        tell: told after every step of (steps done, steps in all).
        now: the clock, in seconds.

    Attributes:
        seconds_per_step: as last measured; None before the first look.
        changes: how often the number of steps was changed.
    """

    def __init__(
        self,
        seconds: float,
        *,
        tell: Callable[[int, int], None] | None = None,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._seconds, self._tell, self._now = seconds, tell, now
        self._ends: float | None = None
        self._since, self._look = (0.0, 0), (0.0, 0)
        self.seconds_per_step: float | None = None
        self.changes = 0

    def begin(self, done: int, total: int) -> None:
        """Start the clock, `done` steps having been done by earlier sittings."""
        now = self._now()
        self._ends = now + self._seconds
        self._since = (now, done)
        self._next_look(now, done, total, FIRST_LOOK)

    def steps(self, done: int, total: int) -> int:
        """How many steps the run is to have, now that `done` are done; at least those.

        Past its time a run ends after the step that it is in.
        """
        assert self._ends is not None
        now = self._now()
        wanted = total
        if done < total and now >= self._ends:
            wanted = done
        elif done < total and (now >= self._look[0] or done >= self._look[1]):
            wanted = self._planned(now, self._ends - now, done, total)
            self._next_look(now, done, wanted, NEXT_LOOK)
        self.changes += wanted != total
        if self._tell is not None:
            self._tell(done, wanted)
        return wanted

    def _planned(self, now: float, left: float, done: int, total: int) -> int:
        since, first = self._since
        self.seconds_per_step = (now - since) / max(done - first, 1)
        self._since = (now, done)
        wanted = max(done + int(left / self.seconds_per_step), done + 1)
        return total if abs(wanted - total) <= TOLERANCE * total else wanted

    def _next_look(self, now: float, done: int, total: int, share: float) -> None:
        assert self._ends is not None
        left = self._ends - now
        if left < LAST_LOOK * self._seconds:
            self._look = (math.inf, total)
            return
        self._look = (now + share * left, done + max(math.ceil(share * (total - done)), 1))
