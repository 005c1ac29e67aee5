"""Whose turn it is to step, where several engines share one target."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """Lets engines of one target step one at a time, in the order in which they came.

    A target captures features with hooks on its modules, so no two of its forwards may run at
    once. A plain lock would do, but may be taken again and again by whoever has just held it.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._given = self._served = 0

    @contextmanager
    def mine(self) -> Iterator[None]:
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
