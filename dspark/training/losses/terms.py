"""Terms on laws and their gradients, for one chunk of rows, in the storage of the logits.

With laws q = softmax(z) of the drafter and p of the target, the gradients in z of a row's terms are
q - 1[label] (cross-entropy), q - p (KL, soft cross-entropy) and, of sum_v |q - p|,
2 q (sum_{q<p} q - 1[q < p]); -log a and the hybrid of LK losses scale these (`LawWeights`).
With a reduced vocabulary z is over the known tokens, KL and soft cross-entropy are against p given
that the token is a known one (more a drafter cannot learn), and all that p gives to others counts
as distance.
Letters: n slots and u rows of the target in a chunk, V vocabulary (or the known part of it).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# Chances below exp of this are 0 to every reader, but as denormal numbers they take 5 times longer.
_LOWEST = -87.0


def fitting_numbers(device: torch.device) -> int:
    """How many numbers should be worked on at once."""
    # A CPU's passes are fastest while their tensors stay in its cache (2 MiB here); an accelerator
    # wants few, large ones (256 MiB).
    return 2**19 if device.type == "cpu" else 2**26


class Head(Protocol):
    """What turns states into logits: a drafter."""

    t2d: Tensor | None

    def base_logits(self, hidden_NH: Tensor) -> Tensor: ...
    def target_logits(self, hidden_NH: Tensor) -> Tensor: ...
    def over_drafts(self, logits: Tensor) -> Tensor: ...


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
class Teacher:
    """The target's laws of some slots (or of its own rows: u in place of n).

    Attributes:
        law_nV: over the tokens that the drafter knows; used up by `compare`.
        known_n: their sum; None for 1.
        entropy_n: of the law given that the token is a known one; None where no term needs it.
    """

    law_nV: Tensor
    known_n: Tensor | None
    entropy_n: Tensor | None

    def of(self, owner_n: Tensor) -> Teacher:
        """The laws of slots that these rows [n] teach, in storage of their own."""
        known, entropy = self.known_n, self.entropy_n
        return Teacher(
            self.law_nV[owner_n],
            None if known is None else known[owner_n],
            None if entropy is None else entropy[owner_n],
        )


def teacher_laws(head: Head, states_uH: Tensor, weights: LawWeights) -> Teacher:
    """The target's laws of distinct rows.

    Args:
        head: whose target it is.
        states_uH: the target's states after its final norm.
        weights: say what is needed.
    """
    law_uV = head.target_logits(states_uH.detach())
    _softmax_(law_uV)
    known_u = entropy_u = None
    if head.t2d is not None:
        law_uV = head.over_drafts(law_uV)
        known_u = law_uV.sum(-1)
    if weights.kl or weights.lk_hybrid:
        entropy_u = _total(torch.special.entr, law_uV)
        if known_u is not None:  # of p / s: H(p) / s + log s
            entropy_u = entropy_u / known_u + known_u.log()
    return Teacher(law_uV, known_u, entropy_u)


def compare(
    logits_nV: Tensor, teacher: Teacher, labels_n: Tensor | None, weights: LawWeights
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Terms of a chunk; and in the storage of the logits the laws q, in the teacher's q - p."""
    found = dict[str, Tensor]()
    known_n, target_nV = teacher.known_n, teacher.law_nV
    logits_nV.sub_(logits_nV.amax(-1, keepdim=True))
    picked_n = mean_n = None
    if labels_n is not None:
        picked_n = logits_nV.gather(-1, labels_n.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    if weights.kl or weights.lk_hybrid or weights.soft_ce:
        mean_n = _dot(target_nV, logits_nV)
    law_nV = logits_nV.clamp_(min=_LOWEST).exp_()
    total_n = law_nV.sum(-1)
    law_nV.div_(total_n.unsqueeze(-1))
    if labels_n is not None and picked_n is not None:  # an unknown token teaches nothing
        found["ce"] = (total_n.log() - picked_n).where(labels_n >= 0, 0.0)
    if mean_n is not None:
        found["soft_ce"] = total_n.log() - (mean_n if known_n is None else mean_n / known_n)
        if teacher.entropy_n is not None:
            found["kl"] = found["soft_ce"] - teacher.entropy_n
    if weights.lk:  # not from the distance, which is 2 to within rounding where little is kept
        kept_n = torch.minimum(law_nV, target_nV).sum(-1)
        found["lk"] = -kept_n.clamp(min=torch.finfo(kept_n.dtype).tiny).log()
    gap_nV = torch.sub(law_nV, target_nV, out=target_nV)
    distance_n = _total(torch.abs, gap_nV)
    found["tv"] = distance_n if known_n is None else distance_n + (1 - known_n)
    found["accept"] = (1 - 0.5 * found["tv"]).clamp(0, 1)
    return found, law_nV, gap_nV


def gradient(
    law_nV: Tensor,
    gap_nV: Tensor,
    found: dict[str, Tensor],
    known_n: Tensor | None,
    labels_n: Tensor | None,
    weight_n: Tensor,
    weights: LawWeights,
) -> tuple[Tensor, Tensor | None]:
    """Rows of q (A + C (r - 1[q < p])) + B (q - p) - a 1[label], in the gaps' storage if it can.

    Beside them what each row is yet to be multiplied by, None for 1: where the gaps themselves are
    the gradient, that is cheaper done behind the head.
    """
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
    elif known_n is None and not weights.ce:
        return gap_nV, soft_n
    else:
        grad_nV = gap_nV.mul_(gap_n.unsqueeze(-1))
        if weights.ce or known_n is not None:
            grad_nV.addcmul_(law_nV, law_n.unsqueeze(-1))
    if labels_n is not None and weights.ce:
        grad_nV.scatter_add_(-1, labels_n.clamp(min=0).unsqueeze(-1), -label_n.unsqueeze(-1))
    return grad_nV, None


def _softmax_(logits: Tensor) -> None:
    logits.sub_(logits.amax(-1, keepdim=True)).clamp_(min=_LOWEST).exp_()
    logits.div_(logits.sum(-1, keepdim=True))


def _dot(one_nV: Tensor, other_nV: Tensor) -> Tensor:
    return _total(torch.mul, one_nV, other_nV)


def _total(function: Callable[..., Tensor], *rows_nV: Tensor) -> Tensor:
    """Sum over the vocabulary of a function of its numbers, which never lies there whole.

    A product's rows or a norm would say the same, 4 times slower on a CPU.
    """
    columns = max(fitting_numbers(rows_nV[0].device) // rows_nV[0].shape[0], 1)
    parts = zip(*(torch.split(x, columns, dim=-1) for x in rows_nV), strict=True)
    return torch.stack([function(*part).sum(-1) for part in parts]).sum(0)
