"""Protection of plain decoding: what drafting may lose, measured on finished rounds.

Neither calibration nor cost table nor confidences are needed: the time of a drafting round is set
against what plain decoding takes for the tokens that it committed, and the difference goes to an
account. While the account is in the red nothing is drafted, and plain rounds pay a small share of
their time into it until it affords another try; the share halves with every try that fails and
bears out that drafting loses. So drafting loses that share of the time at most, whatever the
drafter does, beside a few rounds at the beginning and what it loses in rounds that read prompts,
which do not count where most rounds read none. Where nothing else decides, chains are no deeper
than the account could pay for if no draft stayed: where rows are dear, one whole block would cost
several times the credit. Only finished rounds count: no output changes its distribution.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from dspark.scheduling.step_times import FADE, OUTLIER, Scales, StepTime

# Everything in plain rounds: what one request may lose at first (R together see R times as much in
# a round, and lose an R-th), what a try may lose after a failure, and what gains are remembered.
FIRST, TRY, MOST = 8.0, 2.0, 16.0
# Of plain rounds' time for tries; halved with each failure in a row, so often at most.
SHARE, HALVINGS = 0.02, 4
# Drafting rounds before a plain one: at least, and for each plain round's time that is gained in
# one, at most. A look that costs nothing may be frequent.
OFTEN, RARE = 4, 512
MEMORY = 0.95
# What evidence of gains remembers, and by how many standard errors its mean must lie below 0 before
# a pause counts as a failure: a drafter that gains a little has bad luck now and then.
EVIDENCE, DOUBT = 0.98, 1.0
# After so many drafting rounds what is known of plain ones is old.
OLD = 16

# Share of a step's deviation from the usual that is taken for the machine's pace; how many steps a
# usual time averages at most.
PACE, USUAL = 0.1, 64
# Of the first steps of a shape the faster one counts: what is done for the first time takes longer.
FEW = 2
# Steps have one shape if their drafts per request differ by less than a quarter.
NEAR = 4


class Pace:
    """How fast the machine is of late, told from target steps of the same shape.

    Clocks and neighbours make a machine faster and slower for all alike, within seconds. Plain and
    drafting rounds are seldom seen side by side, so times are compared at one pace. It follows the
    target's part alone, which the drafter has no hand in.

    Attributes:
        value: milliseconds now for each millisecond at the beginning.
    """

    def __init__(self) -> None:
        self.value = 1.0
        self._usual: dict[tuple[int, int], tuple[int, float]] = {}  # steps, milliseconds

    def even(self, seen: StepTime) -> StepTime:
        """Take note of a finished round.

        Returns:
            The round as it would have been at the beginning's pace. A target's part that took more
            than twice the usual time counts as twice that.
        """
        if not seen.requests or not math.isfinite(seen.total_ms) or not seen.verify_ms > 0:
            return seen
        verify_ms = seen.verify_ms / self.value
        if not seen.prompt_rows:
            shape = seen.requests, NEAR * seen.drafts // seen.requests
            steps, usual_ms = self._usual.get(shape, (0, verify_ms))
            if steps < FEW:
                usual_ms = min(usual_ms, verify_ms)
            else:
                ratio = min(max(verify_ms / usual_ms, 1 / OUTLIER), OUTLIER)
                drift = ratio**PACE
                self.value *= drift
                verify_ms = min(verify_ms, usual_ms * OUTLIER) / drift
                # Geometric means, both: an arithmetic one would rise against the other for ever.
                usual_ms *= (ratio / drift) ** (1 / min(steps + 1, USUAL))
            self._usual[shape] = steps + 1, usual_ms
        return seen._replace(
            draft_ms=seen.draft_ms / self.value,
            verify_ms=verify_ms,
            catch_up_ms=seen.catch_up_ms / self.value,
        )


class Protection:
    """Decides per round whether drafting is affordable.

    Accounts are kept for 1, 2-3, 4-7, ... requests; the first round of each is a plain one.

    Attributes:
        refreshes: whether this is the first drafting round after a plain one that refreshed what
            is known of these: a good moment to look at longer lengths too.
    """

    def __init__(self) -> None:
        self._accounts: dict[int, _Account] = {}
        self.refreshes = False

    def rest(self, requests: int) -> float:
        """Plain rounds of so many requests until the next try; 0 where drafting does not pause."""
        account = self._accounts.get(requests.bit_length())
        if account is None or not account.pauses:
            return 0.0
        return max(TRY - account.credit, 0.0) / account.share

    def pass_plain(self, requests: int, rounds: int) -> None:
        """So many plain rounds have been played in a pause that nobody took the time of."""
        self._account(requests).pass_plain(rounds)

    def allows(self, requests: int, *, tries: bool = True) -> bool:
        """Whether so many requests draft in this round.

        Args:
            requests: how many take part.
            tries: whether a pause may end: all of them can draft, so that it would show something.
        """
        self.refreshes = False
        account = self._account(requests)
        if not account.plain.known:
            return False
        if account.pauses:
            account.pauses = account.credit < TRY or not tries
            return not account.pauses
        if account.credit < 0:
            if account.since_plain < OLD:
                account.pauses = True
                account.failures += account.loses
            else:  # the machine may have become slower for all alike: look before giving up
                account.credit = TRY / 2
            return False
        if account.since_plain >= min(OFTEN + RARE * max(account.gain, 0.0), RARE):
            return False
        self.refreshes, account.fresh = account.fresh, False
        return True

    def depth(self, requests: int) -> int | None:
        """Drafts of each of so many requests that may be lost at once; None for any number.

        Those that the account could pay for, or a single plain round; one draft where nobody knows
        yet what it takes.
        """
        account = self._account(requests)
        if account.draft_cost is None:
            return 1
        if account.draft_cost <= 0:
            return None
        return max(int(max(account.credit, 1.0) / account.draft_cost), 1)

    def usual_gain(self, requests: int) -> float:
        """What drafting rounds of so many requests gain of late, in plain rounds."""
        account = self._accounts.get(requests.bit_length())
        return 0.0 if account is None else account.gain

    def plain_ms(self, requests: int) -> float:
        """Milliseconds of a plain round of so many requests; only where one has been seen."""
        seen = StepTime(requests, 0, 0, 0, 0.0, 0.0, requests)
        return self._account(requests).plain.expected_ms(seen)[0]

    def learn(self, seen: StepTime) -> float | None:
        """Take note of a finished round.

        Returns:
            What a drafting round gained, in plain rounds, but for catching up; None where that is
            not known.
        """
        if not seen.requests:
            return None
        account = self._account(seen.requests)
        if not seen.drafted:
            since = account.since_plain
            account.pass_plain(1)
            if not account.pauses or self.rest(seen.requests) < OLD:  # else it is old by the try
                account.plain.learn(seen, FADE ** (1 + since))
            return None
        account.since_plain += 1
        if not account.tells(seen):
            return None
        plain_ms, prompts_ms = account.plain.expected_ms(seen)
        worth_ms = plain_ms * seen.tokens / seen.requests + prompts_ms
        gain = (worth_ms - seen.total_ms) / plain_ms
        account.learn_cost((seen.total_ms - plain_ms - prompts_ms) / plain_ms, seen)
        account.gain = MEMORY * account.gain + (1 - MEMORY) * gain
        account.learn_gain(gain)
        account.credit = min(account.credit + gain - seen.catch_up_ms / plain_ms, MOST)
        if account.credit >= MOST / 2:
            account.failures = 0
        return gain

    def _account(self, requests: int) -> _Account:
        load = requests.bit_length()
        if load not in self._accounts:
            failing = any(account.pauses for account in self._accounts.values())
            first = max(FIRST / max(requests, 1), TRY)
            self._accounts[load] = _Account(TRY if failing else first)
        return self._accounts[load]


class _PlainTimes:
    """What plain rounds take, by requests and prompt rows, from those of late."""

    def __init__(self) -> None:
        self._parts_ms = (0.0, 0.0, 0.0)  # of a step, of a request and of a prompt row
        self._scales = Scales(3, prior_rounds=0.25)
        self._prompts = False

    @property
    def known(self) -> bool:
        """Whether there was any."""
        return self._parts_ms[0] > 0

    def tells(self, seen: StepTime) -> bool:
        """Whether a plain round like this has been seen: with prompts beside it, if it has any."""
        return self.known and (self._prompts or not seen.prompt_rows)

    def learn(self, seen: StepTime, fade: float) -> None:
        """Take note of a plain round; what was known before weighs `fade`."""
        self._prompts = self._prompts or seen.prompt_rows > 0
        if not self.known:  # half of the first one is taken for its rows'
            row_ms = 0.5 * seen.total_ms / (seen.requests + seen.prompt_rows)
            self._parts_ms = (0.5 * seen.total_ms, row_ms, row_ms)
        self._scales.learn(self._of(seen), seen.total_ms, fade)

    def expected_ms(self, seen: StepTime) -> tuple[float, float]:
        """Milliseconds of a plain round of these requests, and of these prompt rows beside it."""
        return self._scales.expected_ms(self._of(seen), 2)

    def _of(self, seen: StepTime) -> tuple[float, float, float]:
        step, request, row = self._parts_ms
        return step, request * seen.requests, row * seen.prompt_rows


@dataclass
class _Account:
    """What drafting has gained or lost at one load.

    Attributes:
        credit: in plain rounds; drafting pauses below 0.
        gain: of a drafting round, in plain ones, by those of late.
        pauses: whether drafting does.
        failures: pauses in a row after rounds that lost by more than chance.
        since_plain: drafting rounds since the last plain one.
        fresh: whether that one was played to refresh what is known, and nothing was drafted since.
        plain: what plain rounds take.
        draft_cost: what a draft of each request takes, in plain rounds.
        alone: share of drafting rounds of late that no prompt was read in.
        evidence: drafting rounds of late, and sums of their gains and of the squares of these.
    """

    credit: float
    gain: float = 0.0
    pauses: bool = False
    failures: int = 0
    since_plain: int = 0
    fresh: bool = False
    plain: _PlainTimes = field(default_factory=_PlainTimes)
    draft_cost: float | None = None
    evidence: tuple[float, float, float] = (0.0, 0.0, 0.0)
    alone: float = 0.5

    def tells(self, seen: StepTime) -> bool:
        """Whether what a drafting round gained is known.

        What prompts take beside it is an estimate: where most rounds have none, those count alone.
        """
        alone = not seen.prompt_rows
        self.alone += (1 - MEMORY) * (alone - self.alone)
        return self.plain.tells(seen) and (alone or self.alone < 0.5)

    def pass_plain(self, rounds: int) -> None:
        """Plain rounds have been played; in a pause they pay for the next try."""
        for _ in range(rounds if self.pauses else 0):  # to the last bit as one by one
            self.credit += self.share
        self.since_plain, self.fresh = 0, self.since_plain > 0

    def learn_gain(self, gain: float) -> None:
        """Take note of what a drafting round gained."""
        rounds, total, squares = self.evidence
        self.evidence = (
            EVIDENCE * rounds + 1,
            EVIDENCE * total + gain,
            EVIDENCE * squares + gain * gain,
        )

    @property
    def loses(self) -> bool:
        """Whether drafting rounds of late lost by more than chance."""
        rounds, total, squares = self.evidence
        mean = total / rounds
        variance = (max(squares - rounds * mean * mean, 0.0) + 1.0) / rounds
        return mean + DOUBT * math.sqrt(variance / rounds) < 0

    def learn_cost(self, rounds: float, seen: StepTime) -> None:
        """Take note of what a round's drafts took, in plain rounds."""
        cost = rounds * seen.requests / max(seen.drafts, 1)
        known = self.draft_cost
        self.draft_cost = cost if known is None else (known + cost) / 2

    @property
    def share(self) -> float:
        """What a plain round pays in while drafting pauses."""
        return SHARE / float(1 << max(min(self.failures - 1, HALVINGS), 0))
