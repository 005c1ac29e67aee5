"""Top-k, top-p and min-p: which tails of a law are cut. Tokens that tie stay lowest id first."""

from __future__ import annotations

import torch
from torch import Tensor

_HEADS = (1024, 16384)  # most top-p sets are smaller, and selecting costs less than sorting all


def apply_top_k(scores_NV: Tensor, top_k_N: Tensor) -> None:
    """Set all but the k highest scores of each row to minus infinity, in place.

    Args:
        scores_NV: finite numbers or minus infinity.
        top_k_N: int64; 0, V or more leave a row as it is.
    """
    vocab_size = scores_NV.shape[1]
    rows_M = torch.nonzero((top_k_N > 0) & (top_k_N < vocab_size)).squeeze(1)
    if rows_M.numel() == 0:
        return
    scores_MV, count_M = scores_NV[rows_M], top_k_N[rows_M]
    highest_MK = scores_MV.topk(int(count_M.max()), dim=1).values
    keep_MV = _highest(scores_MV, highest_MK, count_M)
    scores_NV[rows_M] = scores_MV.masked_fill(~keep_MV, float("-inf"))


def apply_top_p_and_min_p(probs_NV: Tensor, top_p_N: Tensor, min_p_N: Tensor) -> None:
    """Cut the tails of the rows that ask for it and make those rows sum to 1 again, in place.

    Other rows stay bit for bit what they would be in a batch of their own.

    Args:
        probs_NV: one law per row.
        top_p_N: float64; the smallest most likely set whose mass reaches p stays, all of it at 1.
        min_p_N: float64; then tokens at least this fraction as likely as the likeliest stay.
    """
    rows_M = torch.nonzero((top_p_N < 1) | (min_p_N > 0)).squeeze(1)
    if rows_M.numel() == 0:
        return
    probs_MV = probs_NV[rows_M]
    top_p_M1, min_p_M1 = top_p_N[rows_M, None], min_p_N[rows_M, None]
    if bool((top_p_M1 < 1).any()):
        probs_MV.masked_fill_(~_nucleus(probs_MV, top_p_M1), 0)
    floor_M1 = min_p_M1.to(probs_MV.dtype) * probs_MV.amax(dim=1, keepdim=True)
    probs_MV.masked_fill_(probs_MV < floor_M1, 0)
    probs_NV[rows_M] = probs_MV / probs_MV.sum(dim=1, keepdim=True)


def _nucleus(probs_MV: Tensor, top_p_M1: Tensor) -> Tensor:
    """Mark the smallest most likely set whose mass reaches p; everything where p is 1."""
    cut_M1 = top_p_M1 < 1
    vocab_size = probs_MV.shape[1]
    for width in (*_HEADS, vocab_size):
        head_MH = probs_MV.topk(min(width, vocab_size), dim=1).values
        mass_MH = head_MH.cumsum(dim=1, dtype=torch.float64)
        if not bool((cut_M1 & (mass_MH[:, -1:] < top_p_M1)).any()):
            break
    count_M = 1 + (mass_MH[:, :-1] < top_p_M1).sum(dim=1)
    return _highest(probs_MV, head_MH, count_M) | ~cut_M1


def _highest(values_MV: Tensor, sorted_MH: Tensor, count_M: Tensor) -> Tensor:
    """Mark the count_M[m] highest values of each row, of equal ones those with the lowest ids."""
    cutoff_M1 = sorted_MH.gather(1, count_M[:, None] - 1)
    above_MV = values_MV > cutoff_M1
    tied_MV = values_MV == cutoff_M1
    places_M1 = count_M[:, None] - above_MV.sum(dim=1, keepdim=True)
    if bool((tied_MV.sum(dim=1, keepdim=True) > places_M1).any()):
        tied_MV &= tied_MV.cumsum(dim=1) <= places_M1
    return above_MV | tied_MV
