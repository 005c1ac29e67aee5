"""Draft scheduler: verification lengths from past rounds and this round's confidences.

Everything that a round's lengths depend on is either known before the round (costs, calibration,
histories, the margin estimator, the budget of `lagged`, whether to draft at all) or a confidence,
which does not see the token it judges. `scheduling` holds the decisions; here is their state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

import numpy as np

from dspark.engine.requests.sequence import ActiveRequest
from dspark.engine.speculation.draft import Drafts
from dspark.engine.speculation.round_record import FloatArray
from dspark.engine.speculation.schedule import Schedule
from dspark.errors import UsageError
from dspark.request import Verifier
from dspark.scheduling.budget import (
    IntArray,
    best_budget,
    fill_budget,
    fixed_lengths,
    prefix_lengths,
    survey_depths,
    threshold_lengths,
    throughput,
)
from dspark.scheduling.calibration import (
    TemperatureClass,
    TemperatureScaling,
    temperature_class,
)
from dspark.scheduling.calibration_file import Calibration
from dspark.scheduling.cost_table import CostTable
from dspark.scheduling.draft_switch import DraftSwitch
from dspark.scheduling.history import RequestHistory
from dspark.scheduling.lookahead import lookahead_lengths
from dspark.scheduling.online import OnlineLogistic, observed
from dspark.scheduling.protection import OLD, Protection
from dspark.scheduling.step_times import StepTime, StepTimes
from dspark.scheduling.survival import confidence, survival

# What a smaller budget, or drafting nothing, must promise more before it is believed: the larger,
# the closer to fixed blocks, the smaller, the more noise of a table may lose (docs/scheduling.md).
MARGIN = 0.005
# Depths of a block that are weighed against the whole one.
_SHALLOW = (1, 2, 4)
# Of so many rounds in which drafts may be learned from, one verifies all of these.
_WHOLE_EVERY = 16


@dataclass(frozen=True)
class Offer:
    """What was drafted for the first D requests of a round.

    Attributes:
        num_requests: D.
        drawn: drafts drawn for each.
        confidence_logits_DK: of these, before calibration; None where nobody reads them.
        are_margins: whether they are margins of raw logits in place of log-odds.
        survival_DK: of nodes of trees in the order of their growth, in place of confidences.
    """

    num_requests: int
    drawn: int
    confidence_logits_DK: FloatArray | None = None
    are_margins: bool = False
    survival_DK: FloatArray | None = None


@dataclass(frozen=True)
class Spent:
    """What a finished round took.

    Attributes:
        rows: of the target's forward, anchors and parts of prompts included.
        draft_ms: milliseconds of drafting.
        schedule_ms: of deciding about drafts.
        verify_ms: of the target's forward and verification.
    """

    rows: int
    draft_ms: float
    schedule_ms: float
    verify_ms: float


@dataclass(frozen=True)
class _Foresight:
    """What earlier rounds promise of a round.

    Attributes:
        depth: drafts of each request.
        budget: how many of all of them are worth verifying.
        gain: throughput over that of drafting nothing.
    """

    depth: int
    budget: int
    gain: float


class Scheduler:
    """Decides how many drafts to make and to verify.

    Args:
        schedule: which, and its settings.
        verifier: of the engine, for requests that are not `reproducible`; under `coupled` lengths
            may depend on anything.
        num_drafts: drafts per round at most, K; of trees, their nodes.
        tree_depth: of trees, how deep they are at most; None for chains.
        calibration: of the drafter; where it has no entry, confidences are taken as they are.
        costs: of this machine, for the schedules that weigh them.

    Attributes:
        depth: how many drafts this round's blocks are made for, where earlier rounds say that more
            are not worth their rows; None for all.
        learns: whether somebody learns from rounds: some are then verified whole.

    Raises:
        UsageError: the schedule weighs costs, and there is no cost table.
    """

    def __init__(
        self,
        schedule: Schedule,
        verifier: Verifier = "block",
        num_drafts: int = 0,
        calibration: Calibration | None = None,
        costs: CostTable | None = None,
        tree_depth: int | None = None,
    ) -> None:
        if schedule.weighs_costs and costs is None:
            raise UsageError(
                f"The schedule '{schedule.name}' needs a cost table of this machine; measure one "
                "with dspark profile, or use the schedule 'fixed'."
            )
        self.schedule = schedule
        self.verifier = verifier
        self.num_drafts = num_drafts
        self.costs = costs
        self._times = {
            name: StepTimes(costs, num_drafts) for name in get_args(TemperatureClass) if costs
        }
        self._kind: TemperatureClass = "greedy"
        self._protection = Protection()
        self._depth_of_blocks = tree_depth or num_drafts
        self._scalings = _scalings(calibration, self._depth_of_blocks)
        typical_K = None if tree_depth else _typical(calibration, num_drafts, verifier)
        self._trees = tree_depth is not None
        self.learns = self._whole = False
        self._learnable = 0
        self._history = RequestHistory(max(num_drafts, 1), typical_K=typical_K)
        self._switch = DraftSwitch(MARGIN)
        self._logistic = OnlineLogistic()
        self.depth: int | None = None
        shallow = () if tree_depth else _SHALLOW
        self._depths = sorted({min(depth, num_drafts) for depth in (*shallow, num_drafts)})
        self._budget: int | None = None
        self._factors_D1: FloatArray | None = None
        self._margins_DK: FloatArray | None = None
        self._survival_DK: FloatArray | None = None

    @property
    def reads_confidences(self) -> bool:
        """Whether lengths hang on confidences."""
        return self.schedule.reads_confidences

    @property
    def budget(self) -> int | None:
        """Drafts that `lagged` lets this round verify, of all requests together; else None."""
        lagged = self.schedule.name == "lagged" and self.verifier != "coupled"
        return self._budget if lagged else None

    def rest(self, num_requests: int) -> float:
        """Rounds of so many requests in which nothing is drafted for certain."""
        return self._protection.rest(num_requests) if self.schedule.protects else 0.0

    def limits(self, requests: Sequence[ActiveRequest], most: Sequence[int]) -> list[int]:
        """Drafts of each request to ask for, decided from earlier rounds only.

        Args:
            requests: who takes part in the round, those without a context last.
            most: how many drafts of each can be of use.
        """
        self._margins_DK = self._survival_DK = self.depth = self._budget = None
        ready = [request for request in requests if request.drafts]
        learnable = self.learns and any(request.request.learn for request in ready)
        self._learnable += learnable
        self._whole = learnable and self._learnable % _WHOLE_EVERY == 0 and not self._trees
        if not ready or not self.schedule.protects:
            return list(most)
        playing = sum(request.ready for request in requests)
        if not self._protection.allows(playing, tries=len(ready) == playing):
            return self._none(most)
        if not self._weighs(len(ready)):
            return list(most)
        self._kind = _kind(ready)
        plan = self._plan(ready, np.array(most[: len(ready)]))
        if not self._switch.decide(plan.gain):
            return self._none(most)
        if self._protection.refreshes:
            plan = self._longer(plan, len(ready), sum(most))
        if self._whole:
            plan = replace(plan, depth=self.num_drafts)
        # A probe that verifies nothing would teach nothing.
        self._budget = max(plan.budget, 1)
        self.depth = plan.depth if plan.depth < self.num_drafts else None
        return [min(limit, plan.depth) for limit in most]

    def _none(self, most: Sequence[int]) -> list[int]:
        """Nothing is drafted in this round."""
        self._budget = 0
        return [0] * len(most)

    def _plan(self, ready: Sequence[ActiveRequest], most_D: IntArray) -> _Foresight:
        """The depth that promises most, whole blocks where others promise hardly more."""
        self._factors_D1 = self._factors(ready)
        earlier_DK = self._earlier(ready)
        requests = len(ready)
        step_ms_DN = {
            depth: self._step_ms(requests, int(np.minimum(most_D, depth).sum()), depth)
            for depth in self._depths
        }
        whole = bool((most_D >= self.num_drafts).all())
        found = survey_depths(earlier_DK, step_ms_DN, None if whole else most_D, MARGIN)
        off_ms = self._times[self._kind].off_ms(requests)
        plans = []
        for depth, (budget, most_per_ms) in found.items():
            per_ms = most_per_ms
            if self.schedule.name == "prefix" and self.verifier != "coupled":
                # Algorithm 1 may stop far below the best budget: what it would do is what counts.
                per_ms = self._first_stop(earlier_DK[:, :depth], step_ms_DN[depth], most_D)
            plans.append(_Foresight(depth, budget, per_ms * off_ms / requests))
        plan = max(plans, key=lambda plan: plan.gain)
        return plan if plan.gain > (1 + MARGIN) * plans[-1].gain else plans[-1]

    @staticmethod
    def _first_stop(earlier_DK: FloatArray, step_ms_N: FloatArray, limits_D: IntArray) -> float:
        """Tokens per millisecond of what Algorithm 1 would verify of these."""
        lengths_D = prefix_lengths(earlier_DK, step_ms_N, limits_D)
        return throughput(earlier_DK, lengths_D, float(step_ms_N[int(lengths_D.sum())]))

    def _longer(self, plan: _Foresight, requests: int, most: int) -> _Foresight:
        """About twice the drafts, to see what these take, unless that is known to be far more."""
        step_ms_N = self._step_ms(requests, most, self.num_drafts)
        budget = min(2 * plan.budget + requests, len(step_ms_N) - 1)
        if step_ms_N[budget] > 2 * step_ms_N[min(plan.budget, len(step_ms_N) - 1)]:
            return plan
        return replace(plan, depth=self.num_drafts, budget=budget)

    def _step_ms(self, requests: int, drafts: int, depth: int) -> FloatArray:
        times = self._times[self._kind]
        return times.verify_ms(requests, drafts) + times.draft_ms(requests, depth)

    def lengths(
        self, requests: Sequence[ActiveRequest], limits: Sequence[int], offer: Offer
    ) -> list[int]:
        """Verification length of each of the D requests that were drafted for.

        Args:
            requests: who takes part in the round, those D first.
            limits: most drafts of each.
            offer: what was drafted.
        """
        wanted = self._lengths(requests[: offer.num_requests], limits, offer)
        if not self._whole:
            return wanted
        # Fixed before the round, as is which rounds these are.
        return [
            min(limit, offer.drawn) if request.request.learn else length
            for request, limit, length in zip(requests, limits, wanted, strict=False)
        ]

    def _lengths(
        self, ready: Sequence[ActiveRequest], limits: Sequence[int], offer: Offer
    ) -> list[int]:
        logits_DK = offer.confidence_logits_DK
        if offer.survival_DK is not None and offer.drawn:
            self._survival_DK = offer.survival_DK
        elif logits_DK is None or not offer.drawn:
            return _as_list(fixed_lengths(len(ready), offer.drawn))
        else:
            confidence_DK = self._confidence(ready, logits_DK, are_margins=offer.are_margins)
            self._survival_DK = survival(confidence_DK)
            if self.schedule.threshold is not None:
                return _as_list(threshold_lengths(confidence_DK, self.schedule.threshold))
        if not self._weighs(len(ready)):
            return _as_list(fixed_lengths(len(ready), offer.drawn))
        limits_D = np.minimum(limits[: len(ready)], offer.drawn)
        return _as_list(self._weighed(ready, self._survival_DK, limits_D))

    def _weighed(
        self, ready: Sequence[ActiveRequest], survival_DK: FloatArray, limits_D: IntArray
    ) -> IntArray:
        assert self._factors_D1 is not None, "limits() has set it"
        survival_DK = survival_DK * self._factors_D1
        if self.schedule.name == "lagged" and self.verifier != "coupled":
            assert self._budget is not None, "limits() has set it"
            return fill_budget(survival_DK, self._budget, limits_D)
        step_ms_N = self._step_ms(len(ready), int(limits_D.sum()), self.depth or self.num_drafts)
        if self.verifier == "coupled":  # and there only may this round's own survivals be searched
            budget = best_budget(survival_DK, step_ms_N, limits_D, MARGIN)
            return fill_budget(survival_DK, budget, limits_D)
        if self.schedule.name == "prefix":
            return prefix_lengths(survival_DK, step_ms_N, limits_D)
        earlier_DK = self._earlier(ready)[:, : survival_DK.shape[1]]
        return lookahead_lengths(survival_DK, earlier_DK, step_ms_N, limits_D, MARGIN)

    def learn(
        self,
        requests: Sequence[ActiveRequest],
        drafts: Drafts,
        accepted: Sequence[int],
        spent: Spent,
    ) -> FloatArray | None:
        """Take note of a finished round, before its tokens are committed.

        Args:
            requests: who took part in it, those that drafted first.
            drafts: what was verified.
            accepted: drafts of each that stayed.
            spent: what it took.

        Returns:
            The survivals that its lengths were decided from, [D, K]; None where there were none.
        """
        survival_DK = self._survival_DK
        if self.schedule.protects:
            self._learn_times(requests, drafts, accepted, spent)
        if not self.schedule.weighs_costs:
            return survival_DK
        if survival_DK is None:  # nothing was drafted
            self._history.fade([request.request_id for request in requests])
            return None
        ready = requests[: len(survival_DK)]
        shared_D = [
            not (r.request.params.has_penalties or r.request.params.logit_bias or r.request.mask)
            for r in ready
        ]
        accepted_D = np.array(accepted[: len(ready)])
        lengths_D = np.array(drafts.lengths[: len(ready)])
        tags = [request.request_id for request in ready]
        self._history.update(tags, survival_DK, accepted_D, lengths_D, shared_D)
        if self._margins_DK is not None:
            whole_D = lengths_D == np.array(drafts.proposed[: len(ready)])
            rows = np.array(shared_D) & (whole_D | (self.verifier != "block"))
            self._logistic.update(
                *observed(self._margins_DK[rows], accepted_D[rows], lengths_D[rows])
            )
        return survival_DK

    def _learn_times(
        self,
        requests: Sequence[ActiveRequest],
        drafts: Drafts,
        accepted: Sequence[int],
        spent: Spent,
    ) -> None:
        ready = [request for request in requests if request.ready]
        verified = sum(drafts.lengths)
        seen = StepTime(
            requests=len(ready),
            drafts=verified,
            prompt_rows=spent.rows - len(ready) - verified,
            drafted=(self.depth or self.num_drafts) if spent.draft_ms > 0 else 0,
            draft_ms=spent.draft_ms + spent.schedule_ms,
            verify_ms=spent.verify_ms,
            tokens=len(ready) + sum(accepted[: len(ready)]),
        )
        self._protection.learn(seen)
        if self._times and self._protection.rest(len(ready)) < OLD:
            self._times[_kind(ready)].learn(seen)

    def recalibrate(self, calibration: Calibration) -> None:
        """Take other temperatures from the next round on; call it between rounds.

        Lengths may depend on them, since they depend on finished rounds alone.
        """
        self._scalings = _scalings(calibration, self._depth_of_blocks)

    def forget(self, request_id: int) -> None:
        """Drop what is known of a request that has ended."""
        self._history.drop(request_id)

    def _weighs(self, num_requests: int) -> bool:
        """Whether costs decide this round; with more requests than were measured, nothing does."""
        return (
            self.schedule.weighs_costs
            and self.costs is not None
            and num_requests > 0
            and self.costs.covers(num_requests)
        )

    def _earlier(self, requests: Sequence[ActiveRequest]) -> FloatArray:
        """What earlier rounds say of this one's survivals, [D, K]."""
        tags = [request.request_id for request in requests]
        assert self._factors_D1 is not None
        return self._history.earlier(tags, self._history.typical) * self._factors_D1

    def _factors(self, requests: Sequence[ActiveRequest]) -> FloatArray:
        return self._history.factors([request.request_id for request in requests])[:, None]

    def _confidence(
        self, requests: Sequence[ActiveRequest], logits_DK: FloatArray, *, are_margins: bool
    ) -> FloatArray:
        if are_margins:
            self._margins_DK = logits_DK
            return confidence(self._logistic.apply(logits_DK))
        return self.confidences(requests, logits_DK)

    def confidences(self, requests: Sequence[ActiveRequest], logits_DK: FloatArray) -> FloatArray:
        """Calibrated confidences of one row of log-odds per request named.

        Args:
            requests: whose; one may be named repeatedly.
            logits_DK: of the drafter's own confidences.
        """
        confidence_DK = confidence(logits_DK)
        rows_of = dict[tuple[Verifier, TemperatureClass], list[int]]()
        for row, request in enumerate(requests):
            rows_of.setdefault(self._entry(request), []).append(row)
        for entry, rows in rows_of.items():
            if entry in self._scalings:
                confidence_DK[rows] = self._scalings[entry].apply(logits_DK[rows])
        return confidence_DK

    def _entry(self, request: ActiveRequest) -> tuple[Verifier, TemperatureClass]:
        """The entry of the calibration that a request takes: its own verifier's if there is one."""
        kind = temperature_class(request.request.params.temperature)
        if request.request.reproducible and ("coupled", kind) in self._scalings:
            return "coupled", kind
        return self.verifier, kind


def _kind(requests: Sequence[ActiveRequest]) -> TemperatureClass:
    """What verifying these requests together costs: `greedy` takes no distribution of any row."""
    temperatures = (request.request.params.temperature for request in requests)
    return temperature_class(max(temperatures, default=0.0))


def _scalings(
    calibration: Calibration | None, num_drafts: int
) -> dict[tuple[Verifier, TemperatureClass], TemperatureScaling]:
    """The calibration's temperatures for each verifier and class that it has an entry of."""
    return {
        (entry.verifier, entry.temperature_class): entry.scaling
        for entry in (calibration.entries if calibration else ())
        if entry.block_size == num_drafts
    }


def _typical(
    calibration: Calibration | None, num_drafts: int, verifier: Verifier
) -> FloatArray | None:
    """Mean survivals of the rounds that the calibration was fitted on, whatever temperature."""
    means = [
        entry.mean_survival
        for entry in (calibration.entries if calibration else ())
        if (entry.block_size, entry.verifier) == (num_drafts, verifier)
    ]
    return np.array(means).mean(axis=0) if means else None


def _as_list(lengths_R: IntArray) -> list[int]:
    return [int(length) for length in lengths_R]
