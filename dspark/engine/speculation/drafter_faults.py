"""Drafter faults: an error of a drafter is logged, and the round goes on without drafts."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

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

    @contextmanager
    def over(self, requests: Sequence[ActiveRequest]) -> Iterator[None]:
        """Let the drafter work; if it raises, these requests have no drafter any more."""
        try:
            yield
        except Exception as error:  # whatever it is, the requests can do without the drafter
            if self._strict:
                raise
            self.record(error)
            for request in requests:
                request.decode_plainly()

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
