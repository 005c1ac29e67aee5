"""The block drafters' losses (METHOD.md 3, eqs. 9-12; FORMAT_FACTS.md B.2).

L = ce L_ce + tv L_tv + .. + confidence L_conf, each a mean over supervised slots weighted by
w_k = exp(-k / decay), k = 0 .. K-1. L_tv is sum_v |p_d - p_t|, twice the total variation; the other
terms on laws are in `law_terms.LawWeights`.
Letters: N supervised slots, r Markov rank, the others as in `anchors`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark.drafters.dspark import DSparkDrafter
from dspark.training.anchors import AnchorBlocks
from dspark.training.losses.chunked import LawInputs, LawTerms, law_loss, suitable_rows
from dspark.training.losses.terms import LawWeights


@dataclass(frozen=True)
class LossWeights(LawWeights):
    """How the losses are combined; the defaults are DSpark's.

    Attributes:
        confidence: weight of the confidence head's binary cross-entropy against
            c* = 1 - |p_d - p_t|_1 / 2.
        decay: slots over which the position weight falls by e.
        detach_confidence: keep the confidence loss from training backbone and Markov embedding
            (the published recipe lets it).
    """

    ce: float = 0.1
    tv: float = 0.9
    confidence: float = 1.0
    decay: float = 4.0
    detach_confidence: bool = False


DFLASH_WEIGHTS = LossWeights(ce=1.0, tv=0.0, confidence=0.0)


@dataclass(frozen=True)
class LossReport:
    """Loss of a batch and what to log about it; all but `loss` are detached.

    Attributes:
        loss: to call backward on.
        ce, tv, kl, lk, confidence: the weighted means of the terms; 0 for those on laws that have
            no weight (but ce and tv, which cost nothing more), and for a missing confidence head.
        accept_rate_K: mean c* of each slot, the chance that a draft is kept given that those
            before it were; 0 for a slot without supervision.
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
    chunk_rows: int | None = None,
) -> LossReport:
    """Loss of a batch of blocks.

    Args:
        drafter: whose heads turn hidden states into laws.
        hidden_MKH: its hidden states of the blocks.
        teacher_TH: the target's states after its final norm.
        blocks: labels and supervision, on the states' device.
        weights: how the losses are combined.
        total_weight: what to divide by; None for the sum of this batch's position weights. Give
            the sum over all parts of a step where several share it.
        chunk_rows: supervised slots that meet the vocabulary at once; None for as many as suit
            the device.
    """
    slots_N, head = blocks.rows.slots_N, drafter.markov_head
    dtype = torch.promote_types(hidden_MKH.dtype, torch.float32)
    weight_N = position_weights(blocks, weights.decay, dtype).flatten()[slots_N]
    normalizer = (weight_N.sum() if total_weight is None else total_weight) + 1e-6
    hidden_NH = hidden_MKH.flatten(0, 1)[slots_N]
    previous_N = blocks.previous_MK.flatten()[slots_N]
    feature_Nr = None
    if head is not None:  # whole blocks: a recurrent head goes through them
        feature_Nr = head.block(blocks.previous_MK, hidden_MKH).flatten(0, 1)[slots_N]
    inputs = LawInputs(
        head=drafter,
        hidden_NH=hidden_NH,
        feature_Nr=feature_Nr,
        bias_Vr=None if head is None else head.markov_w2.weight,
        teacher_UH=teacher_TH[blocks.rows.teacher_U],
        labels_N=_known(drafter, blocks.labels_MK.flatten()[slots_N]),
        weight_N=weight_N / normalizer,
    )
    vocab = drafter.config.draft_vocab_size or drafter.config.vocab_size
    rows_at_once = chunk_rows or suitable_rows(hidden_MKH.device, vocab)
    loss, terms = law_loss(inputs, blocks.rows, weights, chunk_rows=rows_at_once)
    # A vanilla head's features are the embeddings that the confidence head reads: looked up once,
    # they have one gradient as large as the vocabulary, not two.
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
    """Labels as the drafter numbers the tokens that it knows; -1 for others."""
    if drafter.t2d is None:
        return labels_N
    numbers_V = drafter.t2d.cumsum(0).sub_(1)
    return numbers_V[labels_N].where(drafter.t2d[labels_N], -1)


def _metrics(
    blocks: AnchorBlocks, weight_N: Tensor, terms: LawTerms, logits_N: Tensor | None
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
