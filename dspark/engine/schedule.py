"""Which schedule decides the verification lengths, and its settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from dspark.drafters.base import Proposal
from dspark.errors import UsageError
from dspark.scheduling.prefix import fixed_lengths, threshold_lengths
from dspark.scheduling.survival import confidence

ScheduleName = Literal["off", "fixed", "threshold"]
SCHEDULES: tuple[ScheduleName, ...] = get_args(ScheduleName)


@dataclass(frozen=True)
class Schedule:
    """How many drafts of each request are verified.

    Attributes:
        name: `off` drafts nothing, `fixed` verifies every draft, `threshold` the longest prefix
            whose confidences all reach `threshold`.
        threshold: for `threshold`, between 0 and 1.

    Raises:
        UsageError: the name is unknown, or the threshold is missing, out of range or unused.
    """

    name: ScheduleName = "fixed"
    threshold: float | None = None

    def __post_init__(self) -> None:
        if self.name not in SCHEDULES:
            raise UsageError(
                f"The schedule is {self.name!r}, but must be one of {', '.join(SCHEDULES)}."
            )
        if (self.name == "threshold") != (self.threshold is not None):
            raise UsageError("Give a threshold with the schedule 'threshold', and only with it.")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise UsageError(f"The threshold is {self.threshold}, but must be between 0 and 1.")

    @property
    def reads_confidences(self) -> bool:
        """Whether lengths hang on confidences, so that drafting must come up with them."""
        return self.threshold is not None

    def lengths(self, proposal: Proposal, num_requests: int, num_drafts: int) -> list[int]:
        """Verification length of each request, before limits of its own."""
        if self.threshold is None:
            return list(map(int, fixed_lengths(num_requests, num_drafts)))
        assert proposal.confidence_logits_RK is not None  # `drafting.propose` sees to it
        confidence_RK = confidence(proposal.confidence_logits_RK.double().cpu().numpy())
        return list(map(int, threshold_lengths(confidence_RK, self.threshold)))
