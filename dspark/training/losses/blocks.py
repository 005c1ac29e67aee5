"""Block drafters: anchors, their blocks and the losses (eqs. 9-12 of the paper; docs/method.md).

L = ce L_ce + tv L_tv + .. + confidence L_conf, each a mean over supervised slots weighted by w_k =
exp(-k / decay), k = 0 .. K-1. L_tv is sum_v |p_d - p_t|, twice the total variation; the other terms
on distributions are in `terms.TermWeights`.

Only existing blocks are built, so nothing is computed for a missing anchor. They are built on the
CPU, where counting does not synchronise an accelerator, and then moved.

Letters: T rows of packed samples, M blocks of all samples, K slots of a block, N supervised slots,
r Markov rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark.attention.packed import BlockLayout
from dspark.data.samples import SampleBatch
from dspark.drafters.dspark import DSparkDrafter
from dspark.training.losses.chunked import (
    LossInputs,
    LossTerms,
    SupervisedRows,
    chunked_loss,
    suitable_rows,
)
from dspark.training.losses.terms import TermWeights


@dataclass(frozen=True)
class AnchorBlocks:
    """The blocks of packed samples; slot j of anchor a predicts token a + j + 1.

    Attributes:
        first_M: row of the first token of each block's sample, on the CPU.
        anchors_M: row of each anchor, on the CPU.
        tokens_M: the anchor tokens, input of slot 0.
        positions_MK: position (in its sample) of the token before each label, and of the slot that
            predicts it, unless the drafter discards the anchor's slot.
        previous_MK: the true token before each slot's label (teacher forcing).
        labels_MK: the token that each slot predicts.
        supervised_MK: True where a slot counts: its label and all labels before it in the block are
            in range and inside the loss mask.
        rows: the supervised slots, as m K + k, by the target row that teaches them.
    """

    first_M: Tensor
    anchors_M: Tensor
    tokens_M: Tensor
    positions_MK: Tensor
    previous_MK: Tensor
    labels_MK: Tensor
    supervised_MK: Tensor
    rows: SupervisedRows

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
            rows=SupervisedRows.build(rows_MK, supervised),
        )

    def layout(self, slots: int) -> BlockLayout:
        """The attention layout of the blocks.

        Args:
            slots: the config's `block_size`: K, or K + 1 with `sample_from_anchor` false.
        """
        return BlockLayout(self.first_M, self.anchors_M, slots)

    def to(self, device: torch.device) -> AnchorBlocks:
        """A copy on a device, except for the indices that the attention layout needs on the CPU."""
        names = ("tokens_M", "positions_MK", "previous_MK", "labels_MK", "supervised_MK", "rows")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


def sample_anchors(
    batch: SampleBatch, max_anchors: int, generators: Sequence[torch.Generator]
) -> Tensor:
    """Draw anchors uniformly without replacement.

    Candidates are answer tokens followed by an answer token, so an answer's first token, which the
    target draws at prefill, is not a label.

    Args:
        batch: packed samples, on the CPU.
        max_anchors: most anchors per sample.
        generators: one per sample, on the CPU, so that a sample's anchors do not depend on the
            rest of its batch.

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


@dataclass(frozen=True)
class LossWeights(TermWeights):
    """Weights of the losses; the defaults are DSpark's.

    Attributes:
        confidence: weight of the confidence head's binary cross-entropy against
            c* = 1 - |p_d - p_t|_1 / 2.
        decay: slots over which the position weight falls by e.
        detach_confidence: stop the confidence loss at its head; the published recipe lets it train
            backbone and Markov embedding.
    """

    ce: float = 0.1
    tv: float = 0.9
    confidence: float = 1.0
    decay: float = 4.0
    detach_confidence: bool = False


DFLASH_WEIGHTS = LossWeights(ce=1.0, tv=0.0, confidence=0.0)


@dataclass(frozen=True)
class LossReport:
    """Loss and metrics of a batch; all but `loss` are detached.

    Attributes:
        loss: to call backward on.
        ce, tv, kl, lk, confidence: weighted means of the terms; 0 for terms without weight (except
            ce and tv, which are free) and for a missing confidence head.
        accept_rate_K: mean c* of each slot, the probability that a draft is accepted given that
            those before it were; 0 for a slot without supervision.
        accepted_length: mean over blocks of 1 + sum_j prod_{i<=j} c*_i.
        confidence_error: weighted mean |c - c*|.
        confidence_bias: weighted mean c - c*.
        survival_bias: weighted mean of the slots' prod c - prod c*.
        supervised: number of supervised slots.
    """

    loss: Tensor
    ce: Tensor
    tv: Tensor
    kl: Tensor
    lk: Tensor
    confidence: Tensor
    accept_rate_K: Tensor
    accepted_length: Tensor
    confidence_error: Tensor
    confidence_bias: Tensor
    survival_bias: Tensor
    supervised: int


