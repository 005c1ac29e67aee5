"""KV page allocator: places of a new run of pages, neighbours or at equal distances if possible.

A pool is seen here as one number per page: 0 for a free page, the time of its last use for a page
that is kept, `BUSY` for one that must not be taken.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

BUSY = np.iinfo(np.int64).max

Ages = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Placement:
    """Pages for a run.

    Attributes:
        pages: those to take now, in order.
        end: behind the last page that the run may grow into; the pages up to there are
            neighbours. For scattered pages, which have no such room, 0.
    """

    pages: list[int]
    end: int


def place(ages_P: Ages, count: int, room: int, extent: int) -> Placement | None:
    """Find pages for a new run.

    In this order: aligned extents (as many as the run may need) that are empty, the lowest first;
    aligned extents whose most recently used page is the longest out of use; any neighbouring
    pages with room to grow, by the same rule; any neighbouring pages; scattered pages, free ones
    first, then the longest unused. Linear in the pool, but a few vector operations.

    Args:
        ages_P: 0, time of last use, or `BUSY`.
        count: pages wanted now, at least 1.
        room: pages that the run may need in all.
        extent: pages per aligned extent.

    Returns:
        None if fewer than `count` pages are not busy.
    """
    need = max(count, room)
    extents = len(ages_P) // extent
    newest_E = ages_P[: extents * extent].reshape(extents, extent).max(axis=1)
    start = _oldest(_newest(newest_E, -(-need // extent)))
    if start is not None:
        begin = start * extent
        return Placement(list(range(begin, begin + count)), begin + need)
    for size in dict.fromkeys((need, count)):
        start = _oldest(_newest(ages_P, size))
        if start is not None:
            return Placement(list(range(start, start + count)), start + size)
    return _scatter(ages_P, count)


def _newest(ages_N: Ages, size: int) -> Ages:
    """The greatest of each `size` neighbours: [N - size + 1], empty if there are not so many."""
    if size > len(ages_N):
        return ages_N[:0]
    width = 1
    while width * 2 <= size:
        ages_N = np.maximum(ages_N[:-width], ages_N[width:])
        width *= 2
    rest = size - width
    return np.maximum(ages_N[:-rest], ages_N[rest:]) if rest else ages_N


def _oldest(ages_N: Ages) -> int | None:
    """Where the least number stands first; None if every one is busy."""
    if not len(ages_N):
        return None
    index = int(ages_N.argmin())
    return None if ages_N[index] == BUSY else index


def _scatter(ages_P: Ages, count: int) -> Placement | None:
    choice = np.flatnonzero(ages_P != BUSY)
    if len(choice) < count:
        return None
    oldest = choice[np.argsort(ages_P[choice], kind="stable")[:count]]
    return Placement(sorted(oldest.tolist()), 0)  # in order: some may be neighbours


@dataclass(slots=True)
class _Window:
    """Pages begin:end, of which a run holds the first ones."""

    number: int
    begin: int
    end: int


class Windows:
    """Pages that running requests may need next: a hint, which others heed while they can.

    A window belongs to the run that it was opened for, and is known by the run's last page.

    Args:
        pages: of the pool.
    """

    def __init__(self, pages: int) -> None:
        self._claims = array("q", bytes(8 * pages))  # number of a page's window, 0 for none
        self._claims_P: Ages = np.frombuffer(self._claims, dtype=np.int64)
        self._by_tail: dict[int, _Window] = {}
        self._last_number = 0

    def lets(self, page: int, tail: int) -> bool:
        """Whether nobody but the run that ends with `tail` has a claim to a page."""
        number = self._claims[page]
        if not number:
            return True
        window = self._by_tail.get(tail)
        return window is not None and window.number == number

    def unclaimed(self, ages_P: Ages) -> Ages:
        """The pool as a new run should see it: claimed pages are busy."""
        return np.where(self._claims_P == 0, ages_P, BUSY) if self._by_tail else ages_P

    def open(self, begin: int, tail: int, end: int) -> None:
        """Claim the pages up to `end` for a new run of begin to `tail`; others' claims yield."""
        self._last_number += 1
        self._by_tail[tail] = _Window(self._last_number, begin, end)
        self._claims_P[begin:end] = self._last_number

    def move(self, tail: int, new_tail: int) -> None:
        """A run has grown from `tail` to `new_tail`."""
        window = self._by_tail.pop(tail, None)
        if window is not None:
            window.end = max(window.end, new_tail + 1)
            self._by_tail[new_tail] = window
            self._claims_P[tail + 1 : new_tail + 1] = window.number

    def close(self, tail: int) -> int:
        """Give up the window of a run, if it has one; how many pages of it lie behind `tail`."""
        window = self._by_tail.pop(tail, None)
        if window is None:
            return 0
        claims_W = self._claims_P[window.begin : window.end]
        claims_W[claims_W == window.number] = 0
        return window.end - tail - 1

    def faults(self, holds: Sequence[int]) -> list[str]:
        """What is inconsistent, one sentence each."""
        found = []
        windows = {window.number: window for window in self._by_tail.values()}
        for tail, window in self._by_tail.items():
            if not window.begin <= tail < window.end <= len(holds):
                found.append(f"the window {window.begin}:{window.end} is of a run up to {tail}")
            elif not holds[tail]:
                found.append(f"a window behind page {tail} is open, but nobody holds the page")
        for page in np.flatnonzero(self._claims_P).tolist():
            owner = windows.get(self._claims[page])
            if owner is None or not owner.begin <= page < owner.end:
                found.append(f"page {page} is claimed by a window that it is not in")
        return found
