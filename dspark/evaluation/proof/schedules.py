"""Schedules for the proof: thin callers of the production functions of `scheduling`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
import numpy.typing as npt

from dspark.evaluation.proof.rounds import FloatArray, IntArray, Memory, Schedule, View
from dspark.scheduling import budget as admission
from dspark.scheduling import lookahead as foresight
from dspark.scheduling import survival as chances
from dspark.scheduling.calibration import TemperatureScaling
from dspark.scheduling.cost_table import CostPoint, CostTable, MachineKey
from dspark.scheduling.history import RequestHistory
from dspark.scheduling.protection import Pace, Protection
from dspark.scheduling.step_times import StepTime, StepTimes


def step_costs(num_drafts: int) -> dict[str, FloatArray]:
    """Milliseconds of steps that verify 0..N drafts in all, in shapes that hardware has.

    "linear" has a floor and a slope; "stairs" rises at every third draft; "jagged" also falls,
    as kernels that prefer certain shapes do; "tier" has room for one draft, whoever gets it.
    """
    drafts = np.arange(num_drafts + 1)
    return {
        "linear": 1 + 0.35 * drafts,
        "stairs": 1 + 0.8 * ((drafts + 2) // 3),
        "jagged": 1 + 0.3 * drafts + 0.5 * (drafts % 2),
        "tier": 1 + 0.1 * (drafts > 0) + 2 * (drafts > 1),
    }


def telling_costs(logits: Sequence[FloatArray]) -> FloatArray:
    """Step costs under which draft n pays on some paths and on others not, if n can differ at all.

    Args:
        logits: of each request, along every path [N, K].
    """
    paths = product(*(chances.survival(chances.confidence(rows)) for rows in logits))
    return costs_between([np.concatenate(rows) for rows in paths], len(logits))


def costs_between(survivals: Sequence[FloatArray], requests: int) -> FloatArray:
    """Step costs between the gains of draft n, as different choices of what is drafted have it.

    Args:
        survivals: of all drafts of a round together, for every such choice.
        requests: in the round.
    """
    ranked = np.sort(np.array(survivals), axis=1)[:, ::-1]
    # Below the middle, so that a survival that hardly differs pays, and the walk goes on.
    least = 0.97 * (2 * ranked.min(axis=0) + ranked.max(axis=0)) / 3
    gained = requests + np.concatenate([[0.0], np.cumsum(np.median(ranked, axis=0))[:-1]])
    costs: FloatArray = np.cumprod(np.concatenate([[1.0], 1 + least / gained]))
    return costs


def fixed(length: int) -> Schedule:
    """The same length for all."""
    return Schedule(lambda view, _memory: admission.fixed_lengths(len(view.logits_RK), length))


def threshold(least: float) -> Schedule:
    """The longest prefix whose confidences reach the threshold."""
    return Schedule(
        lambda view, _memory: admission.threshold_lengths(chances.confidence(view.logits_RK), least)
    )


def recalibrated(least: float) -> Schedule:
    """A threshold on confidences whose temperatures the round before has decided."""

    def lengths(view: View, memory: Memory) -> IntArray:
        temperature = memory if isinstance(memory, float) else 1.0
        scaling = TemperatureScaling((temperature,) * view.logits_RK.shape[1])
        return admission.threshold_lengths(scaling.apply(view.logits_RK), least)

    def remember(_view: View, accepted_R: IntArray, verified_R: IntArray) -> Memory:
        return 0.4 if accepted_R.sum() == verified_R.sum() else 3.0

    return Schedule(lengths, remember)


def prefix(step_ms: npt.ArrayLike) -> Schedule:
    """Algorithm 1."""
    return Schedule(lambda view, _memory: admission.prefix_lengths(survivals(view), step_ms))


@dataclass(frozen=True)
class _Finished:
    """What finished rounds say: survivals, and a factor for each request that keeps failing."""

    earlier_RK: tuple[tuple[float, ...], ...]
    factors_R: tuple[float, ...]

    @classmethod
    def of(cls, history: RequestHistory, requests: int) -> _Finished:
        factors_R = history.factors(range(requests))
        earlier_RK = history.earlier(range(requests), history.typical) * factors_R[:, None]
        return cls(tuple(map(tuple, earlier_RK.tolist())), tuple(factors_R.tolist()))

    @classmethod
    def unknown(cls, view: View) -> _Finished:
        """Before the first round: every survival counts as 1."""
        requests, drafts = view.logits_RK.shape
        return cls.of(RequestHistory(drafts), requests)

    @classmethod
    def after(cls, view: View, accepted_R: IntArray, verified_R: IntArray) -> _Finished:
        """After one round; little doubt, so that one failure lowers a factor already."""
        requests, drafts = view.logits_RK.shape
        typical_K = 0.5 ** np.arange(1, drafts + 1)
        history = RequestHistory(drafts, doubt=0.25, typical_K=typical_K)
        history.update(range(requests), survivals(view), accepted_R, verified_R)
        return cls.of(history, requests)

    def now(self, view: View) -> FloatArray:
        """This round's survivals, scaled by the factors."""
        scaled_RK: FloatArray = survivals(view) * np.array(self.factors_R)[:, None]
        return scaled_RK


