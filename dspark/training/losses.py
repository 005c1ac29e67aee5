"""The drafter's losses (METHOD.md 3, eqs. 9-12; FORMAT_FACTS.md B.2).

L = ce * L_ce + tv * L_tv + confidence * L_conf, each a mean over supervised slots weighted by
w_k = exp(-k / decay), k = 0 .. K-1. L_tv is sum_v |p_d - p_t|, twice the total variation.

Only supervised slots meet the vocabulary, and only a chunk of them at a time: each chunk's loss
and its exact gradient are computed together, so that no [rows, V] tensor lives whole.
Letters: M supervised slots, r Markov rank, the others as in `anchors`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark.drafters.dspark import DSparkDrafter
from dspark.training.anchors import AnchorBlocks


@dataclass(frozen=True)
class LossWeights:
    """How the losses are combined; the defaults are DSpark's.

    Attributes:
        ce: weight of the cross-entropy against the true tokens.
        tv: weight of sum_v |p_d - p_t|.
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
        ce, tv, confidence: the three weighted means (0 for a missing confidence head).
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
    """Weights [B, N, K]: exp(-k / decay) where supervised, else 0."""
    chosen = blocks.supervised_BNK
    slots = torch.arange(chosen.shape[-1], device=chosen.device, dtype=dtype)
    return chosen * torch.exp(-slots / decay)


def block_loss(
    drafter: DSparkDrafter,
    hidden_BNKH: Tensor,
    teacher_BSH: Tensor,
    blocks: AnchorBlocks,
    weights: LossWeights,
    *,
    total_weight: Tensor | float | None = None,
    chunk_rows: int | None = None,
) -> LossReport:
    """Loss of a batch of blocks.

    Args:
        drafter: whose heads turn hidden states into laws.
        hidden_BNKH: its hidden states of the blocks.
        teacher_BSH: the target's states after its final norm.
        blocks: labels and supervision.
        weights: how the losses are combined.
        total_weight: what to divide by; None for the sum of this batch's position weights. Give
            the sum over all ranks where several share a step.
        chunk_rows: supervised slots that meet the vocabulary at once; None for as many as suit
            the device.
    """
    # Blocks first and slots later: a recurrent head needs whole blocks.
    block_rows = blocks.supervised_BNK[..., 0].nonzero(as_tuple=True)
    hidden_MKH, previous_MK = hidden_BNKH[block_rows], blocks.previous_BNK[block_rows]
    chosen_MK = blocks.supervised_BNK[block_rows]
    dtype = torch.promote_types(hidden_BNKH.dtype, torch.float32)
    weight_M = position_weights(blocks, weights.decay, dtype)[block_rows][chosen_MK]
    normalizer = (weight_M.sum() if total_weight is None else total_weight) + 1e-6

    hidden_MH, head = hidden_MKH[chosen_MK], drafter.markov_head
    feature_Mr = None if head is None else head.block(previous_MK, hidden_MKH)[chosen_MK]
    sequences_M = block_rows[0].unsqueeze(1).expand_as(chosen_MK)[chosen_MK]
    terms = _Rows(
        drafter=drafter,
        teacher_MH=teacher_BSH[sequences_M, blocks.positions_BNK[block_rows][chosen_MK]],
        labels_M=blocks.labels_BNK[block_rows][chosen_MK],
        weight_M=weight_M / normalizer,
        weights=weights,
        chunk_rows=chunk_rows or suitable_rows(hidden_BNKH.device, drafter.config.vocab_size),
        with_gradient=torch.is_grad_enabled(),
    )
    bias_Vr = None if head is None else head.markov_w2.weight
    loss, ce_M, tv_M = _VocabularyLoss.apply(  # type: ignore[no-untyped-call]
        hidden_MH, feature_Mr, bias_Vr, terms
    )
    accept_M = (1 - 0.5 * tv_M).clamp(0, 1)  # c*, eq. 8

    logits_M = drafter.confidence_logits(
        hidden_MH, previous_MK[chosen_MK], detach_inputs=weights.detach_confidence
    )
    confidence = weight_M.new_zeros(())
    if logits_M is not None:
        entropy_M = F.binary_cross_entropy_with_logits(logits_M, accept_M, reduction="none")
        confidence = (terms.weight_M * entropy_M).sum()
        loss = loss + weights.confidence * confidence
    means = {
        "ce": (terms.weight_M * ce_M).sum(),
        "tv": (terms.weight_M * tv_M).sum(),
        "confidence": confidence.detach(),
    }
    return LossReport(
        loss=loss,
        supervised=accept_M.numel(),
        **means,
        **_metrics(chosen_MK, weight_M, accept_M, logits_M),
    )


