"""The chunked core of every loss: drafter's laws against target's laws, and exact gradients.

Only supervised slots meet the vocabulary, and only a chunk of them at a time: a chunk's losses and
their gradient are computed together, the gradient in the storage of the laws, so that no [N, V]
tensor lives whole. Slots are ordered by the row of the target whose law teaches them, and that law
is computed once, however many slots of neighbouring anchors (or passes of a chain) look at it.

With laws q = softmax(z) of the drafter and p of the target, the gradients in z of a row's terms are
q - 1[label] (cross-entropy), q - p (KL, soft cross-entropy) and, of sum_v |q - p|,
2 q (sum_{q<p} q - 1[q < p]); -log a and the hybrid of LK losses scale these (`LawWeights`).
With a reduced vocabulary z is over the known tokens, KL and soft cross-entropy are against p given
that the token is a known one (more a drafter cannot learn), and all that p gives to others counts
as distance.
Letters: N supervised slots, U distinct rows of the target, V vocabulary (or the known part of it),
r Markov rank; n, u a chunk's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

_ROWS_AT_LEAST = 16
_PRODUCT_ROWS = 2**14


class Head(Protocol):
    """What turns states into logits: a drafter."""

    t2d: Tensor | None

    def base_logits(self, hidden_NH: Tensor) -> Tensor: ...
    def target_logits(self, hidden_NH: Tensor) -> Tensor: ...
    def over_drafts(self, logits: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class LawRows:
    """The supervised slots, ordered by the row of the target that teaches them.

    Attributes:
        slots_N: where each stands among all slots.
        teacher_U: the distinct rows of the target, ascending.
        owner_N: index into `teacher_U` of each slot, ascending.
        counts: slots of each row of the target.
    """

    slots_N: Tensor
    teacher_U: Tensor
    owner_N: Tensor
    counts: tuple[int, ...]

    @classmethod
    def build(cls, rows: Tensor, supervised: Tensor) -> LawRows:
        """Of every slot the row of the target, and whether it counts; both on the CPU."""
        slots = supervised.flatten().nonzero().flatten()
        ordered, order = rows.flatten()[slots].sort(stable=True)
        teacher, owner, counts = torch.unique_consecutive(
            ordered, return_inverse=True, return_counts=True
        )
        return cls(slots[order], teacher, owner, tuple(counts.tolist()))

    def to(self, device: torch.device) -> LawRows:
        """The same on a device."""
        return replace(
            self,
            slots_N=self.slots_N.to(device),
            teacher_U=self.teacher_U.to(device),
            owner_N=self.owner_N.to(device),
        )

    def chunks(self, rows: int) -> Iterator[tuple[slice, slice]]:
        """Neighbouring rows of the target and their slots, at most `rows` slots (or one row's)."""
        first = start = stop = 0
        for u, count in enumerate(self.counts):
            if stop + count - start > rows and u > first:
                yield slice(first, u), slice(start, stop)
                first, start = u, stop
            stop += count
        if stop > start:
            yield slice(first, len(self.counts)), slice(start, stop)


@dataclass(frozen=True)
class LawWeights:
    """Weights of a row's terms; the row's own weight multiplies them all.

    Attributes:
        ce: cross-entropy against the true token.
        tv: sum_v |q - p|, twice the total variation (FORMAT_FACTS.md B.2).
        kl: KL(p || q).
        soft_ce: cross-entropy of q against p, KL plus p's own entropy: Eagle3's.
        lk: -log a, with a = sum_v min(p, q) the chance that a draft is kept: LK losses' `alpha`
            form (Samarin et al. 2026, arXiv 2602.23881).
        lk_hybrid: l KL(p || q) + (1 - l)(1 - a), l = exp(-eta a) without gradient: LK losses'
            `lambda` form, l for each row by itself as speculators' `lk_hybrid` has it.
        lk_eta: eta; the paper's best is 3.
    """

    ce: float = 0.0
    tv: float = 0.0
    kl: float = 0.0
    soft_ce: float = 0.0
    lk: float = 0.0
    lk_hybrid: float = 0.0
    lk_eta: float = 3.0


@dataclass(frozen=True)
class LawTerms:
    """Terms of every row [N], without their weights and without gradient.

    Attributes:
        ce, tv, kl, soft_ce, lk: as in `LawWeights`; what has no weight and costs a pass is 0.
        accept: c* = 1 - tv / 2 within 0 and 1, the chance that the draft is kept (eq. 8).
    """

    ce: Tensor
    tv: Tensor
    kl: Tensor
    soft_ce: Tensor
    lk: Tensor
    accept: Tensor


@dataclass(frozen=True)
class LawInputs:
    """What the laws are made of, and compared with.

    Attributes:
        head: makes logits of states.
        hidden_NH: the drafter's states as its head reads them.
        feature_Nr: the sequential head's features; None for none.
        bias_Vr: its output matrix.
        teacher_UH: the target's states after its final norm.
        labels_N: the true tokens, as the drafter numbers those that it knows, -1 for others; None
            where no term needs them.
        weight_N: each row's weight.
    """

    head: Head
    hidden_NH: Tensor
    feature_Nr: Tensor | None
    bias_Vr: Tensor | None
    teacher_UH: Tensor
    labels_N: Tensor | None
    weight_N: Tensor


def law_loss(
    inputs: LawInputs, rows: LawRows, weights: LawWeights, *, chunk_rows: int
) -> tuple[Tensor, LawTerms]:
    """The weighted sum of all rows' terms, and the terms.

    Gradients reach `hidden_NH`, `feature_Nr` and `bias_Vr`.

    Args:
        inputs: rows in the order of `rows`.
        rows: which row of the target teaches which.
        weights: of the terms.
        chunk_rows: slots that meet the vocabulary at once.
    """
    chunked = _Chunked(inputs, rows, weights, chunk_rows, torch.is_grad_enabled())
    loss, *terms = _LawLoss.apply(  # type: ignore[no-untyped-call]
        inputs.hidden_NH, inputs.feature_Nr, inputs.bias_Vr, chunked
    )
    return loss, LawTerms(*terms)


def suitable_rows(device: torch.device, vocab_size: int) -> int:
    """How many rows should meet the vocabulary at once."""
    # A CPU's passes over the logits are fastest while those stay in its cache (1 MiB here); an
    # accelerator wants few, large chunks (256 MiB).
    numbers = 2**18 if device.type == "cpu" else 2**26
    return max(numbers // vocab_size, _ROWS_AT_LEAST)


@dataclass(frozen=True)
class _Chunked:
    inputs: LawInputs
    rows: LawRows
    weights: LawWeights
    chunk_rows: int
    with_gradient: bool


class _LawLoss(torch.autograd.Function):
    """Loss and gradient, chunk by chunk; backward only scales what forward found."""

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
        terms = LawTerms(*(torch.zeros_like(inputs.weight_N) for _ in fields(LawTerms)))
        for teacher, part in chunked.rows.chunks(chunked.chunk_rows):
            law = _teacher(inputs, weights, teacher)
            owner_n = chunked.rows.owner_N[part] - teacher.start
            hidden_nH = hidden_NH[part].detach().requires_grad_(grads[0] is not None)
            with torch.enable_grad():
                base_nV = inputs.head.base_logits(hidden_nH)
            logits_nV = base_nV.detach()
            if feature_Nr is not None and bias_Vr is not None:
                _add_product(logits_nV, feature_Nr[part].detach(), bias_Vr.detach().mT)
            labels_n = None if inputs.labels_N is None else inputs.labels_N[part]
            found, law_nV, gap_nV = _compare(logits_nV, law, owner_n, labels_n, weights)
            for name, value in found.items():
                getattr(terms, name)[part] = value
            if not any(grad is not None for grad in grads):
                continue
            known_n = None if law.known_u is None else law.known_u[owner_n]
            grad_nV = _gradient(
                law_nV, gap_nV, found, known_n, labels_n, inputs.weight_N[part], weights
            )
            if grads[0] is not None:
                [grad_nH] = torch.autograd.grad(base_nV, [hidden_nH], [grad_nV])
                grads[0][part] = grad_nH
            if feature_Nr is not None and bias_Vr is not None:
                narrow_nV = grad_nV.to(bias_Vr.dtype)
                if grads[1] is not None:
                    grads[1][part] = narrow_nV @ bias_Vr.detach()
                if grads[2] is not None:
                    _add_product(grads[2], narrow_nV.mT, feature_Nr[part].detach())
        ctx.save_for_backward(
            *(
                None if g is None or x is None else g.to(x.dtype)
                for g, x in zip(grads, tensors, strict=True)
            )
        )
        values = [getattr(terms, field.name) for field in fields(LawTerms)]
        ctx.mark_non_differentiable(*values)
        return (inputs.weight_N * _weighted(terms, weights)).sum(), *values

    @staticmethod
    def backward(
        ctx: Any, grad_loss: Tensor, *_: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        hidden, feature, bias = (None if g is None else g * grad_loss for g in ctx.saved_tensors)
        return hidden, feature, bias, None


def _weighted(terms: LawTerms, weights: LawWeights) -> Tensor:
    total = weights.ce * terms.ce + weights.tv * terms.tv + weights.lk * terms.lk
    total = total + weights.kl * terms.kl + weights.soft_ce * terms.soft_ce
    if weights.lk_hybrid:
        share = torch.exp(-weights.lk_eta * terms.accept)
        total = total + weights.lk_hybrid * (share * terms.kl + (1 - share) * 0.5 * terms.tv)
    return total


@dataclass(frozen=True)
class _Teacher:
    """The target's laws of a chunk.

    Attributes:
        law_uV: over the tokens that the drafter knows.
        known_u: their sum; None for 1.
        entropy_u: of the law given that the token is a known one; None where no term needs it.
    """

    law_uV: Tensor
    known_u: Tensor | None
    entropy_u: Tensor | None


def _teacher(inputs: LawInputs, weights: LawWeights, rows: slice) -> _Teacher:
    law_uV = inputs.head.target_logits(inputs.teacher_UH[rows].detach())
    _softmax_(law_uV)
    known_u = entropy_u = None
    if inputs.head.t2d is not None:
        law_uV = inputs.head.over_drafts(law_uV)
        known_u = law_uV.sum(-1)
    if weights.kl or weights.lk_hybrid:
        entropy_u = torch.special.entr(law_uV).sum(-1)
        if known_u is not None:  # of p / s: H(p) / s + log s
            entropy_u = entropy_u / known_u + known_u.log()
    return _Teacher(law_uV, known_u, entropy_u)


def _compare(
    logits_nV: Tensor,
    teacher: _Teacher,
    owner_n: Tensor,
    labels_n: Tensor | None,
    weights: LawWeights,
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Terms of a chunk, and in the storage of logits and a copy the laws q and the gaps q - p."""
    found = dict[str, Tensor]()
    known_n = None if teacher.known_u is None else teacher.known_u[owner_n]
    target_nV = teacher.law_uV[owner_n]
    logits_nV.sub_(logits_nV.amax(-1, keepdim=True))
    picked_n = mean_n = None
    if labels_n is not None:
        picked_n = logits_nV.gather(-1, labels_n.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    if weights.kl or weights.lk_hybrid or weights.soft_ce:
        mean_n = _dot(target_nV, logits_nV)
    law_nV = logits_nV.exp_()
    total_n = law_nV.sum(-1)
    law_nV.div_(total_n.unsqueeze(-1))
    if labels_n is not None and picked_n is not None:  # an unknown token teaches nothing
        found["ce"] = (total_n.log() - picked_n).where(labels_n >= 0, 0.0)
    if mean_n is not None:
        found["soft_ce"] = total_n.log() - (mean_n if known_n is None else mean_n / known_n)
        if teacher.entropy_u is not None:
            found["kl"] = found["soft_ce"] - teacher.entropy_u[owner_n]
    if weights.lk:  # not from the distance, which is 2 to within rounding where little is kept
        kept_n = torch.minimum(law_nV, target_nV).sum(-1)
        found["lk"] = -kept_n.clamp(min=torch.finfo(kept_n.dtype).tiny).log()
    gap_nV = torch.sub(law_nV, target_nV, out=target_nV)
    distance_n = torch.linalg.vector_norm(gap_nV, ord=1, dim=-1)
    found["tv"] = distance_n if known_n is None else distance_n + (1 - known_n)
    found["accept"] = (1 - 0.5 * found["tv"]).clamp(0, 1)
    return found, law_nV, gap_nV


def _gradient(
    law_nV: Tensor,
    gap_nV: Tensor,
    found: dict[str, Tensor],
    known_n: Tensor | None,
    labels_n: Tensor | None,
    weight_n: Tensor,
    weights: LawWeights,
) -> Tensor:
    """Rows of q (A + C (r - 1[q < p])) + B (q - p) - a 1[label], in the gaps' storage if it can."""
    weight_n = weight_n.to(gap_nV.dtype)
    label_n = weight_n * weights.ce
    if labels_n is not None:
        label_n = label_n * (labels_n >= 0)
    soft_n = weight_n * (weights.kl + weights.soft_ce)
    apart_n = weight_n * (2 * weights.tv)
    if weights.lk:
        apart_n = apart_n + weight_n * weights.lk * found["lk"].exp()
    if weights.lk_hybrid:
        share_n = torch.exp(-weights.lk_eta * found["accept"])
        soft_n = soft_n + weight_n * weights.lk_hybrid * share_n
        apart_n = apart_n + weight_n * weights.lk_hybrid * (1 - share_n)
    law_n, gap_n = label_n, soft_n
    if known_n is not None:  # q - p / s = q (1 - 1 / s) + (q - p) / s
        law_n, gap_n = label_n + soft_n * (1 - 1 / known_n), soft_n / known_n
    softly = bool(weights.kl or weights.soft_ce or weights.lk_hybrid)
    if weights.tv or weights.lk or weights.lk_hybrid:
        below_nV = (gap_nV < 0).to(gap_nV.dtype) if softly else gap_nV.lt_(0)
        offset_n = law_n + apart_n * _dot(law_nV, below_nV)
        grad_nV = below_nV.mul_(-apart_n.unsqueeze(-1)).add_(offset_n.unsqueeze(-1)).mul_(law_nV)
        if softly:
            grad_nV.addcmul_(gap_nV, gap_n.unsqueeze(-1))
    else:
        grad_nV = gap_nV.mul_(gap_n.unsqueeze(-1))
        if weights.ce or known_n is not None:
            grad_nV.addcmul_(law_nV, law_n.unsqueeze(-1))
    if labels_n is not None and weights.ce:
        grad_nV.scatter_add_(-1, labels_n.clamp(min=0).unsqueeze(-1), -label_n.unsqueeze(-1))
    return grad_nV


def _softmax_(logits: Tensor) -> None:
    logits.sub_(logits.amax(-1, keepdim=True)).exp_()
    logits.div_(logits.sum(-1, keepdim=True))


def _dot(one_nV: Tensor, other_nV: Tensor) -> Tensor:
    return (one_nV.unsqueeze(1) @ other_nV.unsqueeze(2)).flatten()


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to the total, which may be wider."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
        return
    for part in range(0, total.shape[0], _PRODUCT_ROWS):
        rows = slice(part, part + _PRODUCT_ROWS)
        total[rows] += left[rows] @ right
