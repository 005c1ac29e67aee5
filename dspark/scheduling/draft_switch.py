"""Switch for drafting: on while it gains, with occasional probes while it does not."""

from __future__ import annotations

import math

from dspark.errors import NumericsError, UsageError

# What probes may lose of all time; rounds after drafting stops in which what it promises is asked
# (it changes little without drafts), and rounds between two looks from then on.
PROBE_SHARE, LOOKS, EVERY = 0.005, 1, 32
# The weight of earlier probes in what probes of late lost, and after how many this is known.
PROBES, KNOWN = 0.75, 4
# The share of requests that came or left from which on a round is asked about in any case.
RENEWED = 0.25


class DraftSwitch:
    """Decides per round whether to draft, so that off is never for ever.

    Ask it once a round with what earlier rounds promise. The mean of late promises counts: one
    unlucky round of a single request is no reason to stop. It is the mean of these requests alone:
    as others come, or some leave, it gives way to what is promised now. While drafting does not
    gain, a probe round drafts all the same, to see whether that has changed: at once, after
    `first_pause` rounds, then after twice as many each time, up to `longest_pause`. Once a few
    probes have told what they lost, a pause is no longer than the promised loss takes to be half a
    percent of it. It is never shorter than what probes of late lost (`lost`) takes to be that. The
    spacing knows nothing of this round's tokens or of randomness, so every output stays exact.

    Attributes:
        probes: whether the round decided on last drafts as a probe.
    """

    def __init__(
        self,
        margin: float = 0.005,
        memory: float = 0.7,
        first_pause: int = 8,
        longest_pause: int = 512,
    ) -> None:
        """Start without any round seen.

        Args:
            margin: against noise: drafting is given up only where plain decoding promises more
                than (1 + margin) times as much.
            memory: weight of earlier promises, per round.
            first_pause: rounds without drafts before the second probe.
            longest_pause: bound of the pauses, which double.

        Raises:
            UsageError: a value is out of range.
        """
        if not (margin >= 0 and 0 <= memory < 1):
            raise UsageError(
                f"The margin is {margin} and the memory {memory}, but must be 0 or more, and at "
                "least 0 and less than 1."
            )
        if not 1 <= first_pause <= longest_pause:
            raise UsageError(
                f"Pauses between probes are {first_pause} to {longest_pause} rounds, but must be "
                "positive and rising."
            )
        self._margin, self._memory = margin, memory
        self._first, self._longest = first_pause, longest_pause
        self._gain: float | None = None
        self._probes, self._loss = 0, 0.0  # how many told what they lost; of those of late
        self._pause = self._idle = self._load = 0
        self._renewed = 0.0  # share of the requests that came or left since the last decision
        self.probes = False

    def rests(self, load: int, newcomers: int = 0) -> bool:
        """Whether a round of so many requests drafts nothing in any case, so that none need ask.

        While drafting is off, what it promises changes slowly: it is looked at now and then, or
        when the load changes or a quarter of the requests have not been asked about.

        Args:
            load: requests of the round.
            newcomers: how many of them were not here at the last call.
        """
        changed = max(newcomers, self._load + newcomers - load)  # came or left
        self._renewed = min(self._renewed + changed / max(load, self._load, 1), 1.0)
        known = load == self._load and self._renewed < RENEWED
        off = LOOKS <= self._idle < self._pause and self._idle % EVERY and known
        self._load = load
        self._idle += bool(off)
        return bool(off)

    @property
    def left(self) -> int:
        """How many rounds more will rest for certain, while the same requests run."""
        if not LOOKS <= self._idle < self._pause:
            return 0
        return min(self._pause - self._idle, -self._idle % EVERY)

    @property
    def pause(self) -> int:
        """How many rounds more there are until the next probe; 0 where that is not known yet."""
        return max(self._pause - self._idle, 0) if self._idle >= LOOKS else 0

    def skip(self, rounds: int) -> None:
        """So many rounds have rested unasked, at most `pause`."""
        self._idle += rounds

    def lost(self, rounds: float) -> None:
        """What the last probe lost, in plain rounds; below 0 where it gained.

        Whether a probe's draft stays is luck, so the mean of late ones counts.
        """
        self._probes += 1
        weight = max(1 - PROBES, 1 / self._probes)
        self._loss += weight * (rounds - self._loss)
        self._pause = int(min(max(self._pause, self._loss / PROBE_SHARE), self._longest))

    def decide(self, gain: float) -> bool:
        """Whether this round drafts.

        Args:
            gain: throughput with drafts over throughput without, by earlier rounds.

        Raises:
            NumericsError: the gain is NaN.
        """
        if math.isnan(gain):
            raise NumericsError("The gain of drafting is NaN; check the survivals and costs.")
        old = gain if self._gain is None else self._gain
        memory = self._memory * (1 - self._renewed)
        self._gain, self._renewed = memory * old + (1 - memory) * gain, 0.0
        self.probes = False
        if (1 + self._margin) * self._gain >= 1:
            # What made it worth drafting may pass soon: pauses shrink step by step, too.
            self._pause, self._idle = max(self._first, self._pause // 2), 0
            return True
        if self._idle < self._pause:
            self._idle += 1
            return False
        most = float(self._longest)
        if self._probes >= KNOWN:
            most = min(most, (1 / max(self._gain, PROBE_SHARE) - 1) / PROBE_SHARE)
        self._pause, self._idle = int(max(self._first, min(2 * self._pause, most))), 0
        self.probes = True
        return True