def _known(view: View, memory: Memory) -> _Finished:
    known = _Finished.unknown(view) if memory is None else memory
    assert isinstance(known, _Finished)
    return known


def lagged(step_ms: npt.ArrayLike) -> Schedule:
    """A budget searched over the round before, filled by the survivals of this one.

    Survivals are scaled by each request's history, so what the verifier decided in the round
    before acts on the lengths too.
    """

    @cache
    def budget(earlier_RK: tuple[tuple[float, ...], ...]) -> int:
        return admission.best_budget(earlier_RK, step_ms)

    def lengths(view: View, memory: Memory) -> IntArray:
        known = _known(view, memory)
        return admission.fill_budget(known.now(view), budget(known.earlier_RK))

    return Schedule(lengths, _Finished.after)


def lookahead(step_ms: npt.ArrayLike) -> Schedule:
    """`lagged`, but the budget knows this round's first confidences as well."""

    def lengths(view: View, memory: Memory) -> IntArray:
        known = _known(view, memory)
        return foresight.lookahead_lengths(known.now(view), known.earlier_RK, step_ms)

    return Schedule(lengths, _Finished.after)


@dataclass(frozen=True)
class _Timed:
    """What a finished round says and took: corrected step costs, none where drafting pauses."""

    finished: _Finished
    step_ms_N: tuple[float, ...] | None


def measured(step_ms: npt.ArrayLike) -> Schedule:
    """`lagged` with costs that the round before corrects, and drafting that must pay for itself.

    The time of a round depends on which drafts were kept, the worst case for a clock. Where none
    did, drafting has lost so much that the next round drafts nothing.
    """
    costs_N = np.asarray(step_ms, dtype=np.float64)
    machine = MachineKey("enumeration", 1, "float64", "small", "small")

    def times(requests: int, drafts: int) -> StepTimes:
        points = [CostPoint(requests + n, requests, costs_N[n], 0.0) for n in range(len(costs_N))]
        return StepTimes(CostTable(tuple(points), machine), drafts)

    @cache
    def budget(earlier_RK: tuple[tuple[float, ...], ...], step_ms_N: tuple[float, ...]) -> int:
        return admission.best_budget(earlier_RK, step_ms_N)

    def lengths(view: View, memory: Memory) -> IntArray:
        requests, drafts = view.logits_RK.shape
        known = memory
        if known is None:
            now_N = times(requests, drafts).verify_ms(requests, len(costs_N))
            known = _Timed(_Finished.unknown(view), tuple(now_N.tolist()))
        assert isinstance(known, _Timed)
        if known.step_ms_N is None:
            return admission.fixed_lengths(requests, 0)
        most = budget(known.finished.earlier_RK, known.step_ms_N)
        return admission.fill_budget(known.finished.now(view), most)

    def remember(view: View, accepted_R: IntArray, verified_R: IntArray) -> Memory:
        requests, drafts = view.logits_RK.shape
        stayed, verified = int(accepted_R.sum()), int(verified_R.sum())
        spent_ms = costs_N[verified] * (2 + stayed if stayed else 20)
        plain = StepTime(requests, 0, 0, 0, 0.0, costs_N[0], requests)
        seen = StepTime(requests, verified, 0, drafts, 0.0, spent_ms, requests + stayed)
        corrected, protection = times(requests, drafts), Protection()
        for each in map(Pace().even, (plain, seen)):
            corrected.learn(each)
            protection.learn(each)
        drafting = protection.allows(requests)
        step_ms_N = tuple(corrected.verify_ms(requests, len(costs_N)).tolist())
        finished = _Finished.after(view, accepted_R, verified_R)
        return _Timed(finished, step_ms_N if drafting else None)

    return Schedule(lengths, remember)


def searched_globally(step_ms: npt.ArrayLike) -> Schedule:
    """The best budget of *this* round's survivals: right under `coupled` only."""

    def lengths(view: View, _memory: Memory) -> IntArray:
        now = survivals(view)
        return admission.fill_budget(now, admission.best_budget(now, step_ms))

    return Schedule(lengths)


def survivals(view: View) -> FloatArray:
    """Survivals [R, K] of a view."""
    return view.survivals_RK


def telling_thresholds(logits: Sequence[FloatArray]) -> list[float]:
    """Thresholds at and between the confidences that occur, so that lengths depend on the path.

    Args:
        logits: of each request, along every path [N, K].
    """
    first = min(float(chances.confidence(rows[:, 0]).min()) for rows in logits)
    later = np.unique(np.concatenate([chances.confidence(rows[:, 1:]).ravel() for rows in logits]))
    between = (later[1:] + later[:-1]) / 2
    cuts = [float(c) for c in np.sort(np.concatenate([between, later[1:]])) if c <= first]
    return [0.5, *cuts[:: max(1, len(cuts) // 3)]]
