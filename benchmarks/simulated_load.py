"""Simulated load: recorded confidences and outcomes under a cost table, one schedule at a time.

All schedules see the same record, made once per load: calibrated confidences of requests that
come and go, and what would be accepted. Throughput counts expected tokens (calibrated survivals
of what was verified) per millisecond of the table, so that schedules differ by their decisions
and not by luck; the oracle, which knows outcomes, counts those.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from dspark.scheduling.cost import CostPoint, CostTable
from dspark.scheduling.history import RequestHistory
from dspark.scheduling.lookahead import lookahead_lengths
from dspark.scheduling.machine import MachineKey
from dspark.scheduling.prefix import (
    best_budget,
    drafting_gain,
    fill_budget,
    fixed_lengths,
    prefix_lengths,
    worth_drafting,
)
from dspark.scheduling.survival import confidence, survival
from dspark.scheduling.switch import DraftSwitch

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
SIMULATED = MachineKey("simulated", 1, "float32", "simulated", "simulated")
FAILING = 0.3
LAG = 2  # rounds until what a round showed is used, as where scheduling overlaps the step


@dataclass(frozen=True)
class Traffic:
    """What drafters are offered: how easy texts are, and how that changes.

    Attributes:
        ease: mean logit of a confidence.
        between: its standard deviation between requests.
        within: its standard deviation between rounds of a request.
        persistence: correlation of one round with the next.
        sharpness: of the Beta law of confidences around their mean; more is narrower.
        life: mean rounds of a request.
        failing: share of requests of whose drafts, whatever their confidences claim, each stays
            only 0.3 times as often.
    """

    ease: float = 1.3
    between: float = 0.8
    within: float = 0.7
    persistence: float = 0.8
    sharpness: float = 5.0
    life: float = 60.0
    failing: float = 0.0


TRAFFIC = {
    "mixed": Traffic(),
    "easy": Traffic(ease=2.5),
    "hard": Traffic(ease=-0.3),
}


@dataclass(frozen=True)
class Record:
    """Rounds of a load.

    Attributes:
        survival_TRK: calibrated survivals.
        claimed_TRK: survivals as the drafter claims them: the same where nobody fails.
        accepted_TR: how many drafts would stay if all were verified.
        generation_TR: which request of its slot runs.
    """

    survival_TRK: FloatArray
    claimed_TRK: FloatArray
    accepted_TR: IntArray
    generation_TR: IntArray


def record_of(traffic: Traffic, requests: int, drafts: int, rounds: int, seed: int) -> Record:
    """Draw a record."""
    generator = np.random.default_rng((seed, requests, drafts))
    slope_K = -0.08 * np.arange(drafts)
    ease_R = generator.normal(traffic.ease, traffic.between, requests)
    swing_R = generator.normal(0, traffic.within, requests)
    generation_R = np.zeros(requests, dtype=np.int64)
    honesty_R = np.where(generator.random(requests) < traffic.failing, FAILING, 1.0)
    survivals, claimed, accepted, generations = [], [], [], []
    for _ in range(rounds):
        new_R = generator.random(requests) < 1 / traffic.life
        generation_R = generation_R + new_R
        ease_R = np.where(new_R, generator.normal(traffic.ease, traffic.between, requests), ease_R)
        if traffic.failing:
            fails_R = generator.random(requests) < traffic.failing
            honesty_R = np.where(new_R, np.where(fails_R, FAILING, 1.0), honesty_R)
        noise_R = generator.normal(0, traffic.within, requests)
        swing_R = traffic.persistence * swing_R + np.sqrt(1 - traffic.persistence**2) * noise_R
        mean_RK = confidence((ease_R + swing_R)[:, None] + slope_K)
        confidence_RK = generator.beta(
            traffic.sharpness * mean_RK, traffic.sharpness * (1 - mean_RK)
        )
        true_RK = confidence_RK * honesty_R[:, None]
        stays_RK = generator.random((requests, drafts)) < true_RK
        survivals.append(survival(true_RK))
        claimed.append(survival(confidence_RK))
        accepted.append(np.logical_and.accumulate(stays_RK, axis=1).sum(axis=1))
        generations.append(generation_R)
    return Record(*map(np.array, (survivals, claimed, accepted, generations)))


def expected_survival_of(traffic: Traffic, drafts: int, seed: int) -> FloatArray:
    """Mean survivals [K] of other requests of this traffic, as calibration has them."""
    mean_K: FloatArray = record_of(traffic, 64, drafts, 100, seed).survival_TRK.mean(axis=(0, 1))
    return mean_K


def table_of(
    verify_ms: Callable[[int], float],
    draft_ms: Callable[[int], float],
    *,
    drafts: int = 7,
    probes: tuple[int, ...] = (),
) -> CostTable:
    """A table of costs by tokens, probed for 1, 2, 4, ... 256 requests."""
    points = []
    for requests in 2 ** np.arange(9):
        most = int(requests) * (1 + drafts)
        spaced = np.unique(np.linspace(requests, most, 15).round().astype(int))
        tokens = {*map(int, spaced), *(t for t in probes if requests <= t <= most)}
        points += [
            CostPoint(t, int(requests), verify_ms(t), draft_ms(int(requests))) for t in tokens
        ]
    return CostTable(tuple(points), SIMULATED)


def noisy(table: CostTable, spread: float, seed: int) -> CostTable:
    """The table as a measurement would find it whose medians scatter so much."""
    generator = np.random.default_rng(seed)

    def measured(ms: float) -> float:
        return ms * float(np.exp(spread * generator.normal()))

    points = [
        replace(p, verify_ms=measured(p.verify_ms), draft_ms=measured(p.draft_ms))
        for p in table.points
    ]
    return CostTable(tuple(points), table.machine)


STAIRS = (8, 16, 32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)


def _stair_ms(tokens: int) -> float:
    tier = next(edge for edge in STAIRS if tokens <= edge)
    return 20 * float(np.hypot(1, tier / 160))


def tables() -> dict[str, CostTable]:
    """A smooth, a staircase and a flat table: milliseconds like a mid-sized target's."""

    def draft_ms(requests: int) -> float:
        return 2 + 0.01 * requests

    around = tuple(t for edge in STAIRS for t in (edge, edge + 1))
    return {
        "smooth": table_of(lambda t: 20 * float(np.hypot(1, t / 160)), draft_ms),
        "staircase": table_of(_stair_ms, draft_ms, probes=around),
        "flat": table_of(lambda t: 20 + t / 2000, draft_ms),
    }


