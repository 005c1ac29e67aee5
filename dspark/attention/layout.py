"""The ragged batch: all tokens of all requests in one row, and which part belongs to whom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dspark.attention.pages import BlockTable

Part = tuple[BlockTable | None, int, Sequence[int]]
"""A request's table (None where nothing is cached), position of its first token, its tokens."""


@dataclass(frozen=True)
class Segment:
    """One request's tokens within a ragged batch.

    Attributes:
        table: pages of the request; empty where nothing is cached.
        start: position of the first token, which is the number of cached tokens before it.
        length: number of tokens.
        first: first row of the table that holds anything (a drafter's rows may stand one behind).
    """

    table: BlockTable
    start: int
    length: int
    first: int = 0

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
        rows_T: pool row of each token, int64 [T]; zeros where nothing is cached.
        segments: one entry per request, in row order.
        offsets: rows of segment i are `offsets[i]:offsets[i + 1]`.
        memo: what attention derives from the layout once and uses in every layer.
    """

    input_ids_T: Tensor
    positions_T: Tensor
    rows_T: Tensor
    segments: tuple[Segment, ...]
    offsets: tuple[int, ...]
    memo: dict[tuple[object, ...], Any] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def build(
        cls, parts: Sequence[Part], device: torch.device | str = "cpu", *, first: int = 0
    ) -> RaggedBatch:
        """Flatten `(table, start, token_ids)` of each request into one row.

        Args:
            parts: per request its table, the position of its first token here, its tokens.
            device: where the index tensors go.
            first: of every segment.

        Returns:
            The batch; empty requests keep their (empty) segment.

        Raises:
            IndexError: a table has not enough pages for its tokens.
        """
        ids, positions, rows = list[int](), list[int](), list[int]()
        segments, offsets = list[Segment](), [0]
        for table, start, token_ids in parts:
            length = len(token_ids)
            ids.extend(token_ids)
            positions.extend(range(start, start + length))
            rows.extend([0] * length if table is None else table.rows(start, start + length))
            segments.append(Segment(_NO_PAGES if table is None else table, start, length, first))
            offsets.append(offsets[-1] + length)
        packed_3T = torch.tensor([ids, positions, rows], dtype=torch.int64, device=device)
        ids_T, positions_T, rows_T = packed_3T.view(3, -1).unbind(0)
        return cls(ids_T, positions_T, rows_T, tuple(segments), tuple(offsets))

    def rows_behind(self) -> Tensor:
        """Pool row of the position after each token, [T]."""
        rows = [row for s in self.segments for row in s.table.rows(s.start + 1, s.end + 1)]
        return torch.tensor(rows, dtype=torch.int64, device=self.rows_T.device)


_NO_PAGES = BlockTable()
