"""Which schedule decides the verification lengths, and its settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from dspark.errors import UsageError

ScheduleName = Literal["off", "fixed", "threshold", "prefix", "lagged", "lookahead", "auto"]
SCHEDULES: tuple[ScheduleName, ...] = get_args(ScheduleName)


@dataclass(frozen=True)
class Schedule:
    """How many drafts of each request are verified.

    Attributes:
        name: `auto` verifies every draft while rounds show that this is faster than plain decoding;
            `off` drafts nothing, `fixed` verifies every draft, `threshold` the longest prefix
            whose confidences all reach `threshold`; `prefix` (Algorithm 1), `lagged` (a budget
            from earlier rounds) and `lookahead` (that, and this round's first confidences) weigh
            survivals against the cost of a step, and may draft nothing for a while.
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
    def weighs_costs(self) -> bool:
        """Whether it needs a cost table."""
        return self.name in ("prefix", "lagged", "lookahead")

    @property
    def protects(self) -> bool:
        """Whether drafting pauses where finished rounds show that plain decoding is faster."""
        return self.name == "auto" or self.weighs_costs

    @property
    def reads_confidences(self) -> bool:
        """Whether lengths hang on confidences, so that drafting must come up with them."""
        return self.weighs_costs or self.threshold is not None
