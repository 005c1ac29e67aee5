"""Drafter faults: an error of a drafter is logged, and the round goes on without drafts."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from dspark.engine.requests.sequence import ActiveRequest

_MOST_IN_A_ROW = 3
_logger = logging.getLogger(__name__)


class Shield:
    """Stands between a drafter and the requests that it drafts for.

    The first fault is logged with its traceback, the others are not. Requests that ran when the
    drafter raised decode plainly to their end, since its context may have lost rows of theirs;
    those that come later draft again. Three faults in a row switch the drafter off for good.

    Args:
        strict: raise the fault after all.

    Attributes:
        fault: the first fault; None while there was none.
        off: whether the drafter has been switched off.
    """

    def __init__(self, *, strict: bool = False) -> None:
        self._strict = strict
        self.fault: Exception | None = None
        self.off = False
        self._in_a_row = 0

    def over(self, requests: Sequence[ActiveRequest]) -> _Guard:
        """Let the drafter work; if it raises, these requests have no drafter any more."""
        return _Guard(self, requests)

    def failed(self, error: Exception, requests: Sequence[ActiveRequest]) -> bool:
        """Take note of what the drafter raised; whether the round may go on."""
        if self._strict:
            return False
        self.record(error)
        for request in requests:
            request.decode_plainly()
        return True

    def record(self, error: Exception) -> None:
        """Count a fault, or raise it."""
        if self._strict:
            raise error
        if self.fault is None:
            self.fault = error
            _logger.error("The drafter failed; decoding goes on plainly.", exc_info=error)
        self._in_a_row += 1
        if self._in_a_row == _MOST_IN_A_ROW and not self.off:
            self.off = True
            _logger.error(
                "The drafter failed %d times in a row and is switched off.", _MOST_IN_A_ROW
            )

    def worked(self) -> None:
        """Note that the drafter has drafted."""
        self._in_a_row = 0


class _Guard:
    """The context manager of `Shield.over`; a generator's would cost a plain round more."""

    __slots__ = ("_requests", "_shield")

    def __init__(self, shield: Shield, requests: Sequence[ActiveRequest]) -> None:
        self._shield, self._requests = shield, requests

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> bool:
        # Whatever exception it is, the requests can do without the drafter.
        return isinstance(error, Exception) and self._shield.failed(error, self._requests)
