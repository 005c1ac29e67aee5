"""Loss terms on distributions and their gradients, for a chunk of rows, in the logits' storage.

With q = softmax(z) of the drafter and p of the target, the gradients in z of a row's terms are q -
1[label] (cross-entropy), q - p (KL, soft cross-entropy) and, of sum_v |q - p|, 2 q (sum_{q<p} q -
1[q < p]); -log a and the hybrid of LK losses scale these (`TermWeights`).

With a reduced vocabulary z covers the known tokens; KL and soft cross-entropy are against p
conditioned on the known tokens (all that a drafter can learn), and the probability that p gives to
other tokens counts as distance.

Letters: n slots and u target rows in a chunk, V vocabulary (or its known part).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dspark.drafters.target_bound import TargetBound

# exp of anything lower is denormal, which is 5 times slower and makes no difference.
_LOWEST = -87.0


def fitting_numbers(device: torch.device) -> int:
    """Numbers per chunk that suit the device."""
    # A CPU is fastest while tensors stay in its cache (2 MiB here); an accelerator prefers few
    # large passes (256 MiB).
    return 2**19 if device.type == "cpu" else 2**26


@dataclass(frozen=True)
class TermWeights:
    """Weights of the terms; each row's own weight multiplies them all.

    Attributes:
        ce: cross-entropy against the true token.
        tv: sum_v |q - p|, twice the total variation, as the published code defines it.
        kl: KL(p || q).
        soft_ce: cross-entropy of q against p, KL plus p's own entropy: Eagle3's.
        lk: -log a, with a = sum_v min(p, q) the acceptance probability: LK losses' `alpha` form
            (Samarin et al. 2026, arXiv 2602.23881).
        lk_hybrid: l KL(p || q) + (1 - l)(1 - a), l = exp(-eta a) without gradient: LK losses'
            `lambda` form, with l per row as in speculators' `lk_hybrid`.
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
    """The target's distributions of some slots (or of its own rows: u in place of n).

    Attributes:
        probs_nV: over the tokens that the drafter knows; overwritten by `compare`.
        known_n: their sum; None for 1.
        entropy_n: of the distribution over known tokens; None if no term needs it.
    """

    probs_nV: Tensor
    known_n: Tensor | None
    entropy_n: Tensor | None

    def of(self, owner_n: Tensor) -> Teacher:
        """The distributions of the slots that these rows [n] teach, copied."""
        known, entropy = self.known_n, self.entropy_n
        return Teacher(
            self.probs_nV[owner_n],
            None if known is None else known[owner_n],
            None if entropy is None else entropy[owner_n],
        )


def teacher_probs(
    head: TargetBound[Any],
    states_uH: Tensor,
    weights: TermWeights,
    log_total_u: Tensor | None = None,
) -> Teacher:
    """The target's distributions of distinct rows.

    Args:
        head: the target's drafter.
        states_uH: the target's states after its final norm.
        weights: determine whether entropies are needed.
        log_total_u: of each row the logarithm of its softmax's sum over all tokens, with a reduced
            vocabulary; None computes it.
    """
    known_u = entropy_u = None
    if log_total_u is None:
        probs_uV = head.target_logits(states_uH.detach())
        _softmax_(probs_uV)
        probs_uV = head.over_drafts(probs_uV)
    else:
        probs_uV = head.target_draft_logits(states_uH.detach())
        probs_uV.sub_(log_total_u.unsqueeze(-1)).clamp_(min=_LOWEST).exp_()
    if head.t2d is not None:
        known_u = probs_uV.sum(-1)
    if weights.kl or weights.lk_hybrid:
        entropy_u = _total(torch.special.entr, probs_uV)
        if known_u is not None:  # of p / s: H(p) / s + log s
            entropy_u = entropy_u / known_u + known_u.log()
    return Teacher(probs_uV, known_u, entropy_u)


