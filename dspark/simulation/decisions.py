"""Drafts of a simulated replica: the engine's own scheduler, asked in some rounds, held in others.

Asking takes a thousand times as long as playing a round. Under one load decisions hardly differ
from one round to the next, so most rounds go by the last one: blocks that were verified whole are,
and a budget is spent anew on the drafts that this round's confidences name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from dspark.engine.requests.sequence import ActiveRequest
from dspark.engine.speculation.acceptance import Offer
from dspark.engine.speculation.draft import Drafts, draft_limits
from dspark.engine.speculation.draft_scheduler import EVERY, Scheduler
from dspark.engine.speculation.round_record import Spent
from dspark.engine.speculation.schedule import Schedule
from dspark.engine.speculation.trees.choice import TreeChoice
from dspark.scheduling.cost_table import CostTable
from dspark.simulation.acceptance import Acceptance
from dspark.simulation.jobs import Job
from dspark.simulation.traffic import FloatArray, IntArray
from dspark.simulation.trees import Trees

# Rounds that go by a decision, by how many requests draft. To verify whole blocks: the first so
# many where those before were alike, twice as many whenever it is found again, up to the last.
# Others: so many. Before the first rounds have been decided, none does: a scheduler begins by
# trying things. A decision about few requests changes steps by less, and so holds for longer.
FIRST_ROUNDS = 64
FIRST_WHOLE, LAST_WHOLE, LAST_WHOLE_OF_ONE = 7, 15, 120
FILLED, FILLED_OF_ONE = 3, 15
_ALIKE = 3


@dataclass
class Decision:
    """What a round of a load does.

    Attributes:
        lengths: drafts of each request that are verified.
        depth: drafts of each that are drafted; 0 for none.
        asked: whether the scheduler decided it.
        weighed: rounds of a schedule's own work that it takes; fewer where the engine's scheduler
            goes by an earlier decision itself.
        tree: whether drafts are nodes of trees, and their depth that of their growth.
    """

    lengths: Sequence[int]
    depth: int
    asked: bool
    weighed: float
    tree: bool = False


@dataclass
class _Held:
    """A decision that holds.

    Attributes:
        depth: drafts of each.
        budget: of them verified per request.
        whole: decisions in a row that took whole blocks of this depth.
        rounds, left: that go by it, and how many of them are to come.
        tree: whether drafts are nodes of trees.
    """

    depth: int
    budget: float
    whole: int
    rounds: int
    left: int
    tree: bool


@dataclass(frozen=True)
class _Tried:
    """What `Scheduler.learn` reads of `Drafts`."""

    lengths: list[int]
    proposed: list[int]


class Decisions:
    """Decides how many drafts are verified, round by round.

    Args:
        schedule: of the drafts.
        costs: for schedules that weigh them.
        acceptance: of the drafter.
        tree_costs: of rounds of trees, drafted where the engine's choice is for them, or always by
            a schedule that does not protect plain decoding; None for chains alone.
    """

    def __init__(
        self,
        schedule: Schedule,
        costs: CostTable,
        acceptance: Acceptance,
        tree_costs: CostTable | None = None,
    ) -> None:
        self._num_drafts = acceptance.num_drafts
        self._scheduler = Scheduler(schedule, num_drafts=self._num_drafts, costs=costs)
        self._acceptance, self._schedule, self._deciding = acceptance, schedule, self._scheduler
        self._held: dict[int, _Held] = {}
        self._asked = 0
        self._spent: tuple[Sequence[ActiveRequest], _Tried] | None = None
        self._trees: tuple[Scheduler, Trees] | None = None
        self._choice = TreeChoice() if schedule.protects else None
        if tree_costs is not None:
            assert acceptance.trees is not None, "a way of trees knows what they keep"
            trees = acceptance.trees
            self._trees = self._scheduler.for_trees(trees.nodes, tree_costs), trees

    def whole(self, requests: int) -> tuple[int, int]:
        """Drafts of each in rounds that verify whole blocks, and how many rounds go by that."""
        held = self._held.get(requests.bit_length())
        if held is None or held.tree or held.whole < _ALIKE:
            return 0, 0
        return held.depth, held.left

    def skip(self, requests: int, rounds: int) -> None:
        """So many rounds of whole blocks have gone by."""
        self._held[requests.bit_length()].left -= rounds

    @property
    def held_weight(self) -> float:
        """Rounds of a schedule's work in one of whole blocks that holds (`Decision.weighed`)."""
        if not self._schedule.weighs_costs:
            return 0.0
        return 1 / EVERY if self._schedule.name == "lagged" else 1.0

    def decide(self, ready: Sequence[Job], opening: Sequence[Job], places_R: IntArray) -> Decision:
        """What a round does.

        Args:
            ready: who drafts, R.
            opening: who draws a first token in it.
            places_R: where the drafts of each lie in the acceptance profile.
        """
        if not ready:  # nobody drafts, and nothing of it is learned
            return Decision((), 0, asked=False, weighed=0.0)
        held = self._held.get(len(ready).bit_length())
        if held is None or held.left <= 0:
            return self._ask(ready, opening, places_R)
        held.left -= 1
        if held.whole >= _ALIKE:
            lengths = [held.depth] * len(ready)
            return Decision(lengths, held.depth, False, self.held_weight, held.tree)
        survival_RK = self._survival(places_R, held.depth, tree=held.tree)
        lengths = _filled(survival_RK, round(held.budget * len(ready)))
        return Decision(lengths, held.depth, False, 1.0, held.tree)

    def _survival(self, places_R: IntArray, drafts: int, *, tree: bool) -> FloatArray:
        if tree and self._trees is not None:
            return self._trees[1].survival_TM[places_R, :drafts]
        return self._acceptance.survival_TK[places_R, :drafts]

    def _ask(self, ready: Sequence[Job], opening: Sequence[Job], places_R: IntArray) -> Decision:
        scheduler, count, most = self._scheduler, len(ready), self._num_drafts
        judged = cast("list[ActiveRequest]", [*ready, *opening])
        useful, limits, tree = draft_limits(judged, self._num_drafts), list[int](), False
        if self._trees is not None and (
            self._choice is None or self._choice.decide("greedy", count)
        ):
            scheduler, most, tree = self._trees[0], self._trees[1].nodes, True
            limits = scheduler.limits(judged, [most if n > 0 else 0 for n in useful])
            if self._choice is not None and not any(limits):  # chains draft where trees pause
                scheduler, most, tree = self._scheduler, self._num_drafts, False
                self._choice.tree = False
        if not tree:
            limits = scheduler.limits(judged, useful)
        drawn, lengths, reads = max(limits, default=0), [0] * count, False
        if drawn > 0:
            reads = scheduler.reads_confidences
            logits_RK = survival_RK = None
            if tree:
                survival_RK = self._survival(places_R, drawn, tree=True)
            elif reads:
                logits_RK = self._acceptance.logits_TK[places_R, :drawn]
            offer = Offer(count, drawn, logits_RK, survival_DK=survival_RK)
            wanted = scheduler.lengths(judged, limits, offer)
            lengths = [min(pair) for pair in zip(wanted, limits, strict=False)]
        self._deciding = scheduler
        self._spent = judged, _Tried([*lengths, *(0,) * len(opening)], list(limits))
        depth = (scheduler.depth or most) if drawn > 0 else 0
        self._asked += 1
        self._hold(lengths, drawn, depth, tree=tree)
        return Decision(lengths, depth, asked=True, weighed=float(reads), tree=tree)

    def _hold(self, lengths: Sequence[int], drawn: int, depth: int, *, tree: bool) -> None:
        load, verified = len(lengths).bit_length(), sum(lengths)
        before = self._held.get(load)
        # A probe while drafting is off is no example of the rounds that follow.
        alike = before is not None and before.tree == tree and before.depth > 0
        whole = int(drawn > 0 and verified == drawn * len(lengths))
        if whole and before is not None and alike and before.depth == depth:
            whole += before.whole
        count, rounds = len(lengths), 0
        if whole >= _ALIKE and before is not None:
            longer = 2 * before.rounds + 1 if whole > _ALIKE else FIRST_WHOLE
            rounds = min(longer, max(LAST_WHOLE, LAST_WHOLE_OF_ONE // count))
        elif verified and self._asked > FIRST_ROUNDS and self._schedule.reads_confidences:
            # Nor does a look at the other of trees and chains.
            rounds = max(FILLED, FILLED_OF_ONE // count) if alike else 0
        self._held[load] = _Held(depth, verified / count, whole, rounds, rounds, tree)

    def learn(self, kept: Sequence[int], spent: Spent) -> None:
        """Tell the scheduler how a round went that it decided, as `Speculator.learn` does."""
        assert self._spent is not None, "it was asked"
        judged, tried = self._spent
        accepted = [*kept, *(0,) * (len(judged) - len(kept))]
        drafts = cast("Drafts", tried)
        self._deciding.learn(judged, drafts, accepted, spent)
        if self._trees is None:
            return
        other = self._scheduler if self._deciding is self._trees[0] else self._trees[0]
        if not spent.draft_ms:
            other.learn_times(judged, drafts, accepted, spent)
        if self._choice is not None and spent.draft_ms:
            alone = len(kept) == len(judged) == spent.rows - sum(tried.lengths)
            ms = spent.steady_ms if alone else None
            self._choice.learn("greedy", len(kept), len(kept) + sum(kept), ms)

    def forget(self, request_id: int) -> None:
        """Drop what is known of a request that has ended."""
        self._scheduler.forget(request_id)
        if self._trees is not None:
            self._trees[0].forget(request_id)


def _filled(survival_RK: FloatArray, budget: int) -> list[int]:
    """Verification lengths that spend a budget on the likeliest drafts."""
    requests, drafts = survival_RK.shape
    best = np.argsort(-survival_RK, axis=None, kind="stable")[:budget]
    found: list[int] = np.bincount(best // drafts, minlength=requests).tolist()
    return found
