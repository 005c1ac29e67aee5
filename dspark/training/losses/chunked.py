"""The losses' chunked core: draft against target distributions, with exact gradients.

Only supervised slots meet the vocabulary, and only a chunk at a time: a chunk's losses and
gradients are computed together, the gradient in the storage of the probabilities, so that no [N, V]
tensor exists as a whole. Slots are ordered by the target row whose distribution teaches them; that
distribution is computed once, however many slots of neighbouring anchors (or passes of a chain) use
it.

Letters: N supervised slots, U distinct target rows, V vocabulary (or its known part), r Markov
rank; n, u a chunk's. The terms are in `terms`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from dspark.drafters.target_bound import TargetBound
from dspark.training.losses.terms import (
    Teacher,
    TermWeights,
    compare,
    fitting_numbers,
    gradient,
    teacher_probs,
)

# With fewer, reading the head takes longer than its products.
_ROWS_AT_LEAST = 64
# Likewise for target rows over the full vocabulary, of which a reduced one keeps a part.
_TEACHER_ROWS_AT_LEAST = 128


@dataclass(frozen=True)
class SupervisedRows:
    """The supervised slots, ordered by the target row that teaches them.

    Attributes:
        slots_N: index of each among all slots.
        teacher_U: the distinct target rows, ascending.
        owner_N: index into `teacher_U` of each slot, ascending.
        counts: slots per target row.
    """

    slots_N: Tensor
    teacher_U: Tensor
    owner_N: Tensor
    counts: tuple[int, ...]

    @classmethod
    def build(cls, rows: Tensor, supervised: Tensor) -> SupervisedRows:
        """From each slot's target row and whether it is supervised; both on the CPU."""
        slots = supervised.flatten().nonzero().flatten()
        ordered, order = rows.flatten()[slots].sort(stable=True)
        teacher, owner, counts = torch.unique_consecutive(
            ordered, return_inverse=True, return_counts=True
        )
        return cls(slots[order], teacher, owner, tuple(counts.tolist()))

    def to(self, device: torch.device) -> SupervisedRows:
        """A copy on a device."""
        return replace(
            self,
            slots_N=self.slots_N.to(device),
            teacher_U=self.teacher_U.to(device),
            owner_N=self.owner_N.to(device),
        )

    def chunks(self, slots: int, rows: int) -> Iterator[tuple[slice, list[slice]]]:
        """Consecutive target rows, at most `rows`, and their slots, `slots` at a time."""
        stop = 0
        for first in range(0, len(self.counts), rows):
            start, stop = stop, stop + sum(self.counts[first : first + rows])
            parts = [slice(s, min(s + slots, stop)) for s in range(start, stop, slots)]
            yield slice(first, min(first + rows, len(self.counts))), parts


@dataclass(frozen=True)
class LossTerms:
    """Unweighted terms of every row [N], without gradient.

    Attributes:
        ce, tv, kl, soft_ce, lk: as in `TermWeights`; a term without weight that would cost a pass
            is 0.
        accept: c* = 1 - tv / 2 in [0, 1], the probability that the draft is accepted (eq. 8).
    """

    ce: Tensor
    tv: Tensor
    kl: Tensor
    soft_ce: Tensor
    lk: Tensor
    accept: Tensor


@dataclass(frozen=True)
class LossInputs:
    """Inputs of both distributions.

    Attributes:
        head: the drafter, which maps states to logits.
        hidden_NH: the drafter's states, input of its head.
        feature_Nr: the sequential head's features; None without that head.
        bias_Vr: its output matrix.
        teacher_UH: the target's states after its final norm.
        labels_N: the true tokens as draft-vocabulary ids, -1 for unknown tokens; None if no term
            needs them.
        weight_N: the rows' weights.
        log_total_U: as in `teacher_probs`.
    """

    head: TargetBound[Any]
    hidden_NH: Tensor
    feature_Nr: Tensor | None
    bias_Vr: Tensor | None
    teacher_UH: Tensor
    labels_N: Tensor | None
    weight_N: Tensor
    log_total_U: Tensor | None = None


def chunked_loss(
    inputs: LossInputs, rows: SupervisedRows, weights: TermWeights, *, chunk_rows: int
) -> tuple[Tensor, LossTerms]:
    """The weighted sum of all rows' terms, and the terms.

    Gradients reach `hidden_NH`, `feature_Nr` and `bias_Vr`.

    Args:
        inputs: in the order of `rows`.
        rows: the supervised slots and their target rows.
        weights: of the terms.
        chunk_rows: slots per chunk.
    """
    chunked = _Chunked(inputs, rows, weights, chunk_rows, torch.is_grad_enabled())
    loss, *terms = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
        inputs.hidden_NH, inputs.feature_Nr, inputs.bias_Vr, chunked
    )
    return loss, LossTerms(*terms)


