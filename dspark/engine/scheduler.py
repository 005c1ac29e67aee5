"""The schedule at work: from what earlier rounds taught and this round's confidences to lengths.

Everything that a round's lengths depend on is either known before the round (costs, calibration,
histories, the margin estimator, the budget of `lagged`, whether to draft at all) or a confidence,
which does not see the token it judges. `scheduling` holds the decisions; here is their state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dspark.engine.drafting import Drafts
from dspark.engine.record import FloatArray
from dspark.engine.schedule import Schedule
from dspark.engine.sequence import ActiveRequest
from dspark.errors import UsageError
from dspark.request import Verifier
from dspark.scheduling.calibration import TemperatureScaling, temperature_class
from dspark.scheduling.calibration_file import Calibration
from dspark.scheduling.cost import CostTable
from dspark.scheduling.history import RequestHistory
from dspark.scheduling.online import OnlineLogistic, observed
from dspark.scheduling.prefix import (
    best_budget,
    fill_budget,
    fixed_lengths,
    prefix_lengths,
    threshold_lengths,
    worth_drafting,
)
from dspark.scheduling.survival import confidence, survival
from dspark.scheduling.switch import DraftSwitch

# What a smaller budget, or drafting nothing, must promise more before it is believed: medians of
# step times on an idle machine repeat within 1 or 2 %.
MARGIN = 0.02


@dataclass(frozen=True)
class Offer:
    """What was drafted for the first D requests of a round.

    Attributes:
        num_requests: D.
        drawn: drafts drawn for each.
        confidence_logits_DK: of these, before calibration; None where nobody reads them.
        are_margins: whether they are margins of raw logits in place of log-odds.
    """

    num_requests: int
    drawn: int
    confidence_logits_DK: FloatArray | None = None
    are_margins: bool = False


class Scheduler:
    """Decides how many drafts to make and to verify.

    Args:
        schedule: which, and its settings.
        verifier: of the engine; under `coupled` lengths may depend on anything.
        num_drafts: drafts per round at most, K.
        calibration: of the drafter; where it has no entry, confidences are taken as they are.
        costs: of this machine, for the schedules that weigh them.

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
        self._scalings = _scalings(calibration, num_drafts, verifier)
        self._history = RequestHistory()
        self._switch = DraftSwitch()
        self._logistic = OnlineLogistic()
        self._budget = 0
        self._margins_DK: FloatArray | None = None
        self._survival_DK: FloatArray | None = None

    @property
    def reads_confidences(self) -> bool:
        """Whether lengths hang on confidences."""
        return self.schedule.reads_confidences

    def limits(self, requests: Sequence[ActiveRequest], most: Sequence[int]) -> list[int]:
        """Drafts of each request to ask for, decided from earlier rounds only.

        Args:
            requests: who takes part in the round, those without a context last.
            most: how many drafts of each can be of use.
        """
        self._margins_DK = self._survival_DK = None
        ready = [request for request in requests if request.cached > 0]
        if not self._weighs(len(ready)):
            return list(most)
        assert self.costs is not None
        survival_DK = self._earlier(ready)
        limits_D = list(most[: len(ready)])
        step_ms_N = self.costs.step_ms(len(ready), sum(limits_D))
        off_ms = self.costs.off_ms(len(ready))
        worth = worth_drafting(survival_DK, step_ms_N, off_ms, limits_D, MARGIN)
        if not self._switch.decide(worth):
            return [0] * len(most)
        if self.schedule.name == "lagged" and self.verifier != "coupled":
            self._budget = best_budget(survival_DK, step_ms_N, limits_D, MARGIN)
            # Round after round without a verified draft would teach nothing.
            self._budget = max(self._budget, 1)
        return list(most)

    def lengths(
        self, requests: Sequence[ActiveRequest], limits: Sequence[int], offer: Offer
    ) -> list[int]:
        """Verification length of each of the D requests that were drafted for."""
        ready, logits_DK = requests[: offer.num_requests], offer.confidence_logits_DK
        if logits_DK is None or not offer.drawn:
            return _as_list(fixed_lengths(len(ready), offer.drawn))
        confidence_DK = self._confidence(ready, logits_DK, are_margins=offer.are_margins)
        self._survival_DK = survival(confidence_DK)
        if self.schedule.threshold is not None:
            return _as_list(threshold_lengths(confidence_DK, self.schedule.threshold))
        if not self._weighs(len(ready)):
            return _as_list(fixed_lengths(len(ready), offer.drawn))
        assert self.costs is not None
        limits_D = np.minimum(limits[: len(ready)], offer.drawn)
        survival_DK = self._survival_DK * self._factors(ready)
        step_ms_N = self.costs.step_ms(len(ready), int(limits_D.sum()))
        if self.verifier == "coupled":
            budget = best_budget(survival_DK, step_ms_N, limits_D, MARGIN)
            return _as_list(fill_budget(survival_DK, budget, limits_D))
        if self.schedule.name == "prefix":
            return _as_list(prefix_lengths(survival_DK, step_ms_N, limits_D))
        return _as_list(fill_budget(survival_DK, self._budget, limits_D))

    def learn(
        self, requests: Sequence[ActiveRequest], drafts: Drafts, accepted: Sequence[int]
    ) -> FloatArray | None:
        """Take note of a finished round.

        Returns:
            The survivals that its lengths were decided from, [D, K]; None where there were none.
        """
        survival_DK = self._survival_DK
        if not self.schedule.weighs_costs:
            return survival_DK
        lengths = drafts.lengths
        if survival_DK is None:  # nothing was drafted: what is known of failures fades
            for request in requests:
                self._history.update(request.request_id, (), 0, 0)
            return None
        for row, request in enumerate(requests[: len(survival_DK)]):
            offered_K = survival_DK[row, : drafts.proposed[row]]
            self._history.update(request.request_id, offered_K, accepted[row], lengths[row])
        self._learn_margins(requests, drafts, accepted)
        return survival_DK

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
        tags = [request.request_id for request in requests]
        return self._history.earlier(tags, self.num_drafts) * self._factors(requests)

    def _factors(self, requests: Sequence[ActiveRequest]) -> FloatArray:
        return self._history.factors([request.request_id for request in requests])[:, None]

    def _confidence(
        self, requests: Sequence[ActiveRequest], logits_DK: FloatArray, *, are_margins: bool
    ) -> FloatArray:
        if are_margins:
            self._margins_DK = logits_DK
            return confidence(self._logistic.apply(logits_DK))
        confidence_DK = confidence(logits_DK)
        for name, scaling in self._scalings.items():
            rows = [
                row
                for row, request in enumerate(requests)
                if temperature_class(request.request.params.temperature) == name
            ]
            if rows:
                confidence_DK[rows] = scaling.apply(logits_DK[rows])
        return confidence_DK

    def _learn_margins(
        self, requests: Sequence[ActiveRequest], drafts: Drafts, accepted: Sequence[int]
    ) -> None:
        """Teach the shared estimator, by requests whose laws are the model's own."""
        if self._margins_DK is None:
            return
        rows = [
            row
            for row, request in enumerate(requests[: len(self._margins_DK)])
            if not (request.request.params.has_penalties or request.request.params.logit_bias)
            and (self.verifier != "block" or len(drafts.tokens[row]) == drafts.proposed[row])
        ]
        self._logistic.update(
            *observed(
                self._margins_DK[rows],
                [accepted[row] for row in rows],
                [len(drafts.tokens[row]) for row in rows],
            )
        )


def _scalings(
    calibration: Calibration | None, num_drafts: int, verifier: Verifier
) -> dict[str, TemperatureScaling]:
    """The calibration's temperatures for each temperature class that it has an entry of."""
    return {
        entry.temperature_class: entry.scaling
        for entry in (calibration.entries if calibration else ())
        if (entry.block_size, entry.verifier) == (num_drafts, verifier)
    }


def _as_list(lengths_R: np.ndarray) -> list[int]:
    return [int(length) for length in lengths_R]
