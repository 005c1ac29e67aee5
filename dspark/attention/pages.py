"""Cached keys and values in pages, and the table that says which pages a request has."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PAGE_SIZE = 16
"""Tokens per page."""


class BlockTable:
    """The pages of one request, in the order of its tokens.

    Args:
        pages: to begin with.
        page_size: tokens per page.
    """

    __slots__ = ("_runs", "page_size", "pages")

    def __init__(self, pages: Iterable[int] = (), page_size: int = PAGE_SIZE) -> None:
        self.page_size = page_size
        self.pages: list[int] = []
        self._runs: list[tuple[int, int]] = []  # (index of the first page, the page) of each run
        self.extend(pages)

    def extend(self, pages: Iterable[int]) -> None:
        """Append pages."""
        for page in pages:
            if not self.pages or page != self.pages[-1] + 1:
                self._runs.append((len(self.pages), page))
            self.pages.append(page)

    @property
    def capacity(self) -> int:
        """Tokens that it has room for."""
        return len(self.pages) * self.page_size

    @property
    def single_run(self) -> bool:
        """Whether all its pages are neighbours."""
        return len(self._runs) <= 1

    def rows(self, begin: int, end: int) -> list[int]:
        """Pool rows of the positions begin:end."""
        found: list[int] = []
        for first, count in self.runs(begin, end):
            found += range(first, first + count)
        return found

    def runs(self, begin: int, end: int) -> list[tuple[int, int]]:
        """Stretches of neighbouring pool rows that hold the positions begin:end.

        Returns:
            (first row, number of rows) of each, in order; the longest possible stretches.

        Raises:
            IndexError: there are not so many pages.
        """
        if end > self.capacity:
            raise IndexError(f"The table has {self.capacity} rows, but row {end - 1} is wanted.")
        size = self.page_size
        if len(self._runs) == 1:
            return [(self.pages[0] * size + begin, end - begin)] if end > begin else []
        found: list[tuple[int, int]] = []
        for i, (index, page) in enumerate(self._runs):
            after = self._runs[i + 1][0] if i + 1 < len(self._runs) else len(self.pages)
            first, last = max(begin, index * size), min(end, after * size)
            if first < last:
                found.append((page * size + first - index * size, last - first))
        return found


def separate_tables(
    count: int, capacity: int, page_size: int = PAGE_SIZE
) -> tuple[list[BlockTable], int]:
    """Tables of `count` requests of up to `capacity` tokens that share nothing.

    Returns:
        (tables, number of pages that they use together).
    """
    each = -(-capacity // page_size)
    tables = [BlockTable(range(i * each, (i + 1) * each), page_size) for i in range(count)]
    return tables, count * each


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


class PagedCache:
    """Keys and values of every layer, in a pool of pages that block tables point into.

    The cache knows neither who holds a page nor which rows are valid: its owner does, and passes
    tables and lengths. Writing a row again replaces it, so rejected tokens need no clean-up.

    On a CPU a layer is held as [G, rows, D]: one head's keys lie together, as the matrix product
    reads them. Elsewhere as [rows, G, D], which is [pages, page_size, G, D], as paged kernels
    want it. The public methods speak [tokens, G, D].

    Args:
        shapes: one entry per layer.
        pages: how many there are.
        page_size: tokens per page.
        dtype: of keys and values.
        device: where they live.
    """

    def __init__(
        self,
        shapes: Sequence[CacheShape],
        pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.shapes = tuple(shapes)
        self.pages = pages
        self.page_size = page_size
        self.dtype = dtype
        self.device = torch.device(device)
        self.head_major = self.device.type == "cpu"
        # Zeroed, because rows that a mask hides still enter a product with weight 0.
        self._keys = [self._zeros(s.kv_heads, s.key_dim) for s in self.shapes]
        self._values = [self._zeros(s.kv_heads, s.value_dim) for s in self.shapes]

    def _zeros(self, heads: int, dim: int) -> Tensor:
        shape = (heads, self.rows, dim) if self.head_major else (self.rows, heads, dim)
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    @property
    def rows(self) -> int:
        """Tokens that all pages hold together."""
        return self.pages * self.page_size

    @property
    def bytes(self) -> int:
        """Memory held by keys and values."""
        return sum(t.numel() * t.element_size() for t in (*self._keys, *self._values))

    def heads(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of all rows, head by head: [G, rows, D], sharing memory."""
        keys, values = self._keys[layer], self._values[layer]
        return (keys, values) if self.head_major else (keys.transpose(0, 1), values.transpose(0, 1))

    def paged(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values as [pages, page_size, G, D], sharing memory; not on a CPU."""
        assert not self.head_major, "a CPU's cache is held head by head"
        shape = (self.pages, self.page_size, self.shapes[layer].kv_heads)
        keys, values = self._keys[layer], self._values[layer]
        return keys.view(*shape, keys.shape[-1]), values.view(*shape, values.shape[-1])

    def write(self, layer: int, rows_T: Tensor, key_TGD: Tensor, value_TGD: Tensor) -> None:
        """Store one row per token, in place of what was there."""
        axis = 1 if self.head_major else 0
        if self.head_major:
            key_TGD, value_TGD = key_TGD.transpose(0, 1), value_TGD.transpose(0, 1)
        self._keys[layer].index_copy_(axis, rows_T, key_TGD)
        self._values[layer].index_copy_(axis, rows_T, value_TGD)

    def read(self, layer: int, rows_T: Tensor) -> tuple[Tensor, Tensor]:
        """The stored rows: keys [T, G, key_dim] and values, copied."""
        key_GRD, value_GRD = self.heads(layer)
        return (
            key_GRD.index_select(1, rows_T).transpose(0, 1),
            value_GRD.index_select(1, rows_T).transpose(0, 1),
        )

    def span(self, layer: int, table: BlockTable, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values [1, G, end - begin, D] of a request's positions begin:end.

        Where these are neighbours in the pool they share its memory; else they are copied.
        """
        key_GRD, value_GRD = self.heads(layer)
        runs = table.runs(begin, end)
        if len(runs) == 1:
            first, count = runs[0]
            return key_GRD[None, :, first : first + count], value_GRD[None, :, first : first + count]
        keys = [key_GRD[:, first : first + count] for first, count in runs]
        values = [value_GRD[:, first : first + count] for first, count in runs]
        return torch.cat(keys, 1)[None], torch.cat(values, 1)[None]

    def spread(
        self, layer: int, first: int, step: int, count: int, length: int
    ) -> tuple[Tensor, Tensor]:
        """Look at `count` stretches of `length` rows that begin `step` rows apart.

        Returns:
            Keys and values [count, G, length, D], sharing memory.
        """
        key_GRD, value_GRD = self.heads(layer)
        return _strided(key_GRD, first, step, count, length), _strided(
            value_GRD, first, step, count, length
        )


def _strided(rows_GRD: Tensor, first: int, step: int, count: int, length: int) -> Tensor:
    heads, _, dim = rows_GRD.shape
    by_head, by_row, by_number = rows_GRD.stride()
    return rows_GRD.as_strided(
        (count, heads, length, dim),
        (step * by_row, by_head, by_row, by_number),
        rows_GRD.storage_offset() + first * by_row,
    )
