"""Anchors and their blocks: which tokens start a block, and what each slot must predict.

FORMAT_FACTS.md B.1. Only blocks that exist are made, so nothing is computed for an anchor that does
not. All of it is made on the CPU, where counting stops no accelerator, and then moved.
Letters: T rows of packed samples, M blocks of all samples, K slots of a block, N supervised slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dspark.attention.packed import BlockLayout
from dspark.data.samples import SampleBatch
from dspark.training.losses.chunked import LawRows


@dataclass(frozen=True)
class AnchorBlocks:
    """The blocks of packed samples; slot j of anchor a predicts token a + j + 1.

    Attributes:
        first_M: row of the first token of each block's sample, on the CPU.
        anchors_M: row of each anchor, on the CPU.
        tokens_M: the anchor tokens, input of slot 0.
        positions_MK: position (in its sample) of the token before each label, and of the slot that
            predicts it, unless the drafter throws the anchor's slot away.
        previous_MK: the true token before each slot's label (teacher forcing).
        labels_MK: the token that each slot predicts.
        supervised_MK: True where a slot counts: its label and all labels before it in the block are
            in range and inside the loss mask.
        rows: the supervised slots, as m K + k, by the row whose law teaches them.
    """

    first_M: Tensor
    anchors_M: Tensor
    tokens_M: Tensor
    positions_MK: Tensor
    previous_MK: Tensor
    labels_MK: Tensor
    supervised_MK: Tensor
    rows: LawRows

    @classmethod
    def build(cls, batch: SampleBatch, anchors_M: Tensor, block_size: int) -> AnchorBlocks:
        """The blocks that start at given anchors.

        Args:
            batch: packed samples, on the CPU.
            anchors_M: rows, ascending, as `sample_anchors` gives them.
            block_size: K.
        """
        slots = torch.arange(block_size)
        rows_MK = anchors_M.unsqueeze(1) + slots
        labelled = rows_MK + 1
        inside = labelled < batch.ends_T[anchors_M].unsqueeze(1)
        labelled = labelled.clamp(max=batch.input_ids_T.numel() - 1)
        labels, tokens = batch.input_ids_T[labelled], batch.input_ids_T[anchors_M]
        supervised = (batch.loss_mask_T[labelled] & inside).cumprod(dim=1).bool()
        positions = batch.positions_T[anchors_M]
        return cls(
            first_M=anchors_M - positions,
            anchors_M=anchors_M,
            tokens_M=tokens,
            positions_MK=positions.unsqueeze(1) + slots,
            previous_MK=torch.cat((tokens.unsqueeze(1), labels[:, :-1]), dim=1),
            labels_MK=labels,
            supervised_MK=supervised,
            rows=LawRows.build(rows_MK, supervised),
        )

    def layout(self, slots: int) -> BlockLayout:
        """What every slot may look at, for a drafter that runs so many slots a block.

        Args:
            slots: its config's `block_size`: K, or K + 1 with `sample_from_anchor` false.
        """
        return BlockLayout(self.first_M, self.anchors_M, slots)

    def to(self, device: torch.device) -> AnchorBlocks:
        """The same on a device, but for what attention counts with on the CPU."""
        names = ("tokens_M", "positions_MK", "previous_MK", "labels_MK", "supervised_MK", "rows")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


def sample_anchors(
    batch: SampleBatch, max_anchors: int, generators: Sequence[torch.Generator]
) -> Tensor:
    """Draw anchors uniformly without replacement.

    A candidate is an answer token whose next token is one too, so an answer's first token, which
    the target draws at prefill, is no label.

    Args:
        batch: packed samples, on the CPU.
        max_anchors: most anchors per sample.
        generators: source of randomness of each sample, on the CPU; one of its own, so that a
            sample's anchors do not depend on which others share its batch.

    Returns:
        Rows [M] of the packed samples, ascending.
    """
    found, first = [torch.zeros(0, dtype=torch.long)], 0
    for length, generator in zip(batch.lengths, generators, strict=True):
        mask = batch.loss_mask_T[first : first + length]
        candidates = (mask[:-1] & mask[1:]).nonzero().flatten()
        order = torch.randperm(candidates.numel(), generator=generator)[:max_anchors]
        found.append(first + candidates[order].sort().values)
        first += length
    return torch.cat(found)
