"""Drafting trees: a tree of each request, grown in a drafter's lattice or level by level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from dspark.attention.paged_cache import PagedCache
from dspark.drafters.base import DraftBatch, LevelDrafter
from dspark.drafters.lattice import Lattice, LatticeDrafter
from dspark.engine.requests.sequence import ActiveRequest
from dspark.engine.speculation.draft import Drafts
from dspark.engine.speculation.draft_scheduler import Scheduler
from dspark.engine.speculation.round_record import FloatArray, Spent
from dspark.engine.speculation.sampling_state import Kind, RoundState
from dspark.engine.speculation.trees.choice import TreeChoice
from dspark.engine.speculation.trees.forest import Forest
from dspark.engine.speculation.trees.growth import (
    ChildRates,
    IntArray,
    Tree,
    grow_drawn,
    grow_ranked,
    rows_of_columns,
)
from dspark.engine.speculation.trees.laws import draft_law, ranked_children
from dspark.engine.speculation.trees.levels import Levels, level_rows
from dspark.engine.speculation.verify import Verdict
from dspark.errors import UsageError
from dspark.scheduling.calibration import TemperatureClass, temperature_class
from dspark.scheduling.cost_table import CostTable
from dspark.targets.target import Target

# Candidates of a slot, and of one in a tree of a few ranked nodes (docs/LOG.md).
CANDIDATES, FEW_CANDIDATES = 512, 256
_FEW_NODES = 8
# Candidates of a slot that may have children at most, where the likeliest do (a third of the tree's
# nodes at most), and where any may be drawn.
RANKED_PARENTS, DRAWN_PARENTS = 16, 64
# Children of a node at most, where they are ranked.
_MOST_CHILDREN = 8

TreeDrafter = LatticeDrafter | LevelDrafter


@dataclass(frozen=True)
class TreeDrafting:
    """How trees are drafted, and what finished rounds say about them.

    Attributes:
        nodes: of a request's tree at most, M.
        drafter: of them.
        scheduler: decides how many nodes are verified.
        choice: between trees and chains; None drafts trees in every round.
        candidates: of each slot.
        rates: of second and further children.
    """

    nodes: int
    drafter: TreeDrafter
    scheduler: Scheduler
    choice: TreeChoice | None = None
    candidates: int = CANDIDATES
    rates: ChildRates = field(default_factory=ChildRates)

    @classmethod
    def beside(
        cls,
        chains: Scheduler,
        nodes: int,
        drafter: object,
        target: Target,
        costs: CostTable | None = None,
    ) -> TreeDrafting:
        """Trees beside chains, in rounds where they are faster, if the schedule protects.

        Args:
            chains: their scheduler; one of trees drafts these alone.
            nodes: of a tree at most.
            drafter: of both.
            target: verifies them.
            costs: of rounds with trees; None takes those of chains.

        Raises:
            UsageError, CompatibilityError: as `check_trees`.
        """
        able = check_trees(nodes, drafter, target, chains.schedule.name)
        both = chains.schedule.protects and not chains.of_trees
        scheduler = chains.for_trees(nodes, costs)
        rates = ChildRates(scheduler.acceptance.child_rates)
        return cls(nodes, able, scheduler, TreeChoice() if both else None, rates=rates)

    def decide(self, requests: Sequence[ActiveRequest]) -> bool:
        """Whether this round's drafts are trees."""
        if self.choice is None:
            return True
        ready = [request for request in requests if request.drafts]
        return self.choice.decide(_temperature_class(ready), len(ready))

    def gives_way(self) -> bool:
        """Whether chains may draft a round in which the scheduler of trees pauses."""
        if self.choice is None:
            return False
        self.choice.tree = False
        return True

    def rows_ahead(self, depth: int) -> int:
        """Rows of the drafter's cache behind the anchor's that trees of this depth may take."""
        return (depth - 1) * level_rows(self.nodes) if isinstance(self.drafter, LevelDrafter) else 0

    @property
    def decided(self) -> bool:
        """What `decide` has said last."""
        return self.choice is None or self.choice.tree

    def learn(
        self, requests: Sequence[ActiveRequest], drafts: Drafts, verdict: Verdict, spent: Spent
    ) -> None:
        """Take note of a finished round: what it gave, and which children of drawn trees stayed."""
        if self.choice is not None and spent.draft_ms:
            ready = [request for request in requests if request.drafts]
            alone = len(ready) == len(requests) == spent.rows - sum(drafts.lengths)
            ms = spent.steady_ms if alone else None
            tokens = len(requests) + sum(verdict.accepted)
            self.choice.learn(_temperature_class(ready), len(ready), tokens, ms)
        forest = drafts.forest
        if forest is None or forest.law_DKPC is None:
            return
        for request, tree, path in zip(requests, forest.trees, verdict.paths, strict=True):
            params = request.request.params
            typical = not (params.has_penalties or params.logit_bias or request.request.mask)
            drawn = params.temperature > 0 and not request.request.reproducible
            if len(tree) and typical and drawn:
                self.rates.learn(tree, path)


