"""Draft scheduler: verification lengths from past rounds and this round's confidences.

Everything that a round's lengths depend on is either known before the round (costs, calibration,
histories, the margin estimator, the budget of `lagged`, whether to draft at all) or a confidence,
which does not see the token it judges. `scheduling` holds the decisions; here is their state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from dspark.engine.requests.sequence import ActiveRequest
from dspark.engine.speculation.acceptance import Acceptance, Offer
from dspark.engine.speculation.draft import Drafts
from dspark.engine.speculation.foresight import MARGIN, Foresight, Plan
from dspark.engine.speculation.round_record import FloatArray, Spent
from dspark.engine.speculation.schedule import Schedule
from dspark.errors import UsageError
from dspark.request import Verifier
from dspark.scheduling.budget import (
    IntArray,
    best_budget,
    fill_budget,
    fixed_lengths,
    prefix_lengths,
    threshold_lengths,
)
from dspark.scheduling.calibration import TemperatureClass, temperature_class
from dspark.scheduling.calibration_file import Calibration
from dspark.scheduling.cost_table import CostTable
from dspark.scheduling.draft_switch import PROBE_SHARE, DraftSwitch
from dspark.scheduling.lookahead import lookahead_lengths
from dspark.scheduling.protection import OLD, RARE, Pace, Protection
from dspark.scheduling.step_times import StepTime

# Rounds between two plans where whole blocks are best, and weight of a round in what is kept of
# promises.
EVERY, KEPT = 4, 0.03
# Rounds between two that are asked about and learned from while nothing is drafted.
QUIET = 16
# Rounds before its end from which on a request alone may be decoded plainly for what drafting
# promises: others may join it, and beside a plain request no pause of protection ends.
LAST = 128
# After so many drafting rounds of a kind and load, one in EVERY corrects costs.
_OFTEN = 64
# Of so many rounds in which drafts may be learned from, one verifies all of these.
_WHOLE_EVERY = 16


class Scheduler:
    """Decides how many drafts to make and to verify.

    Args:
        schedule: which, and its settings.
        verifier: of the engine, for requests that are not `reproducible`; under `coupled` lengths
            may depend on anything.
        num_drafts: drafts per round at most, K; of trees, their nodes.
        calibration: of the drafter; where it has no entry, confidences are taken as they are.
        costs: of this machine, for the schedules that weigh them.
        tree_depth: of trees, how deep they are at most; None for chains.

    Attributes:
        depth: how many drafts this round's blocks are made for, where earlier rounds say that more
            are not worth their rows; None for all.
        learns: whether somebody learns from rounds: some are then verified whole.

    Raises:
        UsageError: the schedule weighs costs, and there is no cost table.
    """

    def __init__(
        self,
        schedule: Schedule,
        verifier: Verifier = "block",
        num_drafts: int = 0,
        calibration: Calibration | None = None,
        costs: CostTable | None = None,
        tree_depth: int | None = None,
    ) -> None:
        if schedule.weighs_costs and costs is None:
            raise UsageError(
                f"The schedule '{schedule.name}' needs a cost table of this machine; measure one "
                "with dspark profile, or use the schedule 'fixed'."
            )
        self.schedule = schedule
        self.verifier = verifier
        self.num_drafts = num_drafts
        self.costs = costs
        self._foresight: Foresight | None = None
        if costs is not None:
            stops = schedule.name == "prefix" and verifier != "coupled"
            self._foresight = Foresight(costs, num_drafts, chains=not tree_depth, stops=stops)
        self._pace, self._protection = Pace(), Protection()
        self._calibration = calibration
        self.acceptance = Acceptance(verifier, num_drafts, calibration, tree_depth)
        self.learns = self._shows = False
        self._learnable = 0
        self._switch = DraftSwitch(MARGIN)
        self._drafted = False  # whether anything ever was
        self._ordinary = dict[tuple[TemperatureClass, int], int]()  # rounds, by kind and load
        self._known = set[int]()  # requests that were asked about, or rested
        self._lone: int | None = None  # the request that was asked about alone since it came
        self.depth: int | None = None
        self.of_trees = tree_depth is not None
        self._of_trees: Scheduler | None = None  # beside this one
        self._budget: int | None = None
        self._round = self._next_look = 0
        self._coasts = False  # whether this round verifies whole blocks, without a new plan
        self._may_coast = schedule.name == "lagged" and tree_depth is None
        self._whole = self._load = 0  # plans in a row that took whole blocks, and their requests
        self._promised, self._kept = 1.0, 1.0  # gain of the plan; what rounds kept of such promises
        self._rests = False  # whether drafting is off, and nothing was asked about this round
        self._learned = 0  # the last round that was learned from
        # Rounds to sleep, those slept so far, whose they are, and how many requests these are.
        self._naps = self._slept = self._sleepers = 0
        self._company: object = None
        self._looks = False  # whether this round verifies more than is best, to see what that takes

    def for_trees(self, nodes: int, costs: CostTable | None = None) -> Scheduler:
        """One of trees beside this one of chains, of the same settings.

        Args:
            nodes: of a tree at most.
            costs: of rounds with so many; None takes those of chains, as far as they reach.
        """
        if self.of_trees:
            return self
        given = (self.schedule, self.verifier, nodes, self._calibration, costs or self.costs)
        self._of_trees = Scheduler(*given, tree_depth=self.num_drafts)
        return self._of_trees

    @property
    def reads_confidences(self) -> bool:
        """Whether this round's lengths hang on confidences."""
        return self.schedule.reads_confidences and not self._coasts

    @property
    def budget(self) -> int | None:
        """Drafts that `lagged` lets this round verify, of all requests together; else None."""
        lagged = self.schedule.name == "lagged" and self.verifier != "coupled"
        return self._budget if lagged else None

    def rest(self, running: Sequence[ActiveRequest]) -> float:
        """Rounds of these requests in which nothing is drafted for certain.

        Of a request that was asked about alone this includes a pause of what drafting promises:
        without drafts its promises change little.
        """
        if not self.schedule.protects:
            return 0.0
        rounds = self._protection.rest(sum(request.ready for request in running))
        if len(running) == 1 and running[0].request_id == self._lone:
            rounds = max(rounds, float(min(self._switch.pause, LAST)))
        return max(rounds - self._slept, 0.0)

    @property
    def asleep(self) -> bool:
        """Whether nothing will be drafted in the next round if the same requests run."""
        return self._naps > self._slept

    def limits(self, requests: Sequence[ActiveRequest], most: Sequence[int]) -> list[int]:
        """Drafts of each request to ask for, decided from earlier rounds only.

        Args:
            requests: who takes part in the round, those without a context last.
            most: how many drafts of each can be of use.
        """
        self.acceptance.begin()
        self.depth = self._budget = None
        self._round, self._looks, self._rests, self._coasts = self._round + 1, False, False, False
        self._switch.probes = False
        ready = [request for request in requests if request.drafts]
        learnable = self.learns and any(request.request.learn for request in ready)
        self._learnable += learnable
        shows = learnable and self._learnable % _WHOLE_EVERY == 0
        self._shows = shows and not self.of_trees
        playing = sum(request.ready for request in requests)
        if not ready or not self.schedule.protects:
            self._rests = playing == len(requests) and self._pauses(playing)
            self._switch.skip(int(self._rests))
            return list(most)
        if not self._protection.allows(playing, tries=len(ready) == playing):
            return self._none(most)
        foresight = self._weighs(len(ready))
        if foresight is None:
            deep = self._protection.depth(playing)
            whole = self.of_trees or self._shows
            if deep is not None and deep < self.num_drafts and not whole:
                self.depth = deep
            return [min(limit, self.depth or limit) for limit in most]
        if self._coasts_on(len(ready)):
            self._budget = sum(most)
            return list(most)
        plan = self._plan(foresight, ready, playing, most)
        if plan is None:
            return self._none(most)
        if self._shows:
            plan = replace(plan, depth=self.num_drafts)
        # A probe that verifies nothing would teach nothing.
        self._budget = max(plan.budget, 1)
        self.depth = plan.depth if plan.depth < self.num_drafts else None
        return [min(limit, plan.depth) for limit in most]

    def _pauses(self, requests: int) -> bool:
        """Whether it is what drafting promises that keeps it off."""
        return self._switch.pause > 0 and not self._protection.rest(requests)

    def _coasts_on(self, requests: int) -> bool:
        """Whether whole blocks were best so steadily that this round verifies them unasked."""
        due = self._round % EVERY == 0 or self._protection.refreshes
        due = due or self._shows  # whose confidences are wanted
        self._coasts = self._whole >= EVERY and requests == self._load and not due
        return self._coasts

    def _plan(
        self,
        foresight: Foresight,
        ready: Sequence[ActiveRequest],
        playing: int,
        most: Sequence[int],
    ) -> Plan | None:
        """What the round is to do; None where drafting promises less than plain decoding."""
        requests = len(ready)
        newcomers = self._newcomers(ready)
        self._rests = self._switch.rests(playing, newcomers)
        if playing > 1:
            self._lone = None
        elif newcomers:
            self._lone = ready[0].request_id
        if self._rests:
            return None
        foresight.kind = _kind(ready)
        plan = foresight.plan(self.acceptance.earlier(ready), np.array(most[:requests]))
        on = self._switch.decide(plan.gain * self._kept)
        whole = self._may_coast and plan.budget >= sum(most)
        steady = on and whole and not self._switch.probes and requests == self._load
        self._whole, self._load = self._whole + 1 if steady else 0, requests
        if not on:
            return None
        self._promised = plan.gain
        if self._switch.probes:
            return foresight.probe(plan, requests)
        if self._protection.refreshes and self._round >= self._next_look:
            plan, self._looks = foresight.longer(plan, requests, sum(most)), True
        return plan

    def _newcomers(self, ready: Sequence[ActiveRequest]) -> int:
        """How many were not here when this was last asked."""
        before, self._known = self._known, {request.request_id for request in ready}
        return len(self._known - before)

    def _none(self, most: Sequence[int]) -> list[int]:
        """Nothing is drafted in this round."""
        self._budget = 0
        return [0] * len(most)

    def lengths(
        self, requests: Sequence[ActiveRequest], limits: Sequence[int], offer: Offer
    ) -> list[int]:
        """Verification length of each of the D requests that were drafted for.

        Args:
            requests: who takes part in the round, those D first.
            limits: most drafts of each.
            offer: what was drafted.
        """
        wanted = self._lengths(requests[: offer.num_requests], limits, offer)
        if not self._shows:
            return wanted
        # Fixed before the round, as is which rounds these are.
        return [
            min(limit, offer.drawn) if request.request.learn else length
            for request, limit, length in zip(requests, limits, wanted, strict=False)
        ]

    def _lengths(
        self, ready: Sequence[ActiveRequest], limits: Sequence[int], offer: Offer
    ) -> list[int]:
        if self._coasts:
            return _as_list(fixed_lengths(len(ready), offer.drawn))
        confidence_DK = self.acceptance.see(ready, offer)
        if self.schedule.threshold is not None and confidence_DK is not None:
            return _as_list(threshold_lengths(confidence_DK, self.schedule.threshold))
        foresight = self._weighs(len(ready))
        if self.acceptance.survival_DK is None or foresight is None:
            return _as_list(fixed_lengths(len(ready), offer.drawn))
        limits_D = np.minimum(limits[: len(ready)], offer.drawn)
        return _as_list(self._weighed(ready, limits_D, foresight))

    def _weighed(
        self, ready: Sequence[ActiveRequest], limits_D: IntArray, foresight: Foresight
    ) -> IntArray:
        if self.schedule.name == "lagged" and self.verifier != "coupled":
            assert self._budget is not None, "limits() has set it"
            if len(ready) == 1:  # which gets all of it
                return np.minimum(limits_D, self._budget)
            return fill_budget(self.acceptance.weighed(ready), self._budget, limits_D)
        survival_DK = self.acceptance.weighed(ready)
        depth = self.depth or self.num_drafts
        step_ms_N = foresight.step_ms(len(ready), int(limits_D.sum()), depth)
        if self.verifier == "coupled":  # and there only may this round's own survivals be searched
            budget = best_budget(survival_DK, step_ms_N, limits_D, MARGIN)
            return fill_budget(survival_DK, budget, limits_D)
        if self.schedule.name == "prefix":
            return prefix_lengths(survival_DK, step_ms_N, limits_D)
        earlier_DK = self.acceptance.earlier(ready)[:, : survival_DK.shape[1]]
        return lookahead_lengths(survival_DK, earlier_DK, step_ms_N, limits_D, MARGIN)

    def learn(
        self,
        requests: Sequence[ActiveRequest],
        drafts: Drafts,
        accepted: Sequence[int],
        spent: Spent,
    ) -> FloatArray | None:
        """Take note of a finished round, before its tokens are committed.

        Args:
            requests: who took part in it, those that drafted first.
            drafts: what was verified.
            accepted: drafts of each that stayed.
            spent: what it took.

        Returns:
            The survivals that its lengths were decided from, [D, K]; None where there were none.
        """
        # While drafting rests, one plain round is like another.
        if not self._rests or self._round >= self._learned + QUIET:
            self._learned = self._round
            self.learn_times(requests, drafts, accepted, spent)
        self._naps = self._nap(requests, spent)
        if self.schedule.weighs_costs and not self._coasts:
            self.acceptance.learn(requests, drafts, accepted)
        return self.acceptance.survival_DK

    def _nap(self, requests: Sequence[ActiveRequest], spent: Spent) -> int:
        """Rounds to come, of the same requests, that nothing is asked about or learned of."""
        if spent.draft_ms or self.learns or not self.schedule.protects:
            return 0
        self._sleepers = sum(request.ready for request in requests)
        if self._sleepers < len(requests):
            return 0
        if self._rests:
            return min(self._switch.left, QUIET - 1)
        # Plain rounds shortly before a try are learned from.
        return min(max(int(self._protection.rest(self._sleepers)) - OLD + 1, 0), QUIET - 1)

    def sleeps(self, company: object) -> bool:
        """Whether nothing is drafted in this round, and nothing need be asked or learned of it.

        Called once a round: a round that is slept through is counted, and made up for later.

        Args:
            company: the same object while the same requests run.
        """
        if self._naps > self._slept and company is self._company:
            self._slept += 1
            return True
        self._company, self._naps = company, 0
        if self._slept:
            self._wake()
        return False

    def _wake(self) -> None:
        """Make up for the rounds that were slept through."""
        slept, self._slept = self._slept, 0
        self._round += slept
        if self._rests:
            self._switch.skip(slept)
        else:
            self._protection.pass_plain(self._sleepers, slept)
        if self.schedule.weighs_costs:
            self.acceptance.pass_undrafted(slept)

    def learn_times(
        self,
        requests: Sequence[ActiveRequest],
        drafts: Drafts,
        accepted: Sequence[int],
        spent: Spent,
    ) -> None:
        """Take note of what a finished round took, which may be another scheduler's plain one.

        Args:
            requests: as in `learn`, and so are the others.
            drafts: as there.
            accepted: as there.
            spent: as there.
        """
        if not self.schedule.protects:
            return
        ready = [request for request in requests if request.ready]
        verified = sum(drafts.lengths)
        took = StepTime(
            requests=len(ready),
            drafts=verified,
            prompt_rows=spent.rows - len(ready) - verified,
            drafted=(self.depth or self.num_drafts) if spent.draft_ms > 0 else 0,
            draft_ms=spent.draft_ms - spent.catch_up_ms + spent.schedule_ms,
            verify_ms=spent.verify_ms,
            tokens=len(ready) + sum(accepted[: len(ready)]),
            catch_up_ms=spent.catch_up_ms,
        )
        if took.drafted and not self._drafted:
            # It built what later ones reuse: tables, kernels, weights that nobody prepared.
            self._drafted = True
            took = took._replace(draft_ms=min(took.draft_ms, took.verify_ms))
        seen = self._pace.even(took)
        gain = self._protection.learn(seen)
        if gain is not None and self._switch.probes:
            self._switch.lost(-gain)
        elif gain is not None and self._looks:
            extra = self._protection.usual_gain(len(ready)) - gain
            self._next_look = self._round + int(min(max(extra, 0.0) / PROBE_SHARE, RARE))
        if self._foresight is None or self._rests or self._coasts:
            return
        if gain is not None and not (self._switch.probes or self._looks):
            rounds = seen.total_ms / self._protection.plain_ms(len(ready))
            kept = (rounds + gain) / rounds / self._promised
            self._kept += KEPT * (min(max(kept, 0.25), 4.0) - self._kept)
        kind = _kind(ready)
        if self._protection.rest(len(ready)) < OLD and self._corrects(kind, seen):
            self._foresight.learn(kind, seen)

    def _corrects(self, kind: TemperatureClass, seen: StepTime) -> bool:
        """Whether costs are corrected by this round: always if it is out of the ordinary."""
        if not seen.drafted or self._looks or self._switch.probes:
            return True
        load = kind, seen.requests.bit_length()
        self._ordinary[load] = count = self._ordinary.get(load, 0) + 1
        return count <= _OFTEN or count % EVERY == 0

    def recalibrate(self, calibration: Calibration) -> None:
        """Take other temperatures from the next round on; call it between rounds.

        Lengths may depend on them, since they depend on finished rounds alone. The scheduler of
        trees beside this one takes them as well.
        """
        self._calibration = calibration
        self.acceptance.recalibrate(calibration)
        if self._of_trees is not None:
            self._of_trees.recalibrate(calibration)

    def forget(self, request_id: int) -> None:
        """Drop what is known of a request that has ended."""
        self.acceptance.history.drop(request_id)

    def _weighs(self, num_requests: int) -> Foresight | None:
        """Who weighs costs in this round; with more requests than were measured, nobody does."""
        if self.costs is None or not self.schedule.weighs_costs or not num_requests:
            return None
        return self._foresight if self.costs.covers(num_requests) else None


def schedule_of(given: Schedule | Scheduler | None) -> Schedule:
    """The schedule that was given, alone or with all it needs; the default one for None."""
    return given.schedule if isinstance(given, Scheduler) else given or Schedule()


def _kind(requests: Sequence[ActiveRequest]) -> TemperatureClass:
    """What verifying these requests together costs: `greedy` takes no distribution of any row."""
    temperatures = (request.request.params.temperature for request in requests)
    return temperature_class(max(temperatures, default=0.0))


def _as_list(lengths_R: IntArray) -> list[int]:
    return [int(length) for length in lengths_R]
