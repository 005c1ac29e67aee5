"""Paged KV cache: keys and values in pages of a few tokens, and block tables of requests.

A page holds the rows of `page_size` tokens. A request's pages may lie anywhere in the pool and may
be shared with others; its block table names them in order. A table is always right; neighbouring
pages are merely faster on a CPU, where attention then reads a request's keys in place.
"""

from __future__ import annotations

import math
import mmap
import sys
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PAGE_SIZE = 16
"""Tokens per page, unless said otherwise."""

# From this many runs on, one scattered write of up to so many rows is quicker than a copy each.
_SCATTER_RUNS, _SCATTER_ROWS = 3, 256


@dataclass(frozen=True)
class CacheShape:
    """What one layer caches per token.

    Attributes:
        kv_heads: number of key and value heads, G.
        key_dim: numbers per key head.
        value_dim: numbers per value head.
    """

    kv_heads: int
    key_dim: int
    value_dim: int


class BlockTable:
    """The pages of one request, in order.

    Its rows are rows of the pool: position p stands at `pages[p // page_size] * page_size +
    p % page_size`. Stretches of neighbouring pages are noted as pages come and go, so that asking
    for them costs nothing per page.

    Args:
        pages: the first pages.
        page_size: tokens per page.
    """

    def __init__(self, pages: Iterable[int] = (), page_size: int = PAGE_SIZE) -> None:
        self.page_size = page_size
        self._pages: list[int] = []
        # Per run of neighbouring pages: its first position, and that position's pool row.
        self._starts: list[int] = []
        self._rows: list[int] = []
        self.extend(pages)

    @property
    def pages(self) -> Sequence[int]:
        """The pages; change them through the methods only."""
        return self._pages

    @property
    def capacity(self) -> int:
        """How many tokens the pages hold."""
        return len(self._pages) * self.page_size

    def append(self, page: int) -> None:
        """Add a page behind the others."""
        if not self._pages or page != self._pages[-1] + 1:
            self._starts.append(self.capacity)
            self._rows.append(page * self.page_size)
        self._pages.append(page)

    def extend(self, pages: Iterable[int]) -> None:
        """Add pages behind the others."""
        for page in pages:
            self.append(page)

    def rows(self, begin: int, end: int) -> Sequence[int]:
        """The pool row of each position begin:end."""
        runs = self.runs(begin, end)
        if len(runs) == 1:
            [(row, count)] = runs
            return range(row, row + count)
        return [own for row, count in runs for own in range(row, row + count)]

    def runs(self, begin: int, end: int) -> list[tuple[int, int]]:
        """Positions begin:end as maximal stretches of neighbouring pool rows: (row, count)."""
        if begin >= end:
            return []
        assert end <= self.capacity, f"{end} rows are asked of pages that hold {self.capacity}"
        starts, rows = self._starts, self._rows
        if len(starts) == 1:
            return [(rows[0] + begin, end - begin)]
        found: list[tuple[int, int]] = []
        run = bisect_right(starts, begin) - 1
        while begin < end:
            stop = min(end, starts[run + 1]) if run + 1 < len(starts) else end
            found.append((rows[run] + begin - starts[run], stop - begin))
            begin, run = stop, run + 1
        return found


