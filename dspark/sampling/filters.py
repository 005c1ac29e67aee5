"""Top-k, top-p and min-p filters: the likeliest tokens of a row, which are all it can draw.

Each filter keeps a beginning of the row's tokens in order of falling score, equal ones by rising
id. So the likeliest 64 are selected first, and more of the rows that keep them all. On a CPU a
histogram of a row's probabilities finds the least one that stays, of any number and unsorted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_WIDTHS = (64, 512, 4096)
_GROUP_TOKENS = 16
# Of a probability in fp32: what is left has the exponent and 7 bits of the fraction.
_BIN_SHIFT = 16
# Of most rows, tokens likelier than this hold the mass that top-p asks for.
_LIKELY = 1e-4
# More than a sum of a row's probabilities is off 1.
_ROUNDING = 1e-4


@dataclass(frozen=True)
class Tails:
    """What N rows cut off.

    Attributes:
        top_k_N: int64, as many tokens stay; 0, or as many as there are or more, cuts nothing.
        top_p_N: float64; then the smallest likeliest set whose mass reaches p, all of it at 1.
        min_p_N: float64; then tokens at least this fraction as likely as the likeliest.
    """

    top_k_N: Tensor
    top_p_N: Tensor
    min_p_N: Tensor

    def rows(self, index_M: Tensor) -> Tails:
        """The rows named, in that order."""
        return Tails(self.top_k_N[index_M], self.top_p_N[index_M], self.min_p_N[index_M])


def likeliest(scores_NC: Tensor, tails: Tails) -> tuple[Tensor, Tensor]:
    """The columns that a row's filters leave, and their probabilities.

    Args:
        scores_NC: logits over temperature, finite or minus infinity, some finite in each row.
        tails: what is cut off.

    Returns:
        (columns [N, M] in ascending order, probabilities [N, M] that sum to 1), where M is the most
        that any row has left; the others are padded with column C and probability 0. What a row
        has does not depend on the other rows, in any bit.
    """
    count, everything = scores_NC.shape
    limit_N = torch.where(tails.top_k_N > 0, tails.top_k_N, everything).clamp(max=everything)
    binned_N = torch.zeros_like(limit_N, dtype=torch.bool)
    if scores_NC.dtype == torch.float32 and scores_NC.device.type == "cpu":
        binned_N = limit_N == everything
    if bool(binned_N.all()):
        return _binned(scores_NC, tails)
    if not bool(binned_N.any()):
        return _selected(scores_NC, tails, limit_N)
    few_M, all_M = (~binned_N).nonzero().flatten(), binned_N.nonzero().flatten()
    selected = _selected(scores_NC[few_M], tails.rows(few_M), limit_N[few_M])
    binned = _binned(scores_NC[all_M], tails.rows(all_M))
    return _joined([(few_M, *selected), (all_M, *binned)], count, everything)


def _joined(
    parts: Sequence[tuple[Tensor, Tensor, Tensor]], count: int, everything: int
) -> tuple[Tensor, Tensor]:
    """Columns and probabilities of all rows, padded, from those of the rows named in each part."""
    most = max(columns.shape[1] for _, columns, _ in parts)
    columns_NM = parts[0][1].new_full((count, most), everything)
    probs_NM = parts[0][2].new_zeros(count, most)
    for rows, columns, probs in parts:
        columns_NM[rows, : columns.shape[1]] = columns
        probs_NM[rows, : columns.shape[1]] = probs
    return columns_NM, probs_NM


def _binned(scores_NC: Tensor, tails: Tails) -> tuple[Tensor, Tensor]:
    """As `likeliest`, for rows without top-k in fp32 on a CPU: row by row, in the cache."""
    rows = [
        _binned_row(scores_C, top_p, min_p)
        for scores_C, top_p, min_p in zip(
            scores_NC, tails.top_p_N.tolist(), tails.min_p_N.tolist(), strict=True
        )
    ]
    shape = (len(rows), max(len(columns_M) for columns_M, _ in rows))
    columns_NM = np.full(shape, scores_NC.shape[1])
    probs_NM = np.zeros(shape, np.float32)
    for place, (columns_M, probs_M) in enumerate(rows):
        columns_NM[place, : len(columns_M)], probs_NM[place, : len(probs_M)] = columns_M, probs_M
    return torch.from_numpy(columns_NM), torch.from_numpy(probs_NM)


def _binned_row(
    scores_C: Tensor, top_p: float, min_p: float
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float32]]:
    """What top-p and min-p leave of one row: columns [M] and probabilities [M].

    Probabilities fall into bins by their leading bits, so that one pass gives the mass above each;
    only the bin in which the mass reaches p is sorted.
    """
    probs_C = torch.softmax(scores_C, dim=0).numpy()
    # Tokens far below the even share of what top-p leaves out do not hold that together.
    least = (1 - top_p) / (2 * len(probs_C)) if 1 - top_p > _ROUNDING else 0.0
    columns_M = np.flatnonzero(probs_C > np.float32(max(least, _LIKELY) if top_p < 1 else 0))
    probs_M = probs_C[columns_M]
    if top_p < 1 and least < _LIKELY and probs_M.sum(dtype=np.float64) < top_p + _ROUNDING:
        columns_M = np.flatnonzero(probs_C > np.float32(least))
        probs_M = probs_C[columns_M]
    if top_p < 1:
        bins_M = probs_M.view(np.int32) >> _BIN_SHIFT
        bins_M -= bins_M.min()
        above_B = np.append(np.bincount(bins_M, weights=probs_M)[::-1].cumsum()[::-1], 0.0)
        last = int(np.count_nonzero(above_B[1:] >= top_p))
        inside = np.flatnonzero(bins_M == last)
        scores = scores_C.numpy()[columns_M[inside]]
        inside = inside[np.argsort(-scores, kind="stable")]
        mass = np.append(0.0, probs_M[inside].cumsum(dtype=np.float64)) + above_B[last + 1]
        stays_M = bins_M > last
        stays_M[inside[mass[:-1] < top_p]] = True
        columns_M, probs_M = columns_M[stays_M], probs_M[stays_M]
    if min_p > 0:
        stays_M = probs_M >= np.float32(min_p) * probs_M.max()
        columns_M, probs_M = columns_M[stays_M], probs_M[stays_M]
    probs_M /= np.float32(probs_M.sum(dtype=np.float64))
    return columns_M, probs_M


def _selected(scores_NC: Tensor, tails: Tails, limit_N: Tensor) -> tuple[Tensor, Tensor]:
    """As `likeliest`: the likeliest 64 of each row, and more of the rows that keep them all."""
    count, everything = scores_NC.shape
    whole_NC = None if bool((limit_N < everything).all()) else torch.softmax(scores_NC, dim=1)
    peak_N = scores_NC.amax(dim=1)
    parts = list[tuple[Tensor, Tensor, Tensor]]()
    rows_M = torch.arange(count, device=scores_NC.device)
    for width in _widths(everything, limit_N):
        begin = _Beginning.of(scores_NC, whole_NC, peak_N, limit_N, rows_M, width)
        kept_M, probs_MW = begin.cut(tails.rows(rows_M), limit_N[rows_M])
        known_M = begin.reaches(kept_M, width)
        if bool(known_M.any()):
            found = (begin.columns_MW[known_M], probs_MW[known_M], kept_M[known_M])
            parts.append((rows_M[known_M], *_ascending(*found, everything)))
        rows_M = rows_M[~known_M]
        if not rows_M.numel():
            break
    return parts[0][1:] if len(parts) == 1 else _joined(parts, count, everything)


def _widths(everything: int, limit_N: Tensor) -> Iterator[int]:
    # A top-k row is known once it is seen what follows the last that stays.
    cut_N = limit_N[limit_N < everything]
    needed = 1 + int(cut_N.max()) if cut_N.numel() else 0
    yield from (w for w in (*_WIDTHS, everything) if needed <= w < everything)
    yield everything


@dataclass(frozen=True)
class _Beginning:
    """The W likeliest columns of M rows in order, equal scores by rising column."""

    columns_MW: Tensor
    scores_MW: Tensor
    probs_MW: Tensor
    everything: int

    @classmethod
    def of(
        cls,
        scores_NC: Tensor,
        whole_NC: Tensor | None,
        peak_N: Tensor,
        limit_N: Tensor,
        rows_M: Tensor,
        width: int,
    ) -> _Beginning:
        everything = scores_NC.shape[1]
        every_row = len(rows_M) == len(scores_NC)
        scores_MC = scores_NC if every_row else scores_NC[rows_M]
        scores_MW, columns_MW = highest(scores_MC, width)
        if bool((scores_MW[:, 1:] == scores_MW[:, :-1]).any()):
            columns_MW = columns_MW.sort(dim=1).values
            order = scores_MC.gather(1, columns_MW).sort(dim=1, descending=True, stable=True)
            scores_MW, columns_MW = order.values, columns_MW.gather(1, order.indices)
        # Of a row with top-k, k scores are all; of others, the sum is over all columns.
        limit_M1 = limit_N[rows_M, None]
        weights_MW = (scores_MW - peak_N[rows_M, None]).exp_()
        sums_MW = weights_MW.cumsum(dim=1, dtype=torch.float64)
        total_M1 = sums_MW.gather(1, (limit_M1 - 1).clamp(max=width - 1))
        probs_MW = weights_MW / total_M1.to(weights_MW.dtype)
        if whole_NC is not None:
            of_all_MW = whole_NC[rows_M[:, None], columns_MW]
            probs_MW = torch.where(limit_M1 < everything, probs_MW, of_all_MW)
        return cls(columns_MW, scores_MW, probs_MW, everything)

    def cut(self, tails: Tails, limit_M: Tensor) -> tuple[Tensor, Tensor]:
        """How many columns stay of each row, and all columns' probabilities after that."""
        probs_MW = self.probs_MW
        mass_MW = probs_MW.cumsum(dim=1, dtype=torch.float64)
        place_W = torch.arange(probs_MW.shape[1], device=probs_MW.device)
        stays_MW = (place_W < limit_M[:, None]) & (probs_MW > 0)
        short_MW = (mass_MW[:, :-1] < tails.top_p_N[:, None]) | (tails.top_p_N[:, None] >= 1)
        stays_MW[:, 1:] &= short_MW
        stays_MW &= probs_MW >= tails.min_p_N[:, None].to(probs_MW.dtype) * probs_MW[:, :1]
        kept_M = stays_MW.sum(dim=1)
        total_M1 = mass_MW.gather(1, kept_M[:, None] - 1)
        return kept_M, probs_MW / total_M1.to(probs_MW.dtype)

    def reaches(self, kept_M: Tensor, rank: int) -> Tensor:
        """Whether no column behind the first `rank` could stay, or stand before one that does.

        Of equal scores at the end of the selection, some may have been left out.
        """
        if rank >= self.everything:
            return torch.ones_like(kept_M, dtype=torch.bool)
        last_M = self.scores_MW.gather(1, kept_M[:, None] - 1).squeeze(1)
        return (last_M > self.scores_MW[:, rank - 1]) | (self.probs_MW[:, rank - 1] == 0)