def position_weights(
    blocks: AnchorBlocks, decay: float, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Weights [M, K]: exp(-k / decay) where supervised, else 0."""
    chosen = blocks.supervised_MK
    slots = torch.arange(chosen.shape[1], device=chosen.device, dtype=dtype)
    return chosen * torch.exp(-slots / decay)


def block_loss(
    drafter: DSparkDrafter,
    hidden_MKH: Tensor,
    teacher_TH: Tensor,
    blocks: AnchorBlocks,
    weights: LossWeights,
    *,
    total_weight: Tensor | float | None = None,
    log_total_T: Tensor | None = None,
    chunk_rows: int | None = None,
) -> LossReport:
    """Loss of a batch of blocks.

    Args:
        drafter: its heads map hidden states to distributions.
        hidden_MKH: its hidden states of the blocks.
        teacher_TH: the target's states after its final norm.
        blocks: labels and supervision, on the states' device.
        weights: of the losses.
        total_weight: divisor; None for the sum of this batch's position weights. Give the sum over
            all parts if several share a step.
        log_total_T: of the target's rows, as `totals.LogTotals` keeps them.
        chunk_rows: supervised slots per vocabulary chunk; None for a number that suits the device.
    """
    slots_N, head = blocks.rows.slots_N, drafter.markov_head
    dtype = torch.promote_types(hidden_MKH.dtype, torch.float32)
    weight_N = position_weights(blocks, weights.decay, dtype).flatten()[slots_N]
    normalizer = (weight_N.sum() if total_weight is None else total_weight) + 1e-6
    hidden_NH = hidden_MKH.flatten(0, 1)[slots_N]
    previous_N = blocks.previous_MK.flatten()[slots_N]
    feature_Nr = None
    if head is not None:  # whole blocks, which a recurrent head runs through
        feature_Nr = head.block(blocks.previous_MK, hidden_MKH).flatten(0, 1)[slots_N]
    inputs = LossInputs(
        head=drafter,
        hidden_NH=drafter.head_states(hidden_NH),
        feature_Nr=feature_Nr,
        bias_Vr=None if head is None else head.markov_w2.weight,
        teacher_UH=teacher_TH[blocks.rows.teacher_U],
        labels_N=_known(drafter, blocks.labels_MK.flatten()[slots_N]),
        weight_N=weight_N / normalizer,
        log_total_U=None if log_total_T is None else log_total_T[blocks.rows.teacher_U],
    )
    vocab = drafter.config.draft_vocab_size or drafter.config.vocab_size
    rows_at_once = chunk_rows or suitable_rows(hidden_MKH.device, vocab)
    loss, terms = chunked_loss(inputs, blocks.rows, weights, chunk_rows=rows_at_once)
    # A vanilla head's features are the embeddings that the confidence head reads; sharing the
    # look-up avoids a second vocabulary-sized gradient.
    vanilla = drafter.config.markov_head_type == "vanilla"
    logits_N = drafter.confidence_logits(
        hidden_NH,
        previous_N,
        embedded_Nr=feature_Nr if vanilla else None,
        detach_inputs=weights.detach_confidence,
    )
    confidence = weight_N.new_zeros(())
    if logits_N is not None:
        entropy_N = F.binary_cross_entropy_with_logits(logits_N, terms.accept, reduction="none")
        confidence = (inputs.weight_N * entropy_N).sum()
        loss = loss + weights.confidence * confidence
    return LossReport(
        loss=loss,
        confidence=confidence.detach(),
        supervised=slots_N.numel(),
        **{n: (inputs.weight_N * getattr(terms, n)).sum() for n in ("ce", "tv", "kl", "lk")},
        **_metrics(blocks, weight_N, terms, logits_N),
    )


def _known(drafter: DSparkDrafter, labels_N: Tensor) -> Tensor:
    """Labels as draft-vocabulary ids; -1 for unknown tokens."""
    if drafter.t2d is None:
        return labels_N
    numbers_V = drafter.t2d.cumsum(0).sub_(1)
    return numbers_V[labels_N].where(drafter.t2d[labels_N], -1)


def _metrics(
    blocks: AnchorBlocks, weight_N: Tensor, terms: LossTerms, logits_N: Tensor | None
) -> dict[str, Tensor]:
    chosen_MK, slots_N = blocks.supervised_MK, blocks.rows.slots_N

    def by_block(values_N: Tensor) -> Tensor:
        return (
            values_N.new_zeros(chosen_MK.numel())
            .index_copy_(0, slots_N, values_N)
            .view_as(chosen_MK)
        )

    accept_MK = by_block(terms.accept)
    survival_MK = accept_MK.cumprod(dim=1)
    zero = terms.accept.new_zeros(())
    blocks_count = max(chosen_MK.shape[0], 1)
    metrics = {
        "accept_rate_K": accept_MK.sum(dim=0) / chosen_MK.sum(dim=0).clamp(min=1),
        "accepted_length": (1 + survival_MK.sum(dim=1)).sum() / blocks_count,
        "confidence_error": zero,
        "confidence_bias": zero,
        "survival_bias": zero,
    }
    if logits_N is None or slots_N.numel() == 0:
        return metrics
    predicted_N = logits_N.detach().sigmoid().to(terms.accept.dtype)
    gap_N = predicted_N - terms.accept
    survival_gap_N = (by_block(predicted_N).cumprod(dim=1) - survival_MK).flatten()[slots_N]
    share_N = weight_N / weight_N.sum()
    return metrics | {
        "confidence_error": (share_N * gap_N.abs()).sum(),
        "confidence_bias": (share_N * gap_N).sum(),
        "survival_bias": (share_N * survival_gap_N).sum(),
    }
