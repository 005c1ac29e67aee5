"""The engine's memory: one set of pages for the target's rows and the drafter's.

A page of the target's cache and the same page of the drafter's context belong to the same tokens
of the same request, so one block table serves both and a shared prefix is shared, or copied, in
both.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from dspark.attention.paged_cache import PAGE_SIZE, BlockTable, PagedCache
from dspark.drafters.base import Drafter
from dspark.engine.kv.page_manager import PagePool
from dspark.engine.requests.sequence import ActiveRequest
from dspark.engine.speculation.draft_context import DraftContext
from dspark.targets.target import Target

# What a cache may take of the memory that is free, on an accelerator and on a host.
_DEVICE_SHARE, _HOST_SHARE = 0.9, 0.5
_CGROUP = Path("/sys/fs/cgroup")


class Memory:
    """Pages of the running requests, and of finished ones as long as nobody needs theirs.

    Args:
        target: whose keys and values are kept.
        drafter: whose context is kept; None for plain decoding.
        max_requests: requests that run at once at most.
        max_length: tokens of prompt and output of one request at most.
        rows_ahead: rows behind its cached tokens that a request may need in one round.
        cache_tokens: size of the cache; None makes room for `max_requests` of `max_length`, as
            far as a share of the free memory allows.
        memory_share: that share, above 0 and at most 1; .9 on an accelerator and .5 on a host by
            default.
        reuse: whether a prompt takes over the pages of an equal prefix.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None,
        *,
        max_requests: int,
        max_length: int,
        rows_ahead: int,
        cache_tokens: int | None = None,
        memory_share: float | None = None,
        reuse: bool = True,
    ) -> None:
        self._rows_ahead = rows_ahead
        extent = pages_of(max_length + rows_ahead)
        if cache_tokens is None:
            spare = max(1, max_requests // 4) if reuse else 0
            wanted = (max_requests + spare) * extent
            pages = min(wanted, _affordable_pages(target, drafter, memory_share))
        else:
            pages = pages_of(cache_tokens)
        self.pool = PagePool(pages, PAGE_SIZE, extent=min(extent, pages), reuse=reuse)
        self.cache = target.new_cache(pages)
        # Where attention reads a request's keys in place, they should be one piece; and a pool that
        # holds every request whole has room for prefixes of their own.
        self._copies = not self.cache.by_token and pages >= max_requests * extent
        self.context: DraftContext | None = None
        if drafter is not None:
            shapes = drafter.context_shapes
            rows = PagedCache(shapes, pages, PAGE_SIZE, target.dtype, target.device)
            self.context = DraftContext(drafter, rows)

    @property
    def tokens(self) -> int:
        """How many rows there are."""
        return self.pool.pages * PAGE_SIZE

    @property
    def bytes(self) -> int:
        """Memory held by target and drafter."""
        return self.cache.bytes + (self.context.cache.bytes if self.context else 0)

    def fits(self, tokens: int) -> bool:
        """Whether a request of so many tokens, prompt and output, could run alone."""
        return pages_of(tokens + self._rows_ahead) <= self.pool.pages

    def findable(self, request: ActiveRequest) -> int:
        """How many tokens of a request lie in pages that it could take over."""
        return self.pool.peek(_sharable(request)) * PAGE_SIZE

    def admit(self, request: ActiveRequest, spare_pages: int = 0) -> bool:
        """Give a request pages for all its tokens and one round; a prefix is shared or copied.

        Args:
            request: it holds no pages.
            spare_pages: how many pages must stay available.

        Returns:
            Whether there were enough; if not, nothing has changed.
        """
        tokens = _sharable(request)
        pages = pages_of(len(request.tokens) + self._rows_ahead)
        missing = pages - self.pool.peek(tokens)
        if not self.pool.can_allocate(missing + spare_pages, beside=tokens):
            return False
        found = self.pool.match(tokens)
        copies = self._copies and bool(found) and self.pool.can_allocate(pages + spare_pages)
        shared = [] if copies else found
        room = pages_of(request.longest + self._rows_ahead) - len(shared)
        own = self.pool.allocate(pages - len(shared), room=room)
        assert own is not None, "can_allocate has just said so"
        request.table = BlockTable([*shared, *own])
        request.cached, request.shared = len(found) * PAGE_SIZE, len(shared) * PAGE_SIZE
        if copies:
            self._copy(found, own)
        if self.context is not None and found:
            self.context.join(request.table, request.tokens, request.cached)
        return True

    def _copy(self, found: Sequence[int], own: Sequence[int]) -> None:
        """Copy the pages of a prefix to a request's own, and give them up."""
        to = own[: len(found)]
        self.cache.copy_pages(found, to)
        if self.context is not None:
            self.context.copy_pages(found, to)
        self.pool.release(found)

    def grow(self, request: ActiveRequest) -> bool:
        """Make room for one more round of a running request; False if there is none."""
        missing = pages_of(request.cached + 1 + self._rows_ahead) - len(request.table.pages)
        if missing <= 0:
            return True
        pages = self.pool.allocate(missing, after=request.table.pages[-1])
        if pages is None:
            return False
        request.table.extend(pages)
        return True

    def settle(self, request: ActiveRequest) -> None:
        """Let others find what a request has read; nothing of it waits to be written."""
        if request.finish_reason is None and not request.plain:
            self._register(request, request.cached)

    def release(self, request: ActiveRequest) -> None:
        """Take a request's pages back; what is complete of them stays findable."""
        valid = min(request.cached, len(request.tokens))
        if self.context is not None:
            written = self.context.forget(request.table)
            valid = valid if written is None else min(valid, written)
        if request.finish_reason == "error":
            self._discard(request)
        else:
            self._register(request, min(valid, request.observed) if request.plain else valid)
            request.observed = 0
        self.pool.release(request.table.pages)
        request.table, request.cached, request.shared = BlockTable(), 0, 0

    def _register(self, request: ActiveRequest, valid: int) -> None:
        pages = request.table.pages[: valid // PAGE_SIZE]
        self.pool.register(request.tokens[: len(pages) * PAGE_SIZE], pages)

    def _discard(self, request: ActiveRequest) -> None:
        """Let nobody find what may be no numbers, nor meet it in a page that was given back."""
        own = request.table.pages[request.shared // PAGE_SIZE :]
        rows = BlockTable(self.pool.discard(own))
        self.cache.clear(rows.rows(0, rows.capacity))
        if self.context is not None:
            self.context.cache.clear(rows.rows(0, rows.capacity))

    def check(self, running: Sequence[ActiveRequest] = ()) -> None:
        """Prove that every page is held by whom it should be, or by nobody.

        Raises:
            AssertionError: pages were lost, or are held twice.
        """
        self.pool.check({str(r.request_id): r.table.pages for r in running})


def _sharable(request: ActiveRequest) -> Sequence[int]:
    """Tokens that may be found in the cache: none of a request whose rows are all computed."""
    return () if request.reads_all else request.tokens


def pages_of(tokens: int) -> int:
    """Pages that hold so many tokens."""
    return -(-tokens // PAGE_SIZE)


def _affordable_pages(target: Target, drafter: Drafter | None, share: float | None) -> int:
    shapes = [*target.cache_shapes, *(drafter.context_shapes if drafter else ())]
    numbers = sum(s.kv_heads * (s.key_dim + s.value_dim) for s in shapes)
    page_bytes = max(numbers * PAGE_SIZE * target.dtype.itemsize, 1)
    default = _DEVICE_SHARE if target.device.type == "cuda" else _HOST_SHARE
    affordable = free_bytes(target.device) * (default if share is None else share)
    return max(int(affordable) // page_bytes, 1)


def free_bytes(device: torch.device) -> int:
    """Memory that nobody uses: of the accelerator, or of the host within its control group."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    limits = [_available_bytes()]
    with contextlib.suppress(OSError, ValueError):  # no group, or one without a limit
        most, used = (int((_CGROUP / f"memory.{n}").read_text()) for n in ("max", "current"))
        limits.append(max(most - used, 0))
    return min(limits)


def _available_bytes() -> int:
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