def _ascending(
    columns_MW: Tensor, probs_MW: Tensor, kept_M: Tensor, everything: int
) -> tuple[Tensor, Tensor]:
    """The first columns of each row by rising column, padded."""
    most = int(kept_M.max())
    columns_MK, probs_MK = columns_MW[:, :most], probs_MW[:, :most]
    beyond_MK = torch.arange(most, device=kept_M.device) >= kept_M[:, None]
    order = columns_MK.masked_fill(beyond_MK, everything).sort(dim=1)
    return order.values, probs_MK.masked_fill(beyond_MK, 0).gather(1, order.indices)


def highest(scores_NC: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` highest of each row in falling order and their columns, as `torch.topk`.

    The highest stand in groups of columns whose own maxima are among the `count` highest, so only
    these groups are searched.
    """
    columns = scores_NC.shape[1]
    groups = columns // _GROUP_TOKENS
    if count * 4 > groups:
        return scores_NC.topk(count, dim=1)
    grouped = scores_NC[:, : groups * _GROUP_TOKENS]
    # Neighbours stand in different groups: maxima of whole rows of numbers are fast to take.
    maxima_NG = torch.unflatten(grouped, 1, (_GROUP_TOKENS, groups)).amax(dim=1)
    chosen_NW = maxima_NG.topk(count, dim=1, sorted=False).indices
    steps_S = torch.arange(0, groups * _GROUP_TOKENS, groups, device=scores_NC.device)
    places_NP = (chosen_NW[:, None, :] + steps_S[:, None]).flatten(1)
    rest_P = torch.arange(groups * _GROUP_TOKENS, columns, device=scores_NC.device)
    places_NP = torch.cat([places_NP, rest_P.expand(len(places_NP), -1)], dim=1)
    found = scores_NC.gather(1, places_NP).topk(count, dim=1)
    return found.values, places_NP.gather(1, found.indices)
