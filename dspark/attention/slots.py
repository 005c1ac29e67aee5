"""Cached keys and values: one contiguous stretch of memory per request, called its slot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dspark.attention.layout import RaggedBatch

# Up to this many rows, one scattered write is quicker on a CPU than a copy per segment.
_SCATTER_ROWS = 256


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


class SlotCache:
    """Keys and values of every layer for a fixed number of slots.

    The cache does not know how many tokens of a slot are valid: its owner does, and passes
    lengths. Writing a position again replaces it, so rejected tokens need no clean-up.

    Held as [slots, G, capacity, D] per layer: one head's keys lie together, as the matrix
    product reads them. The public methods speak [tokens, G, D].
    """

    def __init__(
        self,
        shapes: Sequence[CacheShape],
        slots: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        """Allocate zeroed memory.

        Args:
            shapes: one entry per layer.
            slots: number of requests that can be held at once.
            capacity: tokens per slot.
            dtype: of keys and values.
            device: where they live.
        """
        self.shapes = tuple(shapes)
        self.slots = slots
        self.capacity = capacity
        self.dtype = dtype
        self.device = torch.device(device)
        # Zeroed, because rows that a mask hides still enter a product with weight 0.
        self._keys = [
            torch.zeros(slots, s.kv_heads, capacity, s.key_dim, dtype=dtype, device=device)
            for s in self.shapes
        ]
        self._values = [
            torch.zeros(slots, s.kv_heads, capacity, s.value_dim, dtype=dtype, device=device)
            for s in self.shapes
        ]

    @property
    def bytes(self) -> int:
        """Memory held by keys and values."""
        return sum(t.numel() * t.element_size() for t in (*self._keys, *self._values))

    def write(
        self, layer: int, slots_T: Tensor, positions_T: Tensor, key_TGD: Tensor, value_TGD: Tensor
    ) -> None:
        """Store one row per token at (slot, position), in place of what was there."""
        self._keys[layer][slots_T, :, positions_T] = key_TGD
        self._values[layer][slots_T, :, positions_T] = value_TGD

    def clear(self, slot: int, begin: int = 0) -> None:
        """Zero the rows of a slot from `begin` on.

        Needed only where they may be NaN or infinite: rows that a mask hides still enter a
        product, with weight 0.
        """
        for rows in (*self._keys, *self._values):
            rows[slot, :, begin:] = 0

    def read(self, layer: int, slots_T: Tensor, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """The rows stored at (slot, position): keys [T, G, key_dim] and values, copied."""
        return (
            self._keys[layer][slots_T, :, positions_T],
            self._values[layer][slots_T, :, positions_T],
        )

    def write_batch(
        self, layer: int, batch: RaggedBatch, key_1GTD: Tensor, value_1GTD: Tensor
    ) -> None:
        """Store the rows of a ragged batch, given head by head: `write`, but a copy per segment."""
        rows = key_1GTD.shape[2]
        if len(batch.segments) > 2 and (rows <= _SCATTER_ROWS or self.device.type != "cpu"):
            key_TGD, value_TGD = key_1GTD[0].transpose(0, 1), value_1GTD[0].transpose(0, 1)
            self.write(layer, batch.slots_T, batch.positions_T, key_TGD, value_TGD)
            return
        keys, values = self._keys[layer], self._values[layer]
        for segment, row in zip(batch.segments, batch.offsets, strict=False):
            slot, start, end = segment.slot, segment.start, segment.end
            key_GLD, value_GLD = key_1GTD[0], value_1GTD[0]
            if segment.length != rows:
                key_GLD = key_GLD.narrow(1, row, segment.length)
                value_GLD = value_GLD.narrow(1, row, segment.length)
            keys[slot, :, start:end] = key_GLD
            values[slot, :, start:end] = value_GLD

    def view(self, layer: int, slot: int, length: int) -> tuple[Tensor, Tensor]:
        """Look at the first `length` rows of a slot.

        Returns:
            Keys [length, G, key_dim] and values [length, G, value_dim], sharing memory.
        """
        key_GLD = self._keys[layer][slot, :, :length]
        value_GLD = self._values[layer][slot, :, :length]
        return key_GLD.transpose(0, 1), value_GLD.transpose(0, 1)

    def heads(
        self, layer: int, slot: int, begin: int, end: int, slots: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Look at rows begin:end of `slots` neighbouring slots, head by head.

        Returns:
            Keys and values [slots, G, end - begin, D], sharing memory.
        """
        own = slice(slot, slot + slots)
        return self._keys[layer][own, :, begin:end], self._values[layer][own, :, begin:end]
