"""The speculator: a drafter at work in a round, from the requests to the drafts to verify."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

from dspark.drafters.base import Drafter, Preparing, Proposal
from dspark.engine.requests.collector import Collector
from dspark.engine.requests.sequence import ActiveRequest
from dspark.engine.speculation.acceptance import Offer
from dspark.engine.speculation.draft import (
    Drafts,
    Drawing,
    choose,
    confidence_array,
    draft_limits,
    propose,
)
from dspark.engine.speculation.draft_context import DraftContext
from dspark.engine.speculation.draft_scheduler import Scheduler
from dspark.engine.speculation.drafter_faults import Shield
from dspark.engine.speculation.round_record import FloatArray, RoundTimes, Spent, Watch
from dspark.engine.speculation.sampling_state import RoundState
from dspark.engine.speculation.trees.draft import TreeDrafting, propose_trees
from dspark.engine.speculation.trees.growth import Tree
from dspark.engine.speculation.verify import Verdict
from dspark.errors import NumericsError

# In place of a confidence where a draft cannot be used: as good as none.
_NO_CONFIDENCE = -30.0


@dataclass(frozen=True)
class Speculator:
    """A drafter with its context, the scheduler that trims what it proposes, and who watches.

    With `trees` it drafts these in place of chains, or in rounds where they are faster. What the
    drafter does wrong stops at the shield. A collector gets what may be learned from. A watch gets
    confidences, where no schedule reads them, only if it `wants_confidences`: they cost time.
    """

    drafter: Drafter
    context: DraftContext
    scheduler: Scheduler
    watch: Watch | None = None
    shield: Shield = field(default_factory=Shield)
    wants_confidences: bool = True
    trees: TreeDrafting | None = None
    collector: Collector | None = None

    def prepare(self) -> None:
        """Have the drafter lay its weights out now, and not in the first round that drafts."""
        if isinstance(self.drafter, Preparing):
            with self.shield.over(()):
                self.drafter.prepare()

    @property
    def deciding(self) -> Scheduler:
        """The scheduler of the last round's drafts."""
        trees = self.trees
        return self.scheduler if trees is None or not trees.decided else trees.scheduler

    def _resting(self, running: Sequence[ActiveRequest]) -> float:
        """Rounds of these requests in which nothing is drafted for certain."""
        rounds = self.scheduler.rest(running)
        return rounds if self.trees is None else min(rounds, self.trees.scheduler.rest(running))

    def learn(
        self,
        requests: Sequence[ActiveRequest],
        drafts: Drafts,
        verdict: Verdict,
        spent: Spent,
    ) -> FloatArray | None:
        """Take note of a finished round; the survivals that its lengths were decided from."""
        deciding, trees = self.deciding, self.trees
        survival_DK = deciding.learn(requests, drafts, verdict.accepted, spent)
        if trees is not None:
            other = self.scheduler if deciding is trees.scheduler else trees.scheduler
            if other is not deciding and not spent.draft_ms:
                other.learn_times(requests, drafts, verdict.accepted, spent)
            trees.learn(requests, drafts, verdict, spent)
        return survival_DK

    def forget(self, request_id: int) -> None:
        """Drop what is known of a request that has ended."""
        self.scheduler.forget(request_id)
        if self.trees is not None:
            self.trees.scheduler.forget(request_id)

    @property
    def reads_confidences(self) -> bool:
        """Whether drafting must come up with confidences."""
        watched = self.watch is not None and self.wants_confidences
        return self.scheduler.reads_confidences or watched

    def sleeps(self, state: RoundState) -> bool:
        """Whether nothing is drafted in this round, and nothing need be asked or learned of it."""
        return self.trees is None and self.scheduler.sleeps(state.sampling)

    def rest(self, running: list[ActiveRequest], *, shares: bool) -> None:
        """Have requests decoded plainly that end before the drafter is tried again.

        Nothing is kept for the drafter then. Where prompts are shared, they are read for it all
        the same. Who drafts comes first in `running` from now on.
        """
        if (
            self.trees is None
            and self.scheduler.asleep
            and all(request.ready for request in running)
        ):
            return  # the last round found out
        rounds = self._resting(running)
        if not rounds:
            return
        for request in running:
            if request.plain or request.request.learn or request.room >= rounds:
                continue
            if request.ready or not shares:
                request.decode_plainly(request.cached)
        running.sort(key=lambda request: request.plain)


def draft(
    requests: Sequence[ActiveRequest],
    state: RoundState,
    speculator: Speculator,
    times: RoundTimes,
) -> Drafts | None:
    """Drafts of a round, chosen by the schedule; None where none can be of use, or pays.

    Args:
        requests: of the round; those with a draft context come first.
        state: their sampling.
        speculator: who drafts.
        times: get what drafting and scheduling took.
    """
    trees = speculator.trees
    if trees is not None and trees.decide(requests):
        drafts = _trees(requests, state, speculator, times)
        if drafts is not None or not trees.gives_way():
            return drafts
    return _chains(requests, state, speculator, times)