@dataclass(frozen=True)
class Round:
    """What a policy may look at; `survival_RK` holds this round's own survivals."""

    survival_RK: FloatArray
    earlier_RK: FloatArray
    step_ms_N: FloatArray
    margin: float


Policy = Callable[[Round], IntArray]


def lagged(now: Round) -> IntArray:
    """Budget of earlier rounds, filled by top survival."""
    budget = best_budget(now.earlier_RK, now.step_ms_N, margin=now.margin)
    return fill_budget(now.survival_RK, budget)


def prefix(now: Round) -> IntArray:
    """Algorithm 1."""
    return prefix_lengths(now.survival_RK, now.step_ms_N)


def lookahead(now: Round) -> IntArray:
    """Algorithm 1 that walks on where what it expects is worth it."""
    return lookahead_lengths(now.survival_RK, now.earlier_RK, now.step_ms_N, margin=now.margin)


POLICIES: dict[str, Policy] = {"prefix": prefix, "lagged": lagged, "lookahead": lookahead}


@dataclass
class Tally:
    """Tokens and milliseconds so far."""

    tokens: float = 0.0
    ms: float = 0.0
    drafted_rounds: int = 0

    def add(self, tokens: float, ms: float, *, drafted: bool) -> None:
        """Count a round."""
        self.tokens += tokens
        self.ms += ms
        self.drafted_rounds += drafted

    @property
    def throughput(self) -> float:
        """Tokens per millisecond."""
        return self.tokens / self.ms