def check_trees(nodes: int, drafter: object, target: Target, schedule: str) -> TreeDrafter:
    """Refuse what cannot draft or verify trees; the drafter that can.

    Raises:
        UsageError: the drafter, the target's mode or the schedule cannot, or there are no nodes.
        CompatibilityError: the drafter's Markov head carries a state, or it is a P-EAGLE drafter.
    """
    if nodes < 1:
        raise UsageError(f"tree_nodes is {nodes}, but must be at least 1.")
    if isinstance(drafter, LatticeDrafter):
        drafter.check_lattice()
    elif isinstance(drafter, LevelDrafter):
        drafter.check_levels()
    else:
        raise UsageError("tree_nodes needs a DSpark, DFlash, Eagle3 or MTP drafter; leave it out.")
    if target.batch_invariant:
        raise UsageError(
            "tree_nodes and batch_invariant exclude each other; leave one of them out."
        )
    if target.own_cache:
        raise UsageError(
            "tree_nodes needs a target that keeps keys and values alone, but this one runs "
            "through its own cache; leave it out."
        )
    if schedule == "threshold":
        raise UsageError(
            "tree_nodes and the schedule 'threshold' exclude each other: a node is chosen by "
            "its survival, not by a confidence alone; use another schedule."
        )
    return drafter


def _temperature_class(requests: Sequence[ActiveRequest]) -> TemperatureClass:
    temperatures = (request.request.params.temperature for request in requests)
    return temperature_class(max(temperatures, default=0.0))


@dataclass(frozen=True)
class Proposed:
    """Trees of the first D requests of a round, before the schedule has pruned them.

    Attributes:
        trees: of each.
        forest: their lattice, without trees.
        broken: requests whose draft logits were no numbers; their trees are empty.
    """

    trees: list[Tree]
    forest: Forest
    broken: frozenset[int]

    @property
    def survival_DM(self) -> FloatArray:
        """Of every node, 0 behind the last; [D, M] with M of the largest tree."""
        most = max((len(tree) for tree in self.trees), default=0)
        found = np.zeros((len(self.trees), most))
        for row, tree in zip(found, self.trees, strict=True):
            row[: len(tree)] = tree.survival
        return found


def propose_trees(
    drafting: TreeDrafting,
    context: PagedCache,
    requests: Sequence[ActiveRequest],
    state: RoundState,
    limits: Sequence[int],
    block_size: int,
) -> Proposed:
    """Grow a tree of each request.

    Args:
        drafting: how.
        context: of the drafter.
        requests: that have a context.
        state: of these, for up to `drafting.nodes` drafts.
        limits: nodes of each at most.
        block_size: depth at most.
    """
    depths = [min(r.room - 1, block_size, n) for r, n in zip(requests, limits, strict=True)]
    device = state.sampling.seeds_R.device
    batch = DraftBatch(
        tables=tuple(request.table for request in requests),
        anchors_R=torch.tensor([request.tokens[-1] for request in requests], device=device),
        lengths=tuple(request.cached for request in requests),
        tokens=tuple(request.tokens for request in requests),
        num_drafts=max(depths),
        confidences=any(kind.verifier != "coupled" for kind in state.sampling.kinds),
    )
    if isinstance(drafting.drafter, LevelDrafter):
        levels = Levels(state, limits, depths, drafting.rates.values)
        drafting.drafter.levels(context, batch, levels)
        return Proposed(levels.trees(), levels.forest(), frozenset(levels.broken))
    return _in_lattice(drafting, drafting.drafter, context, batch, requests, state, limits, depths)


