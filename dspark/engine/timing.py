"""Times of an engine's parts."""

from __future__ import annotations

from dataclasses import dataclass

from dspark.engine.speculation.round_record import RoundTimes


@dataclass
class Clock:
    """Time of an engine's steps, those that read a prompt apart from the rest.

    Attributes:
        prefills: steps that read at least one prompt.
        prefill_ms: milliseconds of all parts of these.
        steps: steps that read none.
        draft_ms, schedule_ms, verify_ms: milliseconds of their parts, summed.
    """

    prefills: int = 0
    prefill_ms: float = 0.0
    steps: int = 0
    draft_ms: float = 0.0
    schedule_ms: float = 0.0
    verify_ms: float = 0.0

    def record(self, times: RoundTimes, *, prefill: bool) -> None:
        """Add one step."""
        if prefill:
            self.prefills += 1
            self.prefill_ms += times.draft_ms + times.schedule_ms + times.verify_ms
            return
        self.steps += 1
        self.draft_ms += times.draft_ms
        self.schedule_ms += times.schedule_ms
        self.verify_ms += times.verify_ms

    def per_step(self) -> RoundTimes:
        """Mean times of the steps that read no prompt."""
        steps = max(self.steps, 1)
        return RoundTimes(self.draft_ms / steps, self.schedule_ms / steps, self.verify_ms / steps)