def compare(
    logits_nV: Tensor, teacher: Teacher, labels_n: Tensor | None, weights: TermWeights
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Terms of a chunk; and q, in the storage of the logits, and q - p, in the teacher's."""
    found = dict[str, Tensor]()
    known_n, target_nV = teacher.known_n, teacher.probs_nV
    logits_nV.sub_(logits_nV.amax(-1, keepdim=True))
    picked_n = mean_n = None
    if labels_n is not None:
        picked_n = logits_nV.gather(-1, labels_n.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    if weights.kl or weights.lk_hybrid or weights.soft_ce:
        mean_n = _dot(target_nV, logits_nV)
    draft_nV = logits_nV.clamp_(min=_LOWEST).exp_()
    total_n = draft_nV.sum(-1)
    draft_nV.div_(total_n.unsqueeze(-1))
    if labels_n is not None and picked_n is not None:  # unknown tokens have no label
        found["ce"] = (total_n.log() - picked_n).where(labels_n >= 0, 0.0)
    if mean_n is not None:
        found["soft_ce"] = total_n.log() - (mean_n if known_n is None else mean_n / known_n)
        if teacher.entropy_n is not None:
            found["kl"] = found["soft_ce"] - teacher.entropy_n
    if weights.lk:  # not from the distance, which rounds to 2 where little is accepted
        kept_n = torch.minimum(draft_nV, target_nV).sum(-1)
        found["lk"] = -kept_n.clamp(min=torch.finfo(kept_n.dtype).tiny).log()
    gap_nV = torch.sub(draft_nV, target_nV, out=target_nV)
    distance_n = _total(torch.abs, gap_nV)
    found["tv"] = distance_n if known_n is None else distance_n + (1 - known_n)
    found["accept"] = (1 - 0.5 * found["tv"]).clamp(0, 1)
    return found, draft_nV, gap_nV


def gradient(
    draft_nV: Tensor,
    gap_nV: Tensor,
    found: dict[str, Tensor],
    known_n: Tensor | None,
    labels_n: Tensor | None,
    weight_n: Tensor,
    weights: TermWeights,
) -> tuple[Tensor, Tensor | None]:
    """Rows of q (A + C (r - 1[q < p])) + B (q - p) - a 1[label], in the gaps' storage if possible.

    Also returns a factor that each row is still to be multiplied by, None for 1: if the gaps
    themselves are the gradient, scaling is cheaper after the head.
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
    prob_n, gap_n = label_n, soft_n
    if known_n is not None:  # q - p / s = q (1 - 1 / s) + (q - p) / s
        prob_n, gap_n = label_n + soft_n * (1 - 1 / known_n), soft_n / known_n
    softly = bool(weights.kl or weights.soft_ce or weights.lk_hybrid)
    if weights.tv or weights.lk or weights.lk_hybrid:
        below_nV = (gap_nV < 0).to(gap_nV.dtype) if softly else gap_nV.lt_(0)
        offset_n = prob_n + apart_n * _dot(draft_nV, below_nV)
        grad_nV = below_nV.mul_(-apart_n.unsqueeze(-1)).add_(offset_n.unsqueeze(-1)).mul_(draft_nV)
        if softly:
            grad_nV.addcmul_(gap_nV, gap_n.unsqueeze(-1))
    elif known_n is None and not weights.ce:
        return gap_nV, soft_n
    else:
        grad_nV = gap_nV.mul_(gap_n.unsqueeze(-1))
        if weights.ce or known_n is not None:
            grad_nV.addcmul_(draft_nV, prob_n.unsqueeze(-1))
    if labels_n is not None and weights.ce:
        grad_nV.scatter_add_(-1, labels_n.clamp(min=0).unsqueeze(-1), -label_n.unsqueeze(-1))
    return grad_nV, None


def _softmax_(logits: Tensor) -> None:
    logits.sub_(logits.amax(-1, keepdim=True)).clamp_(min=_LOWEST).exp_()
    logits.div_(logits.sum(-1, keepdim=True))


def _dot(one_nV: Tensor, other_nV: Tensor) -> Tensor:
    return _total(torch.mul, one_nV, other_nV)


def _total(function: Callable[..., Tensor], *rows_nV: Tensor) -> Tensor:
    """Sum over the vocabulary of an elementwise function that is never materialised as a whole.

    A matrix product or a norm would give the same, 4 times slower on a CPU.
    """
    columns = max(fitting_numbers(rows_nV[0].device) // rows_nV[0].shape[0], 1)
    parts = zip(*(torch.split(x, columns, dim=-1) for x in rows_nV), strict=True)
    return torch.stack([function(*part).sum(-1) for part in parts]).sum(0)
