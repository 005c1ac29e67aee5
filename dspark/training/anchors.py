"""Anchors and their blocks: which tokens start a block, and what each slot must predict.

FORMAT_FACTS.md B.1. Letters: B sequences, S tokens, N anchors per sequence, K slots of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dspark.drafters.backbone import AttentionTile


@dataclass(frozen=True)
class AnchorBlocks:
    """The blocks of a batch; slot j of anchor a has position a + j and predicts token a + j + 1.

    Attributes:
        anchors_BN: anchor positions, int64, ascending; 0 where dropped.
        keep_BN: False for the dummies that fill up a sequence with fewer anchors.
        tokens_BN: the anchor tokens, input of slot 0.
        positions_BNK: position of the token before each label (and of the slot that predicts it,
            unless the drafter throws the anchor's slot away).
        previous_BNK: the true token before each slot's label (teacher forcing).
        labels_BNK: the token that each slot predicts.
        supervised_BNK: True where a slot counts: its block is kept, and its label and all labels
            before it in the block are in range and inside the loss mask.
    """

    anchors_BN: Tensor
    keep_BN: Tensor
    tokens_BN: Tensor
    positions_BNK: Tensor
    previous_BNK: Tensor
    labels_BNK: Tensor
    supervised_BNK: Tensor

    @classmethod
    def build(
        cls,
        input_ids_BS: Tensor,
        loss_mask_BS: Tensor,
        anchors_BN: Tensor,
        keep_BN: Tensor,
        block_size: int,
    ) -> AnchorBlocks:
        """The blocks that start at given anchors.

        Args:
            input_ids_BS: tokens.
            loss_mask_BS: nonzero where a token is an answer's.
            anchors_BN: positions, as `sample_anchors` gives them.
            keep_BN: which of them are real.
            block_size: K.
        """
        last = input_ids_BS.shape[1] - 1
        slots = torch.arange(block_size, device=input_ids_BS.device)
        positions = anchors_BN.unsqueeze(-1) + slots
        labelled = positions + 1
        clamped = labelled.clamp(max=last)
        labels = _at(input_ids_BS, clamped)
        counts = (_at(loss_mask_BS, clamped) != 0) & (labelled <= last) & keep_BN.unsqueeze(-1)
        tokens = _at(input_ids_BS, anchors_BN)
        return cls(
            anchors_BN=anchors_BN,
            keep_BN=keep_BN,
            tokens_BN=tokens,
            positions_BNK=positions,
            previous_BNK=torch.cat((tokens.unsqueeze(-1), labels[..., :-1]), dim=-1),
            labels_BNK=labels,
            supervised_BNK=counts.cumprod(dim=-1).bool(),
        )


def sample_anchors(
    loss_mask_BS: Tensor, max_anchors: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw anchors uniformly without replacement.

    A candidate is an answer token whose next token is one too, so an answer's first token, which
    the target draws at prefill, is no label.

    Args:
        loss_mask_BS: nonzero where a token is an answer's.
        max_anchors: most anchors per sequence.
        generator: source of randomness, on the CPU.

    Returns:
        anchors_BN, ascending, and keep_BN. N is the largest number of anchors that a sequence of
        this batch has, at least 1 and at most `max_anchors`; others are filled up with dummies.
    """
    mask = loss_mask_BS != 0
    candidates = torch.zeros_like(mask)
    candidates[:, :-1] = mask[:, :-1] & mask[:, 1:]
    counts_B = candidates.sum(dim=1)
    anchors = max(1, min(max_anchors, int(counts_B.max())))
    keys_BS = torch.rand(mask.shape, generator=generator, dtype=torch.float64).to(mask.device)
    order_BN = keys_BS.masked_fill(~candidates, 2.0).topk(anchors, dim=1, largest=False).indices
    keep_BN = torch.arange(anchors, device=mask.device) < counts_B.unsqueeze(1)
    behind = mask.shape[1]
    anchors_BN = order_BN.masked_fill(~keep_BN, behind).sort(dim=1).values
    return anchors_BN.masked_fill(anchors_BN == behind, 0), keep_BN


def attention_tiles(
    blocks: AnchorBlocks,
    context_length: int,
    *,
    block_slots: int | None = None,
    anchors_per_tile: int = 16,
) -> list[AttentionTile]:
    """What every slot may look at (FORMAT_FACTS.md A.5), in tiles of neighbouring anchors.

    Slots of anchor a see the context strictly before a, since the target's state at the anchor
    does not exist yet when decoding, and all slots of their own block. Slots of dropped blocks see
    their own block only. Since anchors ascend, a tile needs no context beyond its last anchor and
    no other tile's blocks, which saves half and more of a dense mask's work.

    Args:
        blocks: the blocks.
        context_length: S, the rows of the context.
        block_slots: slots that the drafter runs per block, its config's `block_size`; None for K
            (a drafter with `sample_from_anchor` false has K + 1).
        anchors_per_tile: anchors whose slots share one mask.
    """
    block = blocks.positions_BNK.shape[2] if block_slots is None else block_slots
    columns = torch.arange(context_length, device=blocks.anchors_BN.device)
    tiles = []
    starts = range(0, blocks.anchors_BN.shape[1], anchors_per_tile)
    reach_BN = blocks.anchors_BN * blocks.keep_BN
    limits = [part.amax() for part in torch.split(reach_BN, anchors_per_tile, dim=1)]
    for start, context in zip(starts, torch.stack(limits).tolist(), strict=True):
        reach = reach_BN[:, start : start + anchors_per_tile]
        before = (columns[:context] < reach.unsqueeze(-1)).repeat_interleave(block, dim=1)
        owner = torch.arange(reach.shape[1], device=columns.device).repeat_interleave(block)
        own = (owner.unsqueeze(0) == owner.unsqueeze(1)).expand(reach.shape[0], -1, -1)
        mask_BQP = torch.cat((before, own), dim=-1)
        slots = (start * block, start * block + mask_BQP.shape[1])
        tiles.append(AttentionTile(*slots, context, mask_BQP))
    return tiles


def _at(rows_BS: Tensor, positions: Tensor) -> Tensor:
    """Values of each sequence at positions [B, ...]."""
    return rows_BS.gather(1, positions.flatten(1)).view(positions.shape)
