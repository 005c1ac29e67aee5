"""Batches of a few sizes, at fixed addresses: what a recorded step reads.

A row of padding is a request of its own: one token on a page that no request has. So no kernel
needs to know of it, and no row of a request sees it.
"""

from __future__ import annotations

import itertools

import torch
from torch.nn.functional import pad

from dspark.attention.layout import RaggedBatch, Segment
from dspark.attention.padding import SHORT_ROWS
from dspark.attention.pages import BlockTable, PagedCache
from dspark.attention.varlen import MEMO, VarlenLayout, pack_layout

TIERS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""The numbers of rows that steps are filled up to."""


def pad_to_tier(batch: RaggedBatch, scratch: BlockTable) -> RaggedBatch:
    """A batch with rows behind its own, so that it has as many as the smallest tier that fits.

    Args:
        batch: of 1 to `TIERS[-1]` rows.
        scratch: a page that no request has.

    Returns:
        The batch without its empty segments. Each row of padding is token 0 at position 0.
    """
    own = batch.offsets[-1]
    spare = next(tier for tier in TIERS if tier >= own) - own
    [row] = scratch.rows(0, 1)
    packed_3T = torch.stack((batch.input_ids_T, batch.positions_T, batch.rows_T))
    packed_3T = pad(packed_3T, (0, spare))
    packed_3T[2, own:] = row
    segments = [s for s in batch.segments if s.length] + [Segment(scratch, 0, 1)] * spare
    lengths = (segment.length for segment in segments)
    ids_T, positions_T, rows_T = packed_3T.unbind(0)
    return RaggedBatch(
        ids_T,
        positions_T,
        rows_T,
        tuple(segments),
        tuple(itertools.accumulate(lengths, initial=0)),
        (*batch.runs, *((row, own + i, 1) for i in range(spare))),
    )


class Buffers:
    """Memory on the device that holds one batch after another, of any tier.

    Its batches have their layout on the device only (`static`): whatever asks for their segments
    finds none.

    Args:
        cache: whose pages the batches speak of; its last one is no request's.
        max_context: of the target, in tokens.
    """

    def __init__(self, cache: PagedCache, max_context: int) -> None:
        self._scratch = BlockTable((cache.pages - 1,), cache.page_size)
        width = max(1, min(cache.pages - 1, -(-max_context // cache.page_size)))
        most, device = TIERS[-1], cache.device
        self.most_keys = width * cache.page_size
        # Not of inference mode, outside of which such tensors could not be written to.
        with torch.inference_mode(False):
            self._packed_3T = torch.zeros(3, most, dtype=torch.int64, device=device)
            self._starts_R1 = torch.zeros(most + 1, dtype=torch.int32, device=device)
            self._used_R = torch.zeros(most, dtype=torch.int32, device=device)
            self._pages_RP = torch.zeros(most, width, dtype=torch.int32, device=device)

    def holds(self, batch: RaggedBatch) -> bool:
        """Whether a batch is a decoding step that fits."""
        short = all(segment.length <= SHORT_ROWS for segment in batch.segments)
        return 1 <= batch.offsets[-1] <= TIERS[-1] and short and batch.longest <= self.most_keys

    def fill(self, batch: RaggedBatch) -> tuple[int, int]:
        """Take over a batch that fits.

        Returns:
            The tier, and the largest number of rows that a segment may have there.
        """
        batch = pad_to_tier(batch, self._scratch)
        tier = batch.offsets[-1]
        for own, given in zip(
            self._packed_3T, (batch.input_ids_T, batch.positions_T, batch.rows_T), strict=True
        ):
            own[:tier].copy_(given)
        packed = pack_layout(batch, requests=tier)
        width = packed.shape[1] - 2
        self._starts_R1[: tier + 1].copy_(packed[:, 0])
        self._used_R[:tier].copy_(packed[:-1, 1])
        # Pages behind these are an earlier batch's; no length reaches there.
        self._pages_RP[:tier, :width].copy_(packed[:-1, 2:])
        longest = max(segment.length for segment in batch.segments)
        return tier, 1 if longest == 1 else SHORT_ROWS

    def static(self, tier: int, most_rows: int) -> RaggedBatch:
        """The batch that lies here, as tensors that the next one will lie in too."""
        layout = VarlenLayout(
            self._starts_R1[: tier + 1],
            self._used_R[:tier],
            self._pages_RP[:tier],
            most_rows,
            self.most_keys,
        )
        ids_T, positions_T, rows_T = self._packed_3T[:, :tier].unbind(0)
        return RaggedBatch(ids_T, positions_T, rows_T, (), (tier,), (), {MEMO: layout})