def _zeros_on_demand(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros of a private mapping: the system gives memory where it is first written to."""
    size = math.prod(shape) * dtype.itemsize
    if not size:
        return torch.zeros(tuple(shape), dtype=dtype)
    flags = {} if sys.platform == "win32" else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}
    memory = mmap.mmap(-1, size, **flags)
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(tuple(shape))


class PagedCache:
    """Keys and values of every layer for a fixed number of pages, which all requests share.

    The cache does not know whose rows are valid: its owner does, and passes block tables and
    lengths. Writing a row again replaces it, so rejected tokens need no clean-up.

    The public methods speak of rows of the pool. A layer is seen as [1, G, rows, D]; on a CPU it
    also lies so, one head's keys together, as the matrix product reads them. Elsewhere it lies
    token by token, as kernels with a block table want it.
    """

    def __init__(
        self,
        shapes: Sequence[CacheShape],
        pages: int,
        page_size: int = PAGE_SIZE,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        by_token: bool | None = None,
    ) -> None:
        """Allocate zeroed memory.

        Args:
            shapes: one entry per layer.
            pages: how many pages there are.
            page_size: tokens per page.
            dtype: of keys and values.
            device: where they live.
            by_token: whether memory is laid out token by token; by default, unless on a CPU.
        """
        self.shapes = tuple(shapes)
        self.pages = pages
        self.page_size = page_size
        self.dtype = dtype
        self.device = torch.device(device)
        self.by_token = self.device.type != "cpu" if by_token is None else by_token
        self._memory: list[Tensor] = []  # [layers, G, rows, D], of equal heads each
        self._keys = self._allocate([(s.kv_heads, s.key_dim) for s in self.shapes])
        self._values = self._allocate([(s.kv_heads, s.value_dim) for s in self.shapes])

    def _allocate(self, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Memory of layers of so many heads and numbers per head, each [1, G, rows, D]."""
        # Zeroed, because rows that a mask hides still enter a product with weight 0.
        views = dict[tuple[int, int], list[Tensor]]()
        for heads, dim in set(sizes):
            layers = sizes.count((heads, dim))
            shape = (self.rows, heads, dim) if self.by_token else (heads, self.rows, dim)
            if self.device.type == "cpu":
                memory = _zeros_on_demand((layers, *shape), self.dtype)
            else:
                memory = torch.zeros((layers, *shape), dtype=self.dtype, device=self.device)
            self._memory.append(memory.transpose(1, 2) if self.by_token else memory)
            views[heads, dim] = [self._memory[-1].narrow(0, i, 1) for i in range(layers)]
        return [views[size].pop(0) for size in sizes]

    @property
    def rows(self) -> int:
        """How many tokens all pages hold."""
        return self.pages * self.page_size

    @property
    def bytes(self) -> int:
        """Memory held by keys and values."""
        return sum(memory.numel() * memory.element_size() for memory in self._memory)

    def write(self, layer: int, rows_T: Tensor, key_TGD: Tensor, value_TGD: Tensor) -> None:
        """Store one row per token, in place of what was there."""
        self._keys[layer][0].index_copy_(1, rows_T, key_TGD.transpose(0, 1))
        self._values[layer][0].index_copy_(1, rows_T, value_TGD.transpose(0, 1))

    def write_runs(
        self,
        layer: int,
        rows_T: Tensor,
        runs: Sequence[tuple[int, int, int]],
        key_1GTD: Tensor,
        value_1GTD: Tensor,
    ) -> None:
        """`write` for rows given head by head, a copy per run where that is quicker.

        Args:
            layer: index of the layer.
            rows_T: pool row of each token.
            runs: the same as (pool row, token, count) of neighbouring rows.
            key_1GTD: keys of the tokens.
            value_1GTD: their values.
        """
        keys, values, tokens = self._keys[layer], self._values[layer], key_1GTD.shape[2]
        many = len(runs) >= _SCATTER_RUNS
        if many and (tokens <= _SCATTER_ROWS or self.device.type != "cpu"):
            keys.index_copy_(2, rows_T, key_1GTD)
            values.index_copy_(2, rows_T, value_1GTD)
            return
        if len(runs) == 1:
            [(row, _, count)] = runs
            keys.narrow(2, row, count).copy_(key_1GTD)
            values.narrow(2, row, count).copy_(value_1GTD)
            return
        for row, token, count in runs:
            keys.narrow(2, row, count).copy_(key_1GTD.narrow(2, token, count))
            values.narrow(2, row, count).copy_(value_1GTD.narrow(2, token, count))

    def clear(self, rows: Sequence[int]) -> None:
        """Zero rows of every layer.

        Needed only where they may be NaN or infinite: rows that a mask hides still enter a
        product, with weight 0.
        """
        rows_T = torch.tensor(rows, dtype=torch.int64, device=self.device)
        for memory in self._memory:
            memory.index_fill_(2, rows_T, 0)

    def move(self, rows_N: Tensor, to_N: Tensor) -> None:
        """Copy rows of every layer to other rows; all are read before any is written."""
        for memory in self._memory:
            memory.index_copy_(2, to_N, memory.index_select(2, rows_N))

    def copy_pages(self, pages: Sequence[int], to: Sequence[int]) -> None:
        """Copy pages to other pages, layer by layer."""
        tables = (BlockTable(each, self.page_size) for each in (pages, to))
        rows, theirs = (torch.tensor(t.rows(0, t.capacity), device=self.device) for t in tables)
        for layer_GND in (layer for memory in self._memory for layer in memory):
            layer_GND.index_copy_(1, theirs, layer_GND.index_select(1, rows))

    def read(self, layer: int, rows_T: Tensor) -> tuple[Tensor, Tensor]:
        """The rows stored there: keys [T, G, key_dim] and values [T, G, value_dim], copied."""
        key_GTD, value_GTD = self._keys[layer][0, :, rows_T], self._values[layer][0, :, rows_T]
        return key_GTD.transpose(0, 1), value_GTD.transpose(0, 1)

    def pieces(
        self, layer: int, table: BlockTable, begin: int, end: int
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Positions begin:end of a request, run by run: [1, G, rows, D] each, sharing memory."""
        keys, values, runs = self._keys[layer], self._values[layer], table.runs(begin, end)
        return (
            [keys.narrow(2, row, count) for row, count in runs],
            [values.narrow(2, row, count) for row, count in runs],
        )

    def heads(self, layer: int, table: BlockTable, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Positions begin:end of a request: keys and values [1, G, end - begin, D].

        They share memory with the cache where the pages are neighbours, and are copied elsewhere.
        """
        keys, values = self.pieces(layer, table, begin, end)
        if len(keys) == 1:
            return keys[0], values[0]
        return torch.cat(keys, 2), torch.cat(values, 2)

    def spans(
        self, layer: int, row: int, distance: int, count: int, length: int
    ) -> tuple[Tensor, Tensor]:
        """`count` stretches of `length` rows, `distance` rows apart: [count, G, length, D] views.

        Args:
            layer: index of the layer.
            row: first row of the first stretch.
            distance: rows from one stretch's first to the next one's.
            count: number of stretches.
            length: rows of each.
        """
        return (
            _spans(self._keys[layer], row, distance, count, length),
            _spans(self._values[layer], row, distance, count, length),
        )

    def gather(self, layer: int, rows_RS: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [R, S] of the pool as [R, G, S, D], copied."""
        return _gathered(self._keys[layer], rows_RS), _gathered(self._values[layer], rows_RS)

    def pool(self, layer: int) -> tuple[Tensor, Tensor]:
        """A whole layer: keys and values [1, G, rows, D], sharing memory."""
        return self._keys[layer], self._values[layer]

    def by_page(self, layer: int) -> tuple[Tensor, Tensor]:
        """A whole layer: keys and values [pages, page_size, G, D], sharing memory."""
        return _by_page(self._keys[layer], self), _by_page(self._values[layer], self)


def _spans(pool_1GND: Tensor, row: int, distance: int, count: int, length: int) -> Tensor:
    _, groups, _, dim = pool_1GND.shape
    _, by_head, by_row, by_number = pool_1GND.stride()
    return pool_1GND.as_strided(
        (count, groups, length, dim),
        (distance * by_row, by_head, by_row, by_number),
        pool_1GND.storage_offset() + row * by_row,
    )


def _by_page(pool_1GND: Tensor, cache: PagedCache) -> Tensor:
    _, groups, _, dim = pool_1GND.shape
    return pool_1GND[0].transpose(0, 1).view(cache.pages, cache.page_size, groups, dim)


def _gathered(pool_1GND: Tensor, rows_RS: Tensor) -> Tensor:
    groups, dim = pool_1GND.shape[1], pool_1GND.shape[3]
    rows_GND = pool_1GND[0].index_select(1, rows_RS.flatten())
    return rows_GND.view(groups, *rows_RS.shape, dim).transpose(0, 1)
