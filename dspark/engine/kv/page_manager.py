"""KV page manager: allocation, prefix reuse and eviction.

A page is in one of three states:

free    nobody holds it, and nothing of worth is in it
kept    nobody holds it, but its tokens find it (a full page of an ended request): evictable
held    one request or more have it in their tables; findable too, once it is registered

A page is found by its own tokens and all tokens before it (`prefix_cache.py`). A new run of pages
goes where it can stay one piece while it grows (`page_allocator.py`): pages after its own are its
window, which others leave alone as long as they have another choice.

No tensors here: the rows themselves are the caches' (`attention/paged_cache.py`).
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence

import numpy as np

from dspark.engine.kv.page_allocator import BUSY, Ages, Windows, place
from dspark.engine.kv.prefix_cache import PrefixTree
from dspark.errors import UsageError


class PoolFault(AssertionError):
    """The account of pages is wrong, or was used wrongly: a fault of this program."""


class PagePool:
    """The account of a fixed number of pages.

    Args:
        pages: how many there are.
        page_size: tokens per page.
        extent: new runs begin at multiples of this where they can; the pages of the longest
            request, so that all runs lie at equal distances.
        reuse: whether pages can be found by their tokens. Without, nothing is ever kept.

    Attributes:
        lookups: prompts for which `match` looked.
        hit_tokens: tokens that it found.
        evictions: kept pages that were given up.

    Raises:
        UsageError: a size is below 1.
    """

    def __init__(
        self, pages: int, page_size: int = 16, extent: int = 1, reuse: bool = True
    ) -> None:
        for name, value in (("pages", pages), ("page_size", page_size), ("extent", extent)):
            if value < 1:
                raise UsageError(f"{name} of the cache is {value}, but must be at least 1.")
        self.pages = pages
        self.page_size = page_size
        self.extent = extent
        self.reuse = reuse
        self.lookups = self.hit_tokens = self.evictions = 0
        self._tree = PrefixTree(page_size)
        self._holds = [0] * pages
        self._in_use = 0
        self._kept: OrderedDict[int, None] = OrderedDict()  # the longest unused first
        self._clock = 0
        # Written one by one; the view is for placement, which reads all at once.
        self._age = array("q", bytes(8 * pages))  # 0 free, BUSY held, time of last use if kept
        self._ages_P: Ages = np.frombuffer(self._age, dtype=np.int64)
        self._windows = Windows(pages)

    @property
    def in_use(self) -> int:
        """Pages that someone holds."""
        return self._in_use

    @property
    def available(self) -> int:
        """Pages that could be allocated now: free and kept ones."""
        return self.pages - self._in_use

    @property
    def kept(self) -> int:
        """Pages that nobody holds, but that can be found."""
        return len(self._kept)

    def peek(self, tokens: Sequence[int]) -> int:
        """How many pages `match` would find, without holding or counting them."""
        return len(self._find(tokens))

    def match(self, tokens: Sequence[int]) -> list[int]:
        """Hold the pages of the longest findable prefix.

        Args:
            tokens: a prompt. One token at least stays uncovered: its row must be computed.

        Returns:
            Its full pages in order, each with one hold more.
        """
        found = self._find(tokens)
        self.lookups += 1
        self.hit_tokens += len(found) * self.page_size
        for page in found:
            if not self._holds[page]:
                del self._kept[page]
                self._age[page] = BUSY
                self._in_use += 1
            self._holds[page] += 1
        return found

    def _find(self, tokens: Sequence[int]) -> list[int]:
        most = max(len(tokens) - 1, 0) // self.page_size
        return self._tree.find(tokens, most) if self.reuse else []

    def can_allocate(self, count: int, beside: Sequence[int] = ()) -> bool:
        """Whether `count` pages are available, once the prefix of `beside` is held as well."""
        waking = sum(not self._holds[page] for page in self._find(beside)) if beside else 0
        return count <= self.available - waking

    def allocate(self, count: int, after: int | None = None, room: int = 0) -> list[int] | None:
        """Take pages, each with one holder; kept pages are evicted where need be.

        Args:
            count: how many.
            after: the last page of the run that is to grow: its neighbours come first.
            room: how many pages a new run may need in all, these included.

        Returns:
            The pages in order; None, and nothing has changed, if fewer are available.

        Raises:
            PoolFault: `after` is held by nobody.
        """
        if after is not None and not self._holds[after]:
            raise PoolFault(f"A run is to grow behind page {after}, which nobody holds.")
        if count > self.available:
            return None
        taken: list[int] = []
        if after is not None:
            taken, left = self._grow(after, count)
            room = max(room - len(taken), left)
        if len(taken) < count:
            taken += self._begin(count - len(taken), room)
        return taken

    def _grow(self, tail: int, count: int) -> tuple[list[int], int]:
        """Take up to `count` neighbours behind `tail`; they, and how much room is lost if fewer."""
        begin = end = tail + 1
        limit = min(begin + count, self.pages)
        while end < limit and not self._holds[end] and self._windows.lets(end, tail):
            self._take(end)
            end += 1
        if end == begin + count:
            self._windows.move(tail, end - 1)
            return list(range(begin, end)), 0
        return list(range(begin, end)), self._windows.close(tail) - (end - begin)

    def _begin(self, count: int, room: int) -> list[int]:
        """Take pages for a new run and open its window."""
        unclaimed_P = self._windows.unclaimed(self._ages_P)
        placement = place(unclaimed_P, count, room, self.extent)
        placement = placement or place(self._ages_P, count, room, self.extent)
        assert placement is not None, "the caller knows that there are enough"
        pages = placement.pages
        for page in pages:
            self._take(page)
        if placement.end:
            self._windows.open(pages[0], pages[-1], placement.end)
        return pages

    def _take(self, page: int) -> None:
        if self._age[page]:
            self._evict(page)
        self._holds[page] = 1
        self._age[page] = BUSY
        self._in_use += 1

    def _evict(self, page: int) -> None:
        """Forget a kept page, and all that could be found only behind it."""
        for each in self._tree.cut(page):
            if not self._holds[each]:
                del self._kept[each]
                self._age[each] = 0
                self.evictions += 1

    def register(self, tokens: Sequence[int], pages: Sequence[int]) -> None:
        """Make full pages findable.

        Where an equal page is findable already, that one stays so, and the new one is not.

        Args:
            tokens: that the pages hold, from the request's first on; an unfinished page's are
                passed over.
            pages: of these tokens, in order; held.

        Raises:
            PoolFault: a page is held by nobody, or findable by other tokens.
        """
        if not self.reuse:
            return
        for page in pages:
            if not self._holds[page]:
                raise PoolFault(f"Page {page} is to be findable, but nobody holds it.")
        try:
            self._tree.add(tokens, pages)
        except ValueError as error:
            raise PoolFault(str(error)) from error

    def release(self, pages: Sequence[int]) -> None:
        """Give up one hold on each page.

        Findable pages that nobody holds any more are kept; they and all before them count as just
        used, the deepest least, so that leaves are evicted before what they stand on.

        Raises:
            PoolFault: a page is held less often than it is released; nothing has changed.
        """
        for page, times in Counter(pages).items():
            if self._holds[page] < times:
                raise PoolFault(
                    f"Page {page} is released {times} times, but held {self._holds[page]} times."
                )
        for page in pages:
            self._holds[page] -= 1
            if not self._holds[page]:
                self._in_use -= 1
                self._age[page] = 0
                self._windows.close(page)
        for page in self._tree.with_ancestors(pages):
            if not self._holds[page]:
                self._clock += 1
                self._age[page] = self._clock
                self._kept[page] = None
                self._kept.move_to_end(page)

    def discard(self, pages: Sequence[int]) -> list[int]:
        """Make held pages, and all behind them, unfindable.

        Returns:
            Those of them that only one holds.
        """
        for page in pages:
            if page in self._tree:
                self._evict(page)
        return [page for page in pages if self._holds[page] == 1]

    def evict_all(self) -> None:
        """Free every kept page; held ones stay with their holders, but can be found no more."""
        self._tree.clear()
        self.evictions += len(self._kept)
        for page in self._kept:
            self._age[page] = 0
        self._kept.clear()

    def check(self, holders: Mapping[str, Sequence[int]] | None = None) -> None:
        """Prove that every page is in one state, and held by whom it should be.

        Linear in the pool: for idle moments and tests.

        Args:
            holders: the pages of everyone who holds any, by name; None compares nobody's.

        Raises:
            PoolFault: what is wrong, the first faults in full.
        """
        faults = [*self._state_faults(), *self._tree.faults(), *self._windows.faults(self._holds)]
        if holders is not None:
            faults += self._holder_faults(holders)
        if faults:
            more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
            raise PoolFault(f"The cache is inconsistent: {'; '.join(faults[:3])}{more}.")

    def _state_faults(self) -> list[str]:
        found = []
        for page, (holds, age) in enumerate(zip(self._holds, self._age, strict=True)):
            state = "held" if age == BUSY else "kept" if age else "free"
            if (holds > 0) != (state == "held") or holds < 0:
                found.append(f"page {page} is {state}, but held {holds} times")
            if (page in self._kept) != (state == "kept"):
                found.append(f"page {page} is {state}, which the order of eviction denies")
            if state != "held" and (page in self._tree) != (state == "kept"):
                found.append(f"page {page} is {state}, which the prefix tree denies")
        if self._in_use != sum(holds > 0 for holds in self._holds):
            found.append(f"{self._in_use} pages are said to be held, which is not their number")
        return found + self._order_faults()

    def _order_faults(self) -> list[str]:
        ages = [self._age[page] for page in self._kept]
        found = [] if ages == sorted(set(ages)) else ["the order of eviction is not that of use"]
        limits: dict[int, int] = {}  # no kept page may be younger than a kept one before it
        for page in reversed(self._tree.with_ancestors(list(self._kept))):
            limit = limits.get(self._tree.parent(page), BUSY)
            if limit <= self._age[page] != BUSY:
                found.append(f"page {page} would be evicted after one that it stands on")
            limits[page] = min(limit, self._age[page])
        return found

    def _holder_faults(self, holders: Mapping[str, Sequence[int]]) -> list[str]:
        counts = Counter(page for pages in holders.values() for page in pages)
        found = []
        for page in sorted({*range(self.pages), *counts}):
            holds = self._holds[page] if 0 <= page < self.pages else 0
            if counts[page] != holds:
                names = [name for name, pages in holders.items() if page in pages] or ["nobody"]
                found.append(
                    f"page {page} is held {holds} times, but is in the tables of "
                    f"{', '.join(names)} {counts[page]} times"
                )
        return found
