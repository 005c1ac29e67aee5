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

from dspark.scheduling.budget import (
    best_budget,
    drafting_gain,
    fill_budget,
    fixed_lengths,
    prefix_lengths,
    worth_drafting,
)
from dspark.scheduling.cost_table import CostTable
from dspark.scheduling.draft_switch import DraftSwitch
from dspark.scheduling.history import RequestHistory
from dspark.scheduling.lookahead import lookahead_lengths
from dspark.simulation.traffic import FloatArray, IntArray, Record

LAG = 2  # rounds until what a round showed is used, as where scheduling overlaps the step


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
