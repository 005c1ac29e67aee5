"""SIGTERM and SIGINT ask a run to stop after the step that it is in."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class StopSignals:
    """While it is entered, the first such signal is only noted; a second one acts as ever.

    Attributes:
        received: name of the signal, if one has come.
    """

    _WATCHED = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        # Only the main thread may handle signals; elsewhere they are the caller's.
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._note) for s in self._WATCHED}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self.received = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for watched, handler in self._before.items():
            signal.signal(watched, handler)
        self._before = {}