@dataclass
class Simulation:
    """One record under one table.

    Attributes:
        record: what is drafted.
        table: what it costs.
        expected_K: mean survivals of other rounds of such traffic, as calibration has them.
        margin: against noise, of budget and switch.
        believed: what schedules take for the table, where its measurement was noisy.
    """

    record: Record
    table: CostTable
    expected_K: FloatArray
    margin: float = 0.005
    believed: CostTable | None = None
    step_ms_N: FloatArray = field(init=False)
    off_ms: float = field(init=False)

    def __post_init__(self) -> None:
        _, requests, drafts = self.record.survival_TRK.shape
        self.step_ms_N = self.table.step_ms(requests, requests * drafts)
        self.off_ms = self.table.off_ms(requests)

    def scheduled(self, policy: Policy, *, heeds_failures: bool = True) -> Tally:
        """A schedule that learns from earlier rounds only, drafting while that is worth it."""
        _, requests, drafts = self.record.survival_TRK.shape
        believed = self.believed or self.table
        step_ms_N = believed.step_ms(requests, requests * drafts)
        off_ms = believed.off_ms(requests)
        history = RequestHistory(drafts, typical_K=self.expected_K)
        switch = DraftSwitch(self.margin)
        lengths_TR: list[IntArray | None] = []  # None where a round did not draft
        tally = Tally()
        for t, survival_RK in enumerate(self.record.survival_TRK):
            if t >= LAG:
                self._learn(history, t - LAG, lengths_TR[t - LAG])
            tags = self._tags(t)
            factors_R1 = np.ones((requests, 1))
            if heeds_failures:
                factors_R1 = history.factors(tags)[:, None]
            earlier_RK = history.earlier(tags, history.typical) * factors_R1
            claimed_RK = self.record.claimed_TRK[t] * factors_R1
            now = Round(claimed_RK, earlier_RK, step_ms_N, self.margin)
            # Algorithm 1 may stop far below the best budget: judge what it would do.
            before = replace(now, survival_RK=earlier_RK)
            budget = int(prefix(before).sum()) if policy is prefix else None
            gain = drafting_gain(earlier_RK, step_ms_N, off_ms, budget=budget)
            if switch.decide(gain):
                lengths_R = policy(now)
                self._count(tally, survival_RK, lengths_R)
                lengths_TR.append(lengths_R)
            else:
                tally.add(requests, self.off_ms, drafted=False)
                lengths_TR.append(None)
        return tally

    def _learn(self, history: RequestHistory, t: int, lengths_R: IntArray | None) -> None:
        tags = self._tags(t)
        for slot, generation in tags:
            history.drop((slot, generation - 1))
        if lengths_R is None:
            history.fade(tags)
        else:
            accepted_R = np.minimum(self.record.accepted_TR[t], lengths_R)
            history.update(tags, self.record.claimed_TRK[t], accepted_R, lengths_R)

    def _tags(self, t: int) -> list[tuple[int, int]]:
        return list(enumerate(self.record.generation_TR[t].tolist()))

    def off(self) -> Tally:
        """Plain decoding."""
        rounds, requests, _ = self.record.survival_TRK.shape
        return Tally(rounds * requests, rounds * self.off_ms)

    def fixed(self) -> Tally:
        """Every draft verified, as far as the table goes."""
        _, requests, drafts = self.record.survival_TRK.shape
        tally = Tally()
        for survival_RK in self.record.survival_TRK:
            self._count(tally, survival_RK, fixed_lengths(requests, drafts))
        return tally

    def hindsight(self) -> Tally:
        """The best budget of every round on its own survivals, or none; not a lossless schedule."""
        tally = Tally()
        for survival_RK in self.record.survival_TRK:
            self._best(tally, survival_RK)
        return tally

    def oracle(self) -> Tally:
        """The best budget of every round by what will be accepted; reported only."""
        tally = Tally()
        drafts = self.record.survival_TRK.shape[2]
        for accepted_R in self.record.accepted_TR:
            self._best(tally, (np.arange(drafts) < accepted_R[:, None]).astype(np.float64))
        return tally

    def _best(self, tally: Tally, survival_RK: FloatArray) -> None:
        if worth_drafting(survival_RK, self.step_ms_N, self.off_ms):
            lengths_R = fill_budget(survival_RK, best_budget(survival_RK, self.step_ms_N))
            self._count(tally, survival_RK, lengths_R)
        else:
            tally.add(len(survival_RK), self.off_ms, drafted=False)

    def _count(self, tally: Tally, survival_RK: FloatArray, lengths_R: IntArray) -> None:
        verified_RK = np.arange(survival_RK.shape[1]) < lengths_R[:, None]
        gained = len(survival_RK) + float(survival_RK[verified_RK].sum())
        tally.add(gained, float(self.step_ms_N[lengths_R.sum()]), drafted=True)
