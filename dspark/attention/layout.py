"""The ragged batch: all tokens of all requests in one row, and which part belongs to whom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """One request's tokens within a ragged batch.

    Attributes:
        slot: cache slot of the request.
        start: position of the first token, which is the number of cached tokens before it.
        length: number of tokens.
    """

    slot: int
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
        slots_T: cache slot of each token, int64 [T].
        segments: one entry per request, in row order.
        offsets: rows of segment i are `offsets[i]:offsets[i + 1]`.
        memo: what attention derives from the layout once and uses in every layer.
    """

    input_ids_T: Tensor
    positions_T: Tensor
    slots_T: Tensor
    segments: tuple[Segment, ...]
    offsets: tuple[int, ...]
    memo: dict[tuple[object, ...], Any] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def build(
        cls, parts: Sequence[tuple[int, int, Sequence[int]]], device: torch.device | str = "cpu"
    ) -> RaggedBatch:
        """Flatten `(slot, start, token_ids)` of each request into one row.

        Args:
            parts: per request its cache slot, the position of its first token here, its tokens.
            device: where the index tensors go.

        Returns:
            The batch; empty requests keep their (empty) segment.
        """
        rows: list[list[int]] = [[], [], []]
        segments: list[Segment] = []
        offsets = [0]
        for slot, start, token_ids in parts:
            length = len(token_ids)
            rows[0].extend(token_ids)
            rows[1].extend(range(start, start + length))
            rows[2].extend([slot] * length)
            segments.append(Segment(slot, start, length))
            offsets.append(offsets[-1] + length)
        packed_3T = torch.tensor(rows, dtype=torch.int64, device=device).view(3, -1)
        ids_T, positions_T, slots_T = packed_3T.unbind(0)
        return cls(ids_T, positions_T, slots_T, tuple(segments), tuple(offsets))
