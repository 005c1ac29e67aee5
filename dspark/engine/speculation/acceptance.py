"""Acceptance estimates: how likely drafts stay, by this round's confidences and by past rounds.

A confidence does not see the token that it judges, and everything else here (temperatures of the
calibration, the estimator of margins, histories of requests) is of finished rounds, so that lengths
decided from it keep every output exact (docs/losslessness.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dspark.engine.requests.sequence import ActiveRequest
from dspark.engine.speculation.draft import Drafts
from dspark.engine.speculation.round_record import FloatArray
from dspark.request import Verifier
from dspark.scheduling.calibration import TemperatureClass, TemperatureScaling, temperature_class
from dspark.scheduling.calibration_file import Calibration
from dspark.scheduling.history import RequestHistory
from dspark.scheduling.online import OnlineLogistic, observed
from dspark.scheduling.survival import confidence, survival


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


class Acceptance:
    """Estimates of survivals, and what they are made from.

    Args:
        verifier: of the engine.
        num_drafts: K; of trees, their nodes.
        calibration: of the drafter; where it has no entry, confidences are taken as they are.
        tree_depth: of trees; None for chains.

    Attributes:
        child_rates: of second and further children of trees, as calibrated; empty where they are
            not.
        survival_DK: of this round's drafts, before factors of requests; None where unknown.
        history: of requests.
        logistic: makes chances of margins.
    """

    def __init__(
        self,
        verifier: Verifier,
        num_drafts: int,
        calibration: Calibration | None,
        tree_depth: int | None,
    ) -> None:
        self._verifier = verifier
        self._depth = tree_depth or num_drafts
        self.recalibrate(calibration)
        self.child_rates = _child_rates(calibration, self._depth)
        typical_K = None if tree_depth else _typical(calibration, num_drafts, verifier)
        self.history = RequestHistory(max(num_drafts, 1), typical_K=typical_K)
        self.logistic = OnlineLogistic()
        self.survival_DK: FloatArray | None = None
        self._margins_DK: FloatArray | None = None
        self._factors_D1: FloatArray | None = None
        self._undrafted = 0  # rounds without drafts that histories do not know of yet

    def recalibrate(self, calibration: Calibration | None) -> None:
        """Take the temperatures of a calibration from now on."""
        self._scalings = _scalings(calibration, self._depth)

    def begin(self) -> None:
        """A round begins, of which nothing is known."""
        self._margins_DK = self.survival_DK = self._factors_D1 = None

    def earlier(self, requests: Sequence[ActiveRequest]) -> FloatArray:
        """What earlier rounds say of this one's survivals, [D, K]."""
        tags = self._tags(requests)
        return self.history.earlier(tags, self.history.typical) * self._factors(requests)

    def _factors(self, requests: Sequence[ActiveRequest]) -> FloatArray:
        """What survivals of failing requests are lowered by, [D, 1]: the same all round."""
        if self._factors_D1 is None:
            tags = self._tags(requests)
            self._factors_D1 = self.history.factors(tags)[:, None]
        return self._factors_D1

    def see(self, requests: Sequence[ActiveRequest], offer: Offer) -> FloatArray | None:
        """Take in this round's drafts.

        Returns:
            Confidences of the chains, [D, K]; None where there are none.
        """
        if offer.survival_DK is not None and offer.drawn:
            self.survival_DK = offer.survival_DK
        elif offer.confidence_logits_DK is not None and offer.drawn:
            logits_DK = offer.confidence_logits_DK
            if offer.are_margins:
                self._margins_DK = logits_DK
                confidence_DK = confidence(self.logistic.apply(logits_DK))
            else:
                confidence_DK = self.confidences(requests, logits_DK)
            self.survival_DK = survival(confidence_DK)
            return confidence_DK
        return None

    def weighed(self, requests: Sequence[ActiveRequest]) -> FloatArray:
        """This round's survivals, those of failing requests lowered, [D, K]; after `see`."""
        assert self.survival_DK is not None
        return self.survival_DK * self._factors(requests)

    def confidences(self, requests: Sequence[ActiveRequest], logits_DK: FloatArray) -> FloatArray:
        """Calibrated confidences of one row of log-odds per request named.

        Args:
            requests: whose; one may be named repeatedly.
            logits_DK: of the drafter's own confidences.
        """
        rows_of = dict[TemperatureScaling | None, list[int]]()
        for row, request in enumerate(requests):
            rows_of.setdefault(self._scalings.get(self._entry(request)), []).append(row)
        if len(rows_of) == 1:
            return _confidence(logits_DK, *rows_of)
        confidence_DK = np.empty(logits_DK.shape)
        for scaling, rows in rows_of.items():
            confidence_DK[rows] = _confidence(logits_DK[rows], scaling)
        return confidence_DK

    def learn(
        self, requests: Sequence[ActiveRequest], drafts: Drafts, accepted: Sequence[int]
    ) -> None:
        """Take note of a finished round: which drafts stayed of those that were verified."""
        if self.survival_DK is None:
            self.pass_undrafted(1)
            return
        ready = requests[: len(self.survival_DK)]
        shared_D = [
            not (r.request.params.has_penalties or r.request.params.logit_bias or r.request.mask)
            for r in ready
        ]
        accepted_D = np.array(accepted[: len(ready)])
        lengths_D = np.array(drafts.lengths[: len(ready)])
        self.history.update(self._tags(ready), self.survival_DK, accepted_D, lengths_D, shared_D)
        if self._margins_DK is not None:
            whole_D = lengths_D == np.array(drafts.proposed[: len(ready)])
            rows = np.array(shared_D) & (whole_D | (self._verifier != "block"))
            self.logistic.update(
                *observed(self._margins_DK[rows], accepted_D[rows], lengths_D[rows])
            )

    def pass_undrafted(self, rounds: int) -> None:
        """Take note of rounds in which nothing was drafted."""
        self._undrafted += rounds

    def _tags(self, requests: Sequence[ActiveRequest]) -> list[int]:
        """Names of requests in their history, which has faded over the rounds without drafts."""
        tags = [request.request_id for request in requests]
        if self._undrafted:
            self.history.fade(tags, self._undrafted)
            self._undrafted = 0
        return tags

    def _entry(self, request: ActiveRequest) -> tuple[Verifier, TemperatureClass]:
        """The entry of the calibration that a request takes: its own verifier's if there is one."""
        kind = temperature_class(request.request.params.temperature)
        if request.request.reproducible and ("coupled", kind) in self._scalings:
            return "coupled", kind
        return self._verifier, kind


def _confidence(logits_DK: FloatArray, scaling: TemperatureScaling | None) -> FloatArray:
    return confidence(logits_DK) if scaling is None else scaling.apply(logits_DK)


def _scalings(
    calibration: Calibration | None, num_drafts: int
) -> dict[tuple[Verifier, TemperatureClass], TemperatureScaling]:
    """The calibration's temperatures for each verifier and class that it has an entry of."""
    return {
        (entry.verifier, entry.temperature_class): entry.scaling
        for entry in (calibration.entries if calibration else ())
        if entry.block_size == num_drafts
    }


def _child_rates(calibration: Calibration | None, num_drafts: int) -> tuple[float, ...]:
    """Those that some entry has: the verifiers that look at them judge trees alike."""
    entries = calibration.entries if calibration else ()
    found = (entry.child_rates for entry in entries if entry.block_size == num_drafts)
    return next(filter(None, found), ())


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