def suitable_rows(device: torch.device, vocab_size: int) -> int:
    """How many rows should meet the vocabulary at once."""
    # A CPU's passes over the logits are fastest while those stay in its cache (1 MiB here); an
    # accelerator wants few, large chunks (256 MiB).
    numbers = 2**18 if device.type == "cpu" else 2**26
    return max(numbers // vocab_size, 16)


def _metrics(
    chosen_MK: Tensor, weight_M: Tensor, accept_M: Tensor, logits_M: Tensor | None
) -> dict[str, Tensor]:
    accept_MK = accept_M.new_zeros(chosen_MK.shape).masked_scatter_(chosen_MK, accept_M)
    survival_MK = accept_MK.cumprod(dim=1)
    zero = accept_M.new_zeros(())
    metrics = {
        "accept_rate_K": accept_MK.sum(dim=0) / chosen_MK.sum(dim=0).clamp(min=1),
        "accepted_length": (1 + survival_MK.sum(dim=1)).sum() / max(chosen_MK.shape[0], 1),
        "confidence_error": zero,
        "confidence_bias": zero,
        "survival_bias": zero,
    }
    if logits_M is None or accept_M.numel() == 0:
        return metrics
    predicted_M = logits_M.detach().sigmoid().to(accept_M.dtype)
    predicted_MK = torch.zeros_like(accept_MK).masked_scatter_(chosen_MK, predicted_M)
    survival_gap_M = (predicted_MK.cumprod(dim=1) - survival_MK)[chosen_MK]
    share_M = weight_M / weight_M.sum()
    return metrics | {
        "confidence_error": (share_M * (predicted_M - accept_M).abs()).sum(),
        "confidence_bias": (share_M * (predicted_M - accept_M)).sum(),
        "survival_bias": (share_M * survival_gap_M).sum(),
    }


@dataclass(frozen=True)
class _Rows:
    """The constants of the supervised slots."""

    drafter: DSparkDrafter
    teacher_MH: Tensor
    labels_M: Tensor
    weight_M: Tensor
    weights: LossWeights
    chunk_rows: int
    with_gradient: bool

    def chunk(
        self, rows: slice, hidden: Tensor, feature: Tensor | None, bias_Vr: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Objective of some rows, and their cross-entropy and |p_d - p_t|_1."""
        logits = self.drafter.base_logits(hidden)
        if feature is not None and bias_Vr is not None:
            logits = logits + F.linear(feature, bias_Vr)
        log_draft = F.log_softmax(self.drafter.over_vocabulary(logits), dim=-1)
        with torch.no_grad():
            teacher = F.softmax(self.drafter.target_logits(self.teacher_MH[rows]), dim=-1)
        ce = F.nll_loss(log_draft, self.labels_M[rows], reduction="none")
        if self.drafter.t2d is not None:  # a token that it can never propose teaches nothing
            ce = ce.where(self.drafter.t2d[self.labels_M[rows]], 0.0)
        tv = (log_draft.exp() - teacher).abs().sum(dim=-1)
        combined = self.weights.ce * ce + self.weights.tv * tv
        return (self.weight_M[rows] * combined).sum(), ce.detach(), tv.detach()


class _VocabularyLoss(torch.autograd.Function):
    """sum_m w_m (ce * CE_m + tv * |p_d - p_t|_1,m), chunk by chunk, and its gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_MH: Tensor,
        feature_Mr: Tensor | None,
        bias_Vr: Tensor | None,
        terms: _Rows,
    ) -> tuple[Tensor, Tensor, Tensor]:
        inputs = (hidden_MH, feature_Mr, bias_Vr)
        wanted = [terms.with_gradient and needed for needed in ctx.needs_input_grad[:3]]
        grads = [
            x.new_zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32))
            if w and x is not None
            else None
            for x, w in zip(inputs, wanted, strict=True)
        ]
        losses, ces, tvs = [], [], []
        for start in range(0, hidden_MH.shape[0], terms.chunk_rows):
            rows = slice(start, start + terms.chunk_rows)
            with torch.set_grad_enabled(any(wanted)):
                hidden = hidden_MH[rows].detach().requires_grad_(wanted[0])
                feature = bias = None
                if feature_Mr is not None and bias_Vr is not None:
                    feature = feature_Mr[rows].detach().requires_grad_(wanted[1])
                    bias = bias_Vr.detach().requires_grad_(wanted[2])
                loss, ce, tv = terms.chunk(rows, hidden, feature, bias)
            leaves = [
                x
                for x, w in zip((hidden, feature, bias), wanted, strict=True)
                if w and x is not None
            ]
            found = iter(torch.autograd.grad(loss, leaves) if leaves else ())
            for i, grad in enumerate(grads):
                if grad is not None:
                    (grad if i == 2 else grad[rows]).add_(next(found))
            losses.append(loss.detach())
            ces.append(ce)
            tvs.append(tv)
        ctx.save_for_backward(
            *(
                None if g is None or x is None else g.to(x.dtype)
                for g, x in zip(grads, inputs, strict=True)
            )
        )
        zero = terms.weight_M.new_zeros(0)
        ce_M, tv_M = torch.cat([zero, *ces]), torch.cat([zero, *tvs])
        ctx.mark_non_differentiable(ce_M, tv_M)
        total = torch.stack(losses).sum() if losses else terms.weight_M.new_zeros(())
        return total, ce_M, tv_M

    @staticmethod
    def backward(
        ctx: Any, grad_loss: Tensor, *_: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        hidden, feature, bias = (None if g is None else g * grad_loss for g in ctx.saved_tensors)
        return hidden, feature, bias, None