def _chains(
    requests: Sequence[ActiveRequest],
    state: RoundState,
    speculator: Speculator,
    times: RoundTimes,
) -> Drafts | None:
    """Chains of the requests that have a context."""
    started = time.perf_counter()
    scheduler = speculator.scheduler
    limits = scheduler.limits(requests, draft_limits(requests, state.num_drafts))
    most = max(limits)
    times.schedule_ms += (time.perf_counter() - started) * 1e3
    if most <= 0:
        return None
    started = time.perf_counter()
    ready = [request for request in requests if request.drafts]
    catch_up_ms = speculator.context.catch_up(len(ready) * (state.num_drafts + 1))
    drawing, proposal = propose(
        speculator.drafter,
        speculator.context.cache,
        ready,
        state.first(len(ready)),
        most,
        confidences=speculator.reads_confidences,
        depth=scheduler.depth,
    )
    decided = time.perf_counter()
    logits_DK = _confidences(proposal, drawing)
    offer = Offer(len(ready), len(drawing.tokens), logits_DK, proposal.are_margins)
    wanted = scheduler.lengths(requests, limits, offer)
    drafts = choose(drawing, proposal, limits, wanted, logits_DK)
    times.draft_ms, times.catch_up_ms = (decided - started) * 1e3, catch_up_ms
    times.schedule_ms += (time.perf_counter() - decided) * 1e3
    _note_numbers(speculator, ready, drawing)
    return drafts


def _trees(
    requests: Sequence[ActiveRequest],
    state: RoundState,
    speculator: Speculator,
    times: RoundTimes,
) -> Drafts | None:
    """Trees of the requests that have a context."""
    started, drafting = time.perf_counter(), speculator.trees
    assert drafting is not None
    scheduler = drafting.scheduler
    most = [drafting.nodes if n > 0 else 0 for n in draft_limits(requests, state.num_drafts)]
    limits = scheduler.limits(requests, most)
    times.schedule_ms = (time.perf_counter() - started) * 1e3
    if max(limits) <= 0:
        return None
    started = time.perf_counter()
    ready = [request for request in requests if request.drafts]
    catch_up_ms = speculator.context.catch_up(len(ready) * (state.num_drafts + 1))
    proposed = propose_trees(
        drafting,
        speculator.context.cache,
        ready,
        replace(state.first(len(ready)), num_drafts=drafting.nodes),
        limits[: len(ready)],
        state.num_drafts,
    )
    decided = time.perf_counter()
    survival_DM = proposed.survival_DM
    offer = Offer(len(ready), survival_DM.shape[1], survival_DK=survival_DM)
    wanted = scheduler.lengths(requests, limits, offer)
    pruned = [tree.first(n) for tree, n in zip(proposed.trees, wanted, strict=True)]
    joining = len(requests) - len(ready)
    forest = replace(proposed.forest, trees=(*pruned, *(Tree(),) * joining))
    grown = [*proposed.trees, *(Tree(),) * joining]
    drafts = Drafts.of_trees(forest, grown, proposed.forest.tokens_DKTC.device)
    times.draft_ms, times.catch_up_ms = (decided - started) * 1e3, catch_up_ms
    times.schedule_ms += (time.perf_counter() - decided) * 1e3
    nothing = len(proposed.broken) == len(ready)
    _note_broken(speculator, ready, proposed.broken, nothing=nothing, drawn=True)
    return drafts


def _confidences(proposal: Proposal, drawing: Drawing) -> FloatArray | None:
    """The proposal's confidence logits; none to speak of where a draft is of no use."""
    logits_DK = confidence_array(proposal)
    if logits_DK is not None:
        for request, count in drawing.sound.items():
            logits_DK[request, count:] = _NO_CONFIDENCE
    return logits_DK


def _note_numbers(speculator: Speculator, ready: Sequence[ActiveRequest], drawing: Drawing) -> None:
    """Requests whose drafts were no numbers have plain rounds; that all are is a fault."""
    nothing = all(drawing.sound.get(i) == 0 for i in range(len(ready)))
    _note_broken(speculator, ready, drawing.broken, nothing=nothing, drawn=bool(drawing.tokens))


def _note_broken(
    speculator: Speculator,
    ready: Sequence[ActiveRequest],
    broken: Collection[int],
    *,
    nothing: bool,
    drawn: bool,
) -> None:
    for request in broken:
        speculator.context.clear(ready[request].table, ready[request].cached)
    if broken and nothing:
        speculator.shield.record(
            NumericsError(
                "The drafter failed: its logits have NaN or no finite maximum; check the "
                "drafter's weights and dtype."
            )
        )
    elif drawn:
        speculator.shield.worked()