def suitable_rows(device: torch.device, vocab_size: int) -> int:
    """Rows per chunk that suit the device."""
    return max(fitting_numbers(device) // vocab_size, _ROWS_AT_LEAST)


@dataclass(frozen=True)
class _Chunked:
    inputs: LossInputs
    rows: SupervisedRows
    weights: TermWeights
    chunk_rows: int
    with_gradient: bool


class _ChunkedLoss(torch.autograd.Function):
    """Loss and gradient, chunk by chunk; backward only scales the gradient from forward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        feature_Nr: Tensor | None,
        bias_Vr: Tensor | None,
        chunked: _Chunked,
    ) -> tuple[Tensor, ...]:
        inputs, weights = chunked.inputs, chunked.weights
        tensors = (hidden_NH, feature_Nr, bias_Vr)
        wide = torch.promote_types(hidden_NH.dtype, torch.float32)
        grads = [
            torch.zeros_like(x, dtype=wide)
            if x is not None and chunked.with_gradient and n
            else None
            for x, n in zip(tensors, ctx.needs_input_grad, strict=False)
        ]
        terms = LossTerms(*(torch.zeros_like(inputs.weight_N) for _ in fields(LossTerms)))
        slots = at_once = chunked.chunk_rows
        if inputs.head.t2d is not None:
            at_once = max(slots, _TEACHER_ROWS_AT_LEAST)
        for teacher, parts in chunked.rows.chunks(slots, at_once):
            totals = inputs.log_total_U
            taught = teacher_probs(
                inputs.head,
                inputs.teacher_UH[teacher],
                weights,
                None if totals is None else totals[teacher],
            )
            for part in parts:
                owner_n = chunked.rows.owner_N[part] - teacher.start
                # In its own function, so that its tensors are freed before the next are allocated.
                _chunk(chunked, tensors, grads, terms, taught.of(owner_n), part)
            del taught
        ctx.found = list(zip(grads, (None if x is None else x.dtype for x in tensors), strict=True))
        values = [getattr(terms, field.name) for field in fields(LossTerms)]
        ctx.mark_non_differentiable(*values)
        return (inputs.weight_N * _weighted(terms, weights)).sum(), *values

    @staticmethod
    def backward(
        ctx: Any, grad_loss: Tensor, *_: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        if ctx.found is None:
            raise RuntimeError("This loss's gradient was taken already; compute the loss again.")
        # Scaled in place and released, since the bias's is as large as the vocabulary.
        found, ctx.found = ctx.found, None
        hidden, feature, bias = (
            None if grad is None else grad.mul_(grad_loss).to(dtype) for grad, dtype in found
        )
        return hidden, feature, bias, None


def _chunk(
    chunked: _Chunked,
    tensors: tuple[Tensor, Tensor | None, Tensor | None],
    grads: Sequence[Tensor | None],
    terms: LossTerms,
    taught: Teacher,
    part: slice,
) -> None:
    """Fill in the terms of a chunk and accumulate its gradients."""
    inputs, weights = chunked.inputs, chunked.weights
    hidden_NH, feature_Nr, bias_Vr = tensors
    d_hidden, d_feature, d_bias = grads
    labels_n = None if inputs.labels_N is None else inputs.labels_N[part]
    hidden_nH = hidden_NH[part].detach().requires_grad_(d_hidden is not None)
    with torch.enable_grad():
        base_nV = inputs.head.base_logits(hidden_nH)
    logits_nV = base_nV.detach()
    if feature_Nr is not None and bias_Vr is not None:
        _add_product(logits_nV, feature_Nr[part], bias_Vr.mT)
    found, draft_nV, gap_nV = compare(logits_nV, taught, labels_n, weights)
    for name, value in found.items():
        getattr(terms, name)[part] = value
    if all(grad is None for grad in grads):
        return
    weight_n = inputs.weight_N[part]
    grad_nV, scale_n = gradient(
        draft_nV, gap_nV, found, taught.known_n, labels_n, weight_n, weights
    )
    scale_n1 = None if scale_n is None else scale_n.unsqueeze(-1)
    if d_hidden is not None:
        [grad_nH] = torch.autograd.grad(base_nV, [hidden_nH], [grad_nV])
        d_hidden[part] = grad_nH if scale_n1 is None else grad_nH * scale_n1
    if feature_Nr is None or bias_Vr is None:
        return
    narrow_nV, feature_nr = grad_nV.to(bias_Vr.dtype), feature_Nr[part]
    if d_feature is not None:
        grad_nr = narrow_nV @ bias_Vr
        d_feature[part] = grad_nr if scale_n1 is None else grad_nr * scale_n1
    if d_bias is not None:
        scaled_nr = feature_nr if scale_n1 is None else (feature_nr * scale_n1).to(feature_nr)
        _add_product(d_bias, narrow_nV.mT, scaled_nr)


def _weighted(terms: LossTerms, weights: TermWeights) -> Tensor:
    total = weights.ce * terms.ce + weights.tv * terms.tv + weights.lk * terms.lk
    total = total + weights.kl * terms.kl + weights.soft_ce * terms.soft_ce
    if weights.lk_hybrid:
        share = torch.exp(-weights.lk_eta * terms.accept)
        total = total + weights.lk_hybrid * (share * terms.kl + (1 - share) * 0.5 * terms.tv)
    return total


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to the total, which may have a wider dtype."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
        return
    # In pieces along the vocabulary, because a product is widened as a whole before it is added.
    numbers, wide = fitting_numbers(total.device), total.shape[1] > total.shape[0]
    size = max(numbers // min(total.shape), 1)
    for start in range(0, max(total.shape), size):
        piece = slice(start, start + size)
        if wide:
            total[:, piece] += left @ right[:, piece]
        else:
            total[piece] += left[piece] @ right
