"""Verification budget: lengths per request from confidences and step costs.

A length may depend on draft tokens only through prefixes that are already admitted: c_k is known
before x_k is drawn, so deciding about draft k from c_1..c_k keeps every output exact. Deciding
from the probability of the token drawn, or from confidences behind the first that fails, does not.

With R requests and n drafts admitted in all, a step gains R + (their survivals) tokens in
expectation and takes step_ms[n]; the throughput is the quotient (section 3.2.2). Drafts are
admitted in one order, by falling survival, ties by (position, request); survival never rises
within a request, so prefixes stay whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import numpy.typing as npt

from dspark.errors import NumericsError, UsageError

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


def fixed_lengths(num_requests: int, length: int) -> IntArray:
    """The same verification length for every request.

    Args:
        num_requests: R.
        length: drafts to verify, K for all of them.

    Returns:
        [R] int64.

    Raises:
        UsageError: the length is negative.
    """
    if length < 0:
        raise UsageError(f"The verification length is {length}, but must be 0 or more.")
    return np.full(num_requests, length, dtype=np.int64)


def threshold_lengths(confidence_RK: npt.ArrayLike, threshold: float) -> IntArray:
    """The longest prefix of every request whose confidences all reach the threshold.

    Args:
        confidence_RK: c_k in [0, 1]; NaN reaches no threshold.
        threshold: between 0 (verify everything) and 1.

    Returns:
        [R] int64, 0..K.

    Raises:
        UsageError: the threshold is outside [0, 1].
    """
    if not 0 <= threshold <= 1:
        raise UsageError(f"The confidence threshold is {threshold}, but must be between 0 and 1.")
    reached_RK = np.asarray(confidence_RK, dtype=np.float64) >= threshold
    lengths_R: IntArray = np.logical_and.accumulate(reached_RK, axis=-1).sum(axis=-1)
    return lengths_R


def prefix_lengths(
    survival_RK: npt.ArrayLike, step_ms_N: npt.ArrayLike, limits_R: npt.ArrayLike | None = None
) -> IntArray:
    """Algorithm 1: admit drafts by falling survival until one does not raise the throughput.

    Exact because it stops there: whether a draft is admitted hangs on survivals up to its own
    only. It finds the best budget where the throughput has one peak, and stops at stairs. Drafts
    of survival 0 are never admitted.

    Args:
        survival_RK: survivals a_k of this round (`survival.survival`).
        step_ms_N: [N + 1] milliseconds of a step that verifies 0..N drafts in all, drafting
            included; never more than N are admitted.
        limits_R: most drafts of each request; None allows K.

    Returns:
        [R] int64.

    Raises:
        NumericsError: a survival is NaN.
        UsageError: survivals rise within a request, or a step cost is not positive and finite.
    """
    ranked = _ranked(survival_RK, limits_R)
    step_ms = _checked_costs(step_ms_N)
    candidates = min(int(np.count_nonzero(ranked.survival_D)), len(step_ms) - 1)
    throughput_N = ranked.throughput(step_ms[: candidates + 1])
    stops = np.flatnonzero(throughput_N[1:] <= throughput_N[:-1])
    return ranked.lengths(int(stops[0]) if stops.size else candidates)


def best_budget(
    survival_RK: npt.ArrayLike,
    step_ms_N: npt.ArrayLike,
    limits_R: npt.ArrayLike | None = None,
    margin: float = 0.0,
) -> int:
    """How many drafts in all promise the highest throughput, searched globally.

    Exact only on survivals of *earlier* rounds (the schedule `lagged`), or under the `coupled`
    verifier: on this round's own the search sees behind the budget it chooses.

    Args:
        survival_RK: survivals a_k; 1 for requests without a history.
        step_ms_N: as for `prefix_lengths`.
        limits_R: most drafts of each request; None allows K.
        margin: against noise: every draft within limits (at most N) is verified unless a smaller
            budget promises more than (1 + margin) times as much.

    Returns:
        0..N.

    Raises:
        NumericsError: a survival is NaN.
        UsageError: survivals rise within a request, a step cost is not positive and finite, or
            the margin is negative.
    """
    _check_margin(margin)
    throughput_N = _ranked(survival_RK, limits_R).throughput(_checked_costs(step_ms_N))
    best, full = int(throughput_N.argmax()), len(throughput_N) - 1
    return best if throughput_N[best] > (1 + margin) * throughput_N[full] else full


def survey_depths(
    survival_RK: npt.ArrayLike,
    verify_ms_N: npt.ArrayLike,
    draft_ms: Mapping[int, float],
    limits_R: npt.ArrayLike | None = None,
    margin: float = 0.0,
    *,
    stops: bool = False,
) -> dict[int, tuple[int, float]]:
    """`best_budget` of blocks that are cut to some depths, and what each promises, by one ranking.

    Args:
        survival_RK: as there, of whole blocks, and so are `limits_R` and `margin`.
        verify_ms_N: [N + 1] milliseconds of the target's part of a step that verifies 0..N drafts.
        draft_ms: per depth, milliseconds of drafting so deep.
        limits_R: as there.
        margin: as there.
        stops: whether what Algorithm 1 would admit is promised, in place of the best budget.

    Returns:
        Per depth (budget, tokens per millisecond that are promised).

    Raises:
        NumericsError, UsageError: as there.
    """
    _check_margin(margin)
    verify_ms = _checked_costs(verify_ms_N)
    if not all(ms >= 0 for ms in draft_ms.values()):
        raise UsageError(f"Drafting must take 0 ms or more, but takes {dict(draft_ms)}.")
    if len(survival_RK := np.asarray(survival_RK, np.float64)) == 1:
        survival_K = _checked_row(survival_RK)
        if limits_R is not None:
            survival_K = survival_K[: int(np.asarray(limits_R)[0])]
        return _survey_row(survival_K, verify_ms.tolist(), draft_ms, margin, stops=stops)
    ranked, most = _ranked(survival_RK, limits_R), len(verify_ms) - 1
    draft_ms_P1 = np.array(list(draft_ms.values()), np.float64)[:, None]
    within_PD = ranked.positions_D < np.array(list(draft_ms))[:, None]
    shape, rows_P = (len(draft_ms), len(ranked.survival_D) + 1), np.arange(len(draft_ms))
    admitted_PN, gain_PN = np.zeros(shape, np.int64), np.empty(shape)
    gain_PN[:, 0] = ranked.num_requests
    np.multiply(within_PD, ranked.survival_D, out=gain_PN[:, 1:])
    within_PD.cumsum(axis=1, out=admitted_PN[:, 1:])
    step_ms_PN = verify_ms[np.minimum(admitted_PN, most)] + draft_ms_P1
    reached_PN = admitted_PN <= most
    per_ms_PN = np.where(reached_PN, gain_PN.cumsum(axis=1) / step_ms_PN, 0.0)
    best_P, full_P = per_ms_PN.argmax(axis=1), reached_PN.sum(axis=1) - 1
    highest_P = per_ms_PN[rows_P, best_P]
    below_P = highest_P > (1 + margin) * per_ms_PN[rows_P, full_P]
    budget_P = admitted_PN[rows_P, np.where(below_P, best_P, full_P)]
    if stops:  # drafts that a depth leaves out repeat the entry before them, and do not stop it
        falls_PN = np.ones(shape, bool)
        falls_PN[:, :-1] = within_PD & (per_ms_PN[:, 1:] <= per_ms_PN[:, :-1])
        highest_P = per_ms_PN[rows_P, falls_PN.argmax(axis=1)]
    return dict(zip(draft_ms, zip(budget_P.tolist(), highest_P.tolist(), strict=True), strict=True))


def _survey_row(
    survival_K: Sequence[float],
    verify_ms_N: Sequence[float],
    draft_ms: Mapping[int, float],
    margin: float,
    *,
    stops: bool,
) -> dict[int, tuple[int, float]]:
    """`survey_depths` of one request, whose drafts are in order as they are.

    In plain numbers, which for one short row take a quarter of the time of arrays.
    """
    gains, found = list(accumulate(survival_K, initial=1.0)), dict[int, tuple[int, float]]()
    for depth, draft in draft_ms.items():
        steps = zip(gains[: depth + 1], verify_ms_N, strict=False)
        per_ms = [gain / (verify + draft) for gain, verify in steps]
        highest, full = max(per_ms), len(per_ms) - 1
        budget = per_ms.index(highest) if highest > (1 + margin) * per_ms[full] else full
        if stops:
            highest = next((a for a, b in pairwise(per_ms) if b <= a), per_ms[full])
        found[depth] = budget, highest
    return found


def _checked_row(survival_1K: FloatArray) -> list[float]:
    """The survivals of one request."""
    row: list[float] = survival_1K[0].tolist()
    if row and not (row[0] == row[0] and all(b <= a for a, b in pairwise(row))):
        _refuse(survival_1K)
    return row


def fill_budget(
    survival_RK: npt.ArrayLike, budget: int, limits_R: npt.ArrayLike | None = None
) -> IntArray:
    """Spend a budget on the drafts of the highest survival.

    Exact where the budget knows nothing of this round's draft tokens.

    Args:
        survival_RK: survivals a_k of this round.
        budget: drafts in all; what the limits cannot take is left over.
        limits_R: most drafts of each request; None allows K.

    Returns:
        [R] int64.

    Raises:
        NumericsError: a survival is NaN.
        UsageError: survivals rise within a request, or the budget is negative.
    """
    _check_budget(budget)
    return _ranked(survival_RK, limits_R).lengths(budget)


def throughput(survival_RK: npt.ArrayLike, lengths_R: npt.ArrayLike, step_ms: float) -> float:
    """Expected tokens per millisecond of a step that verifies these lengths.

    Args:
        survival_RK: survivals a_k.
        lengths_R: drafts of each request that are verified.
        step_ms: milliseconds of the step, drafting included.

    Raises:
        NumericsError: a survival is NaN.
        UsageError: survivals rise within a request, or the cost is not positive and finite.
    """
    ranked = _ranked(survival_RK, lengths_R)
    costs = _checked_costs(np.full(len(ranked.survival_D) + 1, step_ms, dtype=np.float64))
    return float(ranked.throughput(costs)[-1])


def drafting_gain(
    survival_RK: npt.ArrayLike,
    step_ms_N: npt.ArrayLike,
    off_ms: float,
    limits_R: npt.ArrayLike | None = None,
    budget: int | None = None,
) -> float:
    """Throughput of a step with drafts, drafting included, over that of a step without.

    Exact only on survivals of *earlier* rounds, or under the `coupled` verifier.

    Args:
        survival_RK: survivals a_k; 1 for requests without a history.
        step_ms_N: as for `prefix_lengths`.
        off_ms: milliseconds of a step in which nothing is drafted.
        limits_R: most drafts of each request; None allows K.
        budget: drafts in all that the step would verify; None takes the best budget. Algorithm 1
            stops earlier at stairs: give it the sum of its lengths on these survivals.

    Returns:
        The quotient; 0 without requests.

    Raises:
        NumericsError: a survival is NaN.
        UsageError: survivals rise within a request, a cost is not positive and finite, or the
            budget is negative.
    """
    ranked = _ranked(survival_RK, limits_R)
    off_ms = float(_checked_costs([off_ms])[0])
    throughput_N = ranked.throughput(_checked_costs(step_ms_N))
    if budget is not None:
        _check_budget(budget)
        throughput_N = throughput_N[min(budget, len(throughput_N) - 1) :][:1]
    return float(throughput_N.max()) * off_ms / max(ranked.num_requests, 1)


def worth_drafting(
    survival_RK: npt.ArrayLike,
    step_ms_N: npt.ArrayLike,
    off_ms: float,
    limits_R: npt.ArrayLike | None = None,
    margin: float = 0.0,
    budget: int | None = None,
) -> bool:
    """Whether `drafting_gain` is 1 at least.

    Args:
        survival_RK: as there, of earlier rounds, and so are the other arguments but one.
        step_ms_N: as there.
        off_ms: as there.
        limits_R: as there.
        margin: against noise: drafting is given up only where plain decoding promises more than
            (1 + margin) times as much.
        budget: as there.

    Raises:
        NumericsError: a survival is NaN.
        UsageError: as `drafting_gain`, or the margin is negative.
    """
    _check_margin(margin)
    return (1 + margin) * drafting_gain(survival_RK, step_ms_N, off_ms, limits_R, budget) >= 1


@dataclass(frozen=True)
class _Ranked:
    """All D drafts within limits in the order in which they are admitted.

    Attributes:
        num_requests: R.
        requests_D: whose draft it is.
        survival_D: never rising.
        positions_D: its place in the block, from 0.
    """

    num_requests: int
    requests_D: IntArray
    survival_D: FloatArray
    positions_D: IntArray

    def throughput(self, step_ms_N: FloatArray) -> FloatArray:
        """Tokens per millisecond with 0, 1, ... drafts, for as many as there are.

        The sum runs from left to right (`cumsum`), so that an entry knows nothing, not even in
        its last bit, of drafts behind it.
        """
        most = min(len(self.survival_D), len(step_ms_N) - 1)
        gains = np.concatenate(([float(self.num_requests)], self.survival_D[:most]))
        per_ms: FloatArray = np.cumsum(gains) / step_ms_N[: most + 1]
        return per_ms

    def lengths(self, admitted: int) -> IntArray:
        """Drafts of each request among the first `admitted`, [R]."""
        return np.bincount(self.requests_D[:admitted], minlength=self.num_requests).astype(np.int64)


def _ranked(survival_RK: npt.ArrayLike, limits_R: npt.ArrayLike | None) -> _Ranked:
    survival_RK = np.asarray(survival_RK, dtype=np.float64)
    # A comparison with NaN is false: one pass finds rising rows and NaN behind the first column.
    if not (survival_RK[:, 1:] <= survival_RK[:, :-1]).all() or np.isnan(survival_RK[:, :1]).any():
        _refuse(survival_RK)
    # Stably sorted from position-major order, ties fall by (position, request).
    survival_KR = survival_RK.T
    num_drafts, num_requests = survival_KR.shape
    if limits_R is None:
        flat = np.arange(survival_KR.size)
    else:
        within_KR = np.arange(num_drafts)[:, None] < np.asarray(limits_R)
        flat = np.flatnonzero(within_KR)
    values = survival_KR.ravel()[flat]
    order = np.argsort(-values, kind="stable")
    positions_D, requests_D = np.divmod(flat[order], max(num_requests, 1))
    return _Ranked(num_requests, requests_D, values[order], positions_D)


def _refuse(survival_RK: FloatArray) -> None:
    bad = np.flatnonzero(np.isnan(survival_RK).any(axis=1))
    if bad.size:
        raise NumericsError(
            f"The survivals of request {bad[0]} in this batch contain NaN; "
            "check the drafter's confidence head and its calibration."
        )
    rising = np.flatnonzero((np.diff(survival_RK, axis=1) > 0).any(axis=1))[0]
    raise UsageError(
        f"The survivals of request {rising} in this batch rise with the position; "
        "give running products of confidences (dspark.scheduling.survival.survival)."
    )


def _checked_costs(step_ms_N: npt.ArrayLike) -> FloatArray:
    costs: FloatArray = np.asarray(step_ms_N, dtype=np.float64)
    if costs.ndim != 1 or not costs.size or not (costs.min() > 0 and costs.max() < np.inf):
        raise UsageError(
            f"Step costs must be one or more positive milliseconds, but are {costs.tolist()}; "
            "measure the table again (dspark profile) or use --schedule fixed."
        )
    return costs


def _check_margin(margin: float) -> None:
    if not margin >= 0:
        raise UsageError(f"The margin is {margin}, but must be 0 or more.")


def _check_budget(budget: int) -> None:
    if budget < 0:
        raise UsageError(f"The budget is {budget} drafts, but must be 0 or more.")
