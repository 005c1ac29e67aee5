"""The ragged batch: all tokens of all requests in one row, and which part belongs to whom.

The last rows of a segment may be the nodes of a tree that grows from the row before them. A node's
keys stand where its row stands, so two nodes of one depth have two rows of the cache and one
position; `PagedCache.move` brings the path that stays to where plain decoding would have put it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dspark.attention.paged_cache import PAGE_SIZE, BlockTable

Part = tuple[BlockTable, int, Sequence[int]]
"""(block table of a request, position of its first token here, its tokens here)"""
Parents = Sequence[int]
"""The parent of each node of a draft tree by its number, which is lower; -1 for the root."""


@dataclass(frozen=True)
class Segment:
    """One request's tokens within a ragged batch.

    Attributes:
        table: pages of the request.
        start: position of the first token, which is the number of cached tokens before it.
        length: number of tokens.
    """

    table: BlockTable
    start: int
    length: int

    @property
    def end(self) -> int:
        """Position after the last token: how many cached tokens there are once it is written."""
        return self.start + self.length


@dataclass(frozen=True)
class RaggedBatch:
    """Tokens of several requests, flattened into one row of T tokens.

    Attributes:
        input_ids_T: token ids, int64 [T].
        positions_T: position of each token in its request, int64 [T].
        rows_T: row of each token in the pool of pages, int64 [T].
        segments: one entry per request, in row order.
        offsets: rows of segment i are `offsets[i]:offsets[i + 1]`.
        runs: `rows_T` as stretches of neighbours: (pool row, token, count).
        memo: what attention derives from the layout once and uses in every layer.
        trees: per segment the parents of those of its last rows that are a draft tree
            (`with_trees`); None where every segment is one line of tokens.
    """

    input_ids_T: Tensor
    positions_T: Tensor
    rows_T: Tensor
    segments: tuple[Segment, ...]
    offsets: tuple[int, ...]
    runs: tuple[tuple[int, int, int], ...]
    memo: dict[tuple[object, ...], Any] = field(default_factory=dict, compare=False, repr=False)
    trees: tuple[Parents, ...] | None = None

    @classmethod
    def build(cls, parts: Sequence[Part], device: torch.device | str = "cpu") -> RaggedBatch:
        """Flatten `(table, start, token_ids)` of each request into one row.

        Args:
            parts: per request its block table, which has room for these tokens, the position of
                its first token here, and its tokens.
            device: where the index tensors go.

        Returns:
            The batch; empty requests keep their (empty) segment.
        """
        columns: list[list[int]] = [[], [], []]
        segments: list[Segment] = []
        runs: list[tuple[int, int, int]] = []
        offsets = [0]
        for table, start, token_ids in parts:
            length, token = len(token_ids), offsets[-1]
            columns[0].extend(token_ids)
            columns[1].extend(range(start, start + length))
            for row, count in table.runs(start, start + length):
                columns[2].extend(range(row, row + count))
                runs.append((row, token, count))
                token += count
            segments.append(Segment(table, start, length))
            offsets.append(token)
        packed_3T = hand_over(columns, torch.device(device)).view(3, -1)
        ids_T, positions_T, rows_T = packed_3T.unbind(0)
        return cls(ids_T, positions_T, rows_T, tuple(segments), tuple(offsets), tuple(runs))

    @classmethod
    def fresh(
        cls, sequences: Sequence[Sequence[int]], device: torch.device | str = "cpu"
    ) -> RaggedBatch:
        """Whole sequences for a forward without a cache, or with one of their own.

        Their pages are numbered from 0 on, as if they alone filled a pool.

        Args:
            sequences: tokens of each, from position 0 on.
            device: where the index tensors go.
        """
        parts, page = list[Part](), 0
        for token_ids in sequences:
            count = -(-len(token_ids) // PAGE_SIZE)
            parts.append((BlockTable(range(page, page + count)), 0, token_ids))
            page += count
        return cls.build(parts, device)

    @property
    def longest(self) -> int:
        """The largest number of tokens that a request has once the batch is written."""
        return max((segment.end for segment in self.segments), default=0)

    def shifted(self, by: int) -> RaggedBatch:
        """As many rows of each request, `by` positions behind these; all token ids are 0."""
        parts = [(own.table, own.start + by, (0,) * own.length) for own in self.segments]
        return RaggedBatch.build(parts, self.rows_T.device)


def hand_over(
    columns: Sequence[Sequence[int]], device: torch.device, dtype: torch.dtype = torch.int64
) -> Tensor:
    """Numbers on a device, in one copy that a GPU makes beside what it is doing."""
    pinned = device.type == "cuda"
    return torch.tensor(columns, dtype=dtype, pin_memory=pinned).to(device, non_blocking=pinned)


def depths(parents: Parents) -> list[int]:
    """Depth of each node: 1 for a child of the root, which is -1."""
    found: list[int] = []
    for parent in parents:
        found.append(1 if parent < 0 else found[parent] + 1)
    return found


def ancestors(parents: Parents) -> npt.NDArray[np.bool_]:
    """Which nodes each node sees, [N, N]: itself and those on its way from the root."""
    sees_NN = np.eye(len(parents), dtype=bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            sees_NN[node] |= sees_NN[parent]
    return sees_NN


def with_trees(batch: RaggedBatch, parents: Sequence[Parents]) -> RaggedBatch:
    """The batch with the last rows of its segments as nodes of trees.

    Args:
        batch: as if every segment were one line of tokens; nothing has been derived from it yet.
        parents: per segment the parent of each of its last rows, as a number among these, before
            the node itself; -1 is the row before the first of them. Of more nodes than the segment
            has rows the first are in the cache.
    """
    positions: list[int] = []
    for segment, own in zip(batch.segments, parents, strict=True):
        root, new = segment.end - len(own) - 1, min(len(own), segment.length)
        positions += range(segment.start, root + 1)
        positions += [root + depth for depth in depths(own)[len(own) - new :]]
    [positions_T] = hand_over([positions], batch.positions_T.device)
    return replace(batch, positions_T=positions_T, trees=tuple(map(tuple, parents)), memo={})


def tree_mask(
    segment: Segment, parents: Parents, begin: int, window: int | None, like: Tensor
) -> Tensor:
    """Additive mask [L, S] of a segment's rows over the keys from position `begin` on.

    Args:
        segment: its last rows are a tree, or the last nodes of one.
        parents: of all its nodes.
        begin: position of the first key.
        window: number of positions that a row sees, its own included; None for all.
        like: gives dtype and device.
    """
    nodes, length, size = len(parents), segment.length, segment.end - begin
    new = min(nodes, length)
    assert begin <= segment.end - nodes, "nodes in the cache and windows do not go together"
    sees_LS = np.tri(length, size, size - length, dtype=bool)
    sees_LS[length - new :, size - nodes :] = ancestors(parents)[nodes - new :]
    if window is not None:
        root = segment.end - nodes - 1
        deep = [root + depth for depth in depths(parents)]
        keys_S = np.array([*range(begin, root + 1), *deep])
        rows_L1 = np.array([*range(segment.start, root + 1), *deep[nodes - new :]])[:, None]
        sees_LS &= keys_S > rows_L1 - window
    mask_LS = np.where(sees_LS, np.float32(0), np.float32("-inf"))
    return torch.from_numpy(mask_LS).to(like.device, like.dtype)
