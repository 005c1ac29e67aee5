"""The schedule at work: from what earlier rounds taught and this round's confidences to lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dspark.engine.drafting import Drafts
from dspark.engine.record import FloatArray
from dspark.engine.schedule import Schedule
from dspark.engine.sequence import ActiveRequest
from dspark.scheduling.prefix import fixed_lengths, threshold_lengths
from dspark.scheduling.survival import confidence


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
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    @property
    def reads_confidences(self) -> bool:
        """Whether lengths hang on confidences."""
        return self.schedule.threshold is not None

    def limits(self, requests: Sequence[ActiveRequest], most: Sequence[int]) -> list[int]:
        """Drafts of each request to ask for, decided from earlier rounds only.

        Args:
            requests: who takes part in the round.
            most: how many drafts of each can be of use.
        """
        del requests
        return list(most)

    def lengths(
        self, requests: Sequence[ActiveRequest], limits: Sequence[int], offer: Offer
    ) -> list[int]:
        """Verification length of each of the D requests that were drafted for."""
        del requests, limits
        logits_DK = offer.confidence_logits_DK
        if self.schedule.threshold is None or logits_DK is None:
            return fixed_lengths(offer.num_requests, offer.drawn).tolist()
        return threshold_lengths(confidence(logits_DK), self.schedule.threshold).tolist()

    def learn(
        self, requests: Sequence[ActiveRequest], drafts: Drafts, accepted: Sequence[int]
    ) -> FloatArray | None:
        """Take note of a finished round; the survivals that its lengths were decided from."""
        del requests, drafts, accepted
        return None
