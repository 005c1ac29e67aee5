"""Whether to draft at all: on while it is worth its cost, with a probe now and then while not."""

from __future__ import annotations

from dspark.errors import UsageError


class DraftSwitch:
    """Decides per round whether to draft, so that off is never for ever.

    Ask it once a round with what earlier rounds say (`prefix.worth_drafting`). While drafting is
    not worth it, a probe round drafts all the same, to see whether that has changed: after 16
    rounds first, and after twice as many each time, up to 256. The spacing knows nothing of
    tokens or of randomness, so every output stays exact.
    """

    def __init__(self, first_pause: int = 16, longest_pause: int = 256) -> None:
        """Start on.

        Args:
            first_pause: rounds without drafts before the first probe.
            longest_pause: bound of the pauses, which double.

        Raises:
            UsageError: a pause is not positive, or the first is longer than the longest.
        """
        if not 1 <= first_pause <= longest_pause:
            raise UsageError(
                f"Pauses between probes are {first_pause} to {longest_pause} rounds, but must be "
                "positive and rising."
            )
        self._first, self._longest = first_pause, longest_pause
        self._pause, self._idle = first_pause, 0

    def decide(self, worth: bool) -> bool:
        """Whether this round drafts.

        Args:
            worth: what earlier rounds say.
        """
        if worth:
            # What made it worth drafting may last a round only: pauses shrink one by one.
            self._pause, self._idle = max(self._first, self._pause // 2), 0
            return True
        if self._idle < self._pause:
            self._idle += 1
            return False
        self._pause, self._idle = min(2 * self._pause, self._longest), 0
        return True
