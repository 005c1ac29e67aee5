"""Foresight: what a round promises, by step costs and by the survivals that earlier rounds showed.

Costs are the machine's table, corrected by what finished rounds really took. How deep a round
drafts and how many drafts it verifies in all follow from them before it begins.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import get_args

from dspark.engine.speculation.round_record import FloatArray
from dspark.scheduling.budget import IntArray, survey_depths
from dspark.scheduling.calibration import TemperatureClass
from dspark.scheduling.cost_table import CostTable
from dspark.scheduling.step_times import StepTime, StepTimes

# What a smaller budget, or drafting nothing, must promise more before it is believed: the larger,
# the closer to fixed blocks, the smaller, the more noise of a table may lose (docs/scheduling.md).
MARGIN = 0.005
# Depths of a block that are weighed against the whole one.
_SHALLOW = (1, 2, 4)


@dataclass(frozen=True)
class Plan:
    """What a round is to do.

    Attributes:
        depth: drafts of each request.
        budget: how many of all of them are worth verifying.
        gain: throughput over that of drafting nothing.
    """

    depth: int
    budget: int
    gain: float


class Foresight:
    """Plans of rounds.

    Args:
        costs: of this machine.
        num_drafts: K; of trees, their nodes.
        chains: whether blocks may be cut to a depth; trees may not.
        stops: whether lengths will be those of Algorithm 1, which may stop far below the best
            budget: what it would do is then what counts.

    Attributes:
        kind: what verifying the requests of this round together costs: `greedy` takes no
            distribution of any row.
    """

    def __init__(self, costs: CostTable, num_drafts: int, *, chains: bool, stops: bool) -> None:
        self._num_drafts, self._stops = num_drafts, stops
        self._times = {name: StepTimes(costs, num_drafts) for name in get_args(TemperatureClass)}
        shallow = _SHALLOW if chains else ()
        self._depths = sorted({min(depth, num_drafts) for depth in (*shallow, num_drafts)})
        self.kind: TemperatureClass = "greedy"

    def times(self, kind: TemperatureClass) -> StepTimes:
        """Corrected costs of rounds of this kind."""
        return self._times[kind]

    def plan(self, earlier_DK: FloatArray, most_D: IntArray) -> Plan:
        """The depth that promises most, whole blocks where others promise hardly more.

        Args:
            earlier_DK: survivals that earlier rounds showed of the D requests that draft.
            most_D: drafts of each that can be of use.
        """
        requests, times = len(most_D), self._times[self.kind]
        verify_ms_N = times.verify_ms(requests, int(most_D.sum()))
        draft_ms = {depth: times.draft_ms(requests, depth) for depth in self._depths}
        whole = bool((most_D >= self._num_drafts).all())
        limits_D = None if whole else most_D
        found = survey_depths(
            earlier_DK, verify_ms_N, draft_ms, limits_D, MARGIN, stops=self._stops
        )
        off_ms = times.off_ms(requests)
        plans = [
            Plan(depth, budget, per_ms * off_ms / requests)
            for depth, (budget, per_ms) in found.items()
        ]
        plan = max(plans, key=lambda plan: plan.gain)
        return plan if plan.gain > (1 + MARGIN) * plans[-1].gain else plans[-1]

    def probe(self, plan: Plan, requests: int) -> Plan:
        """One draft each: as cheap a look as teaches anything of costs and of drafts."""
        return replace(plan, depth=self._depths[0], budget=requests)

    def longer(self, plan: Plan, requests: int, most: int) -> Plan:
        """About twice the drafts, to see what these take, unless that is known to be far more."""
        step_ms_N = self.step_ms(requests, most, self._num_drafts)
        budget = min(2 * plan.budget + requests, len(step_ms_N) - 1)
        if step_ms_N[budget] > 2 * step_ms_N[min(plan.budget, len(step_ms_N) - 1)]:
            return plan
        return replace(plan, depth=self._num_drafts, budget=budget)

    def step_ms(self, requests: int, drafts: int, depth: int) -> FloatArray:
        """Milliseconds of steps that draft so deep and verify 0, 1, ... drafts in all."""
        times = self._times[self.kind]
        return times.verify_ms(requests, drafts) + times.draft_ms(requests, depth)

    def learn(self, kind: TemperatureClass, seen: StepTime) -> None:
        """Take note of what a finished round took."""
        self._times[kind].learn(seen)