def _in_lattice(
    drafting: TreeDrafting,
    drafter: LatticeDrafter,
    context: PagedCache,
    batch: DraftBatch,
    requests: Sequence[ActiveRequest],
    state: RoundState,
    limits: Sequence[int],
    depths: Sequence[int],
) -> Proposed:
    """Grow a tree of each request in the drafter's lattice."""
    greedy = all(kind.form == "greedy" for kind in state.sampling.kinds)
    nodes = min(max(limits), drafting.nodes)
    candidates, parents = drafting.candidates, DRAWN_PARENTS
    if greedy:
        parents = min(RANKED_PARENTS, nodes // 3 + 1)
        candidates = min(candidates, FEW_CANDIDATES) if nodes < _FEW_NODES else candidates
    lattice = drafter.lattice(context, batch, candidates, parents)
    sound_R = lattice.logits_RKPC.amax(dim=(1, 2, 3)).isfinite()
    broken = frozenset(torch.nonzero(~sound_R).flatten().tolist())
    if broken:
        scores = lattice.confidence_logits_RKP
        lattice = replace(
            lattice,
            logits_RKPC=lattice.logits_RKPC.masked_fill(~sound_R[:, None, None, None], 0),
            confidence_logits_RKP=None
            if scores is None
            else scores.masked_fill(~sound_R[:, None, None], 0),
        )
    confidence_RKP = _confidences(lattice, requests, drafting.scheduler)
    grower = _Grower(lattice, confidence_RKP, drafting, limits, depths, broken)
    trees, law = [Tree()] * len(requests), None
    for kind, (rows_M, own) in state.groups().items():
        numbers = rows_M.tolist()
        if kind.verifier == "coupled":
            grown = grower.ranked(kind, own, rows_M)
        else:
            grown, law_MKPC = grower.drawn(own, rows_M)
            if len(numbers) == len(requests):
                law = law_MKPC
            else:
                if law is None:
                    law = law_MKPC.new_zeros(len(requests), *law_MKPC.shape[1:])
                law[rows_M] = law_MKPC
        for r, tree in zip(numbers, grown, strict=True):
            trees[r] = tree
    return Proposed(trees, Forest((), lattice.tokens_RKC.unsqueeze(2), law), broken)


def _confidences(
    lattice: Lattice, requests: Sequence[ActiveRequest], scheduler: Scheduler
) -> FloatArray | None:
    """Calibrated chances [R, K, P] of first children; None for a drafter without confidences."""
    if lattice.confidence_logits_RKP is None:
        return None
    logits_RPK = lattice.confidence_logits_RKP.transpose(1, 2).double().cpu().numpy()
    count, width, slots = logits_RPK.shape
    everyone = [request for request in requests for _ in range(width)]
    found = scheduler.acceptance.confidences(everyone, logits_RPK.reshape(-1, slots))
    return np.ascontiguousarray(found.reshape(count, width, slots).transpose(0, 2, 1))


@dataclass(frozen=True)
class _Grower:
    """Grows the trees of a round, the requests of one kind at a time."""

    lattice: Lattice
    confidence_RKP: FloatArray | None
    drafting: TreeDrafting
    limits: Sequence[int]
    depths: Sequence[int]
    broken: frozenset[int]

    def _most(self, request: int) -> int:
        return 0 if request in self.broken else min(self.limits[request], self.drafting.nodes)

    def _places(self, request: int) -> tuple[IntArray, IntArray]:
        """Tokens of the candidates, and the rows of those that may have children."""
        tokens_KC = self.lattice.tokens_RKC[request].cpu().numpy()
        parents_KP = self.lattice.parents_RKP[request].cpu().numpy()
        return tokens_KC, rows_of_columns(parents_KP, tokens_KC.shape[1])

    def _candidates(self, rows_M: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [M, K, P, C] and tokens [M, K, 1, C] of requests."""
        return self.lattice.logits_RKPC[rows_M], self.lattice.tokens_RKC[rows_M].unsqueeze(2)

    def ranked(self, kind: Kind, state: RoundState, rows_M: Tensor) -> list[Tree]:
        """Trees of requests whose drafts stay while they are the target's own tokens."""
        best = ranked_children(kind, *self._candidates(rows_M), state, 0, _MOST_CHILDREN)
        chances, columns = (x.cpu().numpy() for x in best)
        return [
            grow_ranked(*self._places(r), columns[m], chances[m], self._most(r), self.depths[r])
            for m, r in enumerate(rows_M.tolist())
        ]

    def drawn(self, state: RoundState, rows_M: Tensor) -> tuple[list[Tree], Tensor]:
        """Trees of requests whose drafts are judged by what they were drawn from, and that."""
        law_MKPC = draft_law(*self._candidates(rows_M), state)
        laws = law_MKPC.cpu().numpy()
        confidences = self.confidence_RKP
        uniforms = state.draft_uniforms(self.drafting.nodes).tolist()
        trees = [
            grow_drawn(
                *self._places(r),
                laws[m],
                laws[m].max(axis=-1) if confidences is None else confidences[r],
                self.drafting.rates.values,
                uniforms[m][: self._most(r)],
                self.depths[r],
            )
            for m, r in enumerate(rows_M.tolist())
        ]
        return trees, law_MKPC
