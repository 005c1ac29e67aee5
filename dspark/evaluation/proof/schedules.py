"""The schedules under proof: thin callers of the production functions of `scheduling`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt

from dspark.evaluation.proof.rounds import FloatArray, IntArray, Memory, Schedule, View
from dspark.scheduling.history import RequestHistory
from dspark.scheduling.prefix import (
    best_budget,
    fill_budget,
    fixed_lengths,
    prefix_lengths,
    threshold_lengths,
)
from dspark.scheduling.survival import confidence, survival


def step_costs(num_drafts: int) -> dict[str, FloatArray]:
    """Milliseconds of steps that verify 0..N drafts in all, in shapes that hardware has.

    "linear" has a floor and a slope; "stairs" rises at every third draft; "jagged" also falls,
    as kernels that prefer certain shapes do.
    """
    drafts = np.arange(num_drafts + 1)
    return {
        "linear": 1 + 0.35 * drafts,
        "stairs": 1 + 0.8 * ((drafts + 2) // 3),
        "jagged": 1 + 0.3 * drafts + 0.5 * (drafts % 2),
    }


def telling_costs(logits: Sequence[FloatArray]) -> FloatArray:
    """Step costs under which draft n pays on some paths and on others not, if n can differ at all.

    Args:
        logits: of each request, along every path [N, K].
    """
    paths = product(*(survival(confidence(rows)) for rows in logits))
    ranked = np.array([np.sort(np.concatenate(rows))[::-1] for rows in paths])
    # Just below the middle: a survival that is the same on all paths pays.
    least = 0.999 * (ranked.min(axis=0) + ranked.max(axis=0)) / 2
    gained = len(logits) + np.concatenate([[0.0], np.cumsum(np.median(ranked, axis=0))[:-1]])
    return np.cumprod(np.concatenate([[1.0], 1 + least / gained]))


def fixed(length: int) -> Schedule:
    """The same length for all."""
    return Schedule(lambda view, _memory: fixed_lengths(len(view.logits_RK), length))


def threshold(least: float) -> Schedule:
    """The longest prefix whose confidences reach the threshold."""
    return Schedule(lambda view, _memory: threshold_lengths(confidence(view.logits_RK), least))


def prefix(step_ms: npt.ArrayLike) -> Schedule:
    """Algorithm 1."""
    return Schedule(lambda view, _memory: prefix_lengths(survivals(view), step_ms))


@dataclass(frozen=True)
class _Lagged:
    """What `lagged` takes from finished rounds: the budget, and a factor for each request."""

    budget: int
    factors: tuple[float, ...]


def lagged(step_ms: npt.ArrayLike) -> Schedule:
    """A budget searched over the round before, filled by the survivals of this one.

    Survivals are scaled by each request's history, so verifier outcomes of the round before act
    on the lengths too; the first round knows nothing and counts every survival as 1.
    """

    def remembered(history: RequestHistory, requests: int, drafts: int) -> _Lagged:
        factors = history.factors(range(requests))
        earlier = history.earlier(range(requests), drafts) * factors[:, None]
        return _Lagged(best_budget(earlier, step_ms), tuple(factors.tolist()))

    def lengths(view: View, memory: Memory) -> IntArray:
        known = memory
        if known is None:
            known = remembered(RequestHistory(), *view.logits_RK.shape)
        assert isinstance(known, _Lagged)
        return fill_budget(survivals(view) * np.array(known.factors)[:, None], known.budget)

    def remember(view: View, accepted: IntArray, verified: IntArray) -> Memory:
        history = RequestHistory(doubt=0.25)
        for r, row in enumerate(survivals(view)):
            history.update(r, row, int(accepted[r]), int(verified[r]))
        return remembered(history, *view.logits_RK.shape)

    return Schedule(lengths, remember)


def searched_globally(step_ms: npt.ArrayLike) -> Schedule:
    """The best budget of *this* round's survivals: right under `coupled` only."""

    def lengths(view: View, _memory: Memory) -> IntArray:
        now = survivals(view)
        return fill_budget(now, best_budget(now, step_ms))

    return Schedule(lengths)


def survivals(view: View) -> FloatArray:
    """Survivals [R, K] of a view."""
    return survival(confidence(view.logits_RK))


def telling_thresholds(logits: Sequence[FloatArray]) -> list[float]:
    """Thresholds at and between the confidences that occur, so that lengths hang on the path.

    Args:
        logits: of each request, along every path [N, K].
    """
    first = min(float(confidence(rows[:, 0]).min()) for rows in logits)
    later = np.unique(np.concatenate([confidence(rows[:, 1:]).ravel() for rows in logits]))
    between = (later[1:] + later[:-1]) / 2
    cuts = [float(c) for c in np.sort(np.concatenate([between, later[1:]])) if c <= first]
    return [0.5, *cuts[:: max(1, len(cuts) // 3)]]
