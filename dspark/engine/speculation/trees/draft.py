"""Drafting trees: ask the drafter for a lattice, and grow a tree of each request in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from dspark.attention.paged_cache import PagedCache
from dspark.drafters.base import DraftBatch
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
from dspark.engine.speculation.verify import Verdict
from dspark.errors import UsageError
from dspark.sampling.distribution import Sparse
from dspark.sampling.logits_processors import Known, token_distribution
from dspark.sampling.noise import gumbel
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
# Sharpness of perturbed scores as chances under `coupled` (docs/trees.md).
_COUPLED_SHARPNESS = 1.0


@dataclass(frozen=True)
class TreeDrafting:
    """How trees are drafted, and what finished rounds say about them.

    Attributes:
        nodes: of a request's tree at most, M.
        drafter: whose lattices they grow in.
        scheduler: decides how many nodes are verified.
        choice: between trees and chains; None drafts trees in every round.
        candidates: of each slot.
        rates: of second and further children.
    """

    nodes: int
    drafter: LatticeDrafter
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
        return cls(nodes, able, chains.for_trees(nodes, costs), TreeChoice() if both else None)

    def decide(self, requests: Sequence[ActiveRequest]) -> bool:
        """Whether this round's drafts are trees."""
        if self.choice is None:
            return True
        ready = [request for request in requests if request.drafts]
        return self.choice.decide(_temperature_class(ready), len(ready))

    @property
    def decided(self) -> bool:
        """What `decide` has said last."""
        return self.choice is None or self.choice.tree

    def learn(
        self, requests: Sequence[ActiveRequest], drafts: Drafts, verdict: Verdict, spent: Spent
    ) -> None:
        """Take note of a finished round: what it gave, and which children of drawn trees stayed."""
        if self.choice is not None:
            ready = [request for request in requests if request.drafts]
            if len(ready) == len(requests) == spent.rows - sum(drafts.lengths):
                tokens = len(requests) + sum(verdict.accepted)
                ms = spent.draft_ms + spent.schedule_ms + spent.verify_ms
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


def check_trees(nodes: int, drafter: object, target: Target, schedule: str) -> LatticeDrafter:
    """Refuse what cannot draft or verify trees; the drafter that can.

    Raises:
        UsageError: the drafter, the target's mode or the schedule cannot, or there are no nodes.
        CompatibilityError: the drafter's Markov head carries a state.
    """
    if nodes < 1:
        raise UsageError(f"tree_nodes is {nodes}, but must be at least 1.")
    if not isinstance(drafter, LatticeDrafter):
        raise UsageError(
            "tree_nodes needs a DSpark or DFlash drafter, whose slots are drafted in parallel; "
            "leave it out."
        )
    drafter.check_lattice()
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
    greedy = all(kind.form == "greedy" for kind in state.sampling.kinds)
    nodes = min(max(limits), drafting.nodes)
    candidates, parents = drafting.candidates, DRAWN_PARENTS
    if greedy:
        parents = min(RANKED_PARENTS, nodes // 3 + 1)
        candidates = min(candidates, FEW_CANDIDATES) if nodes < _FEW_NODES else candidates
    lattice = drafting.drafter.lattice(context, batch, candidates, parents)
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
    return Proposed(trees, Forest((), lattice.tokens_RKC, law), broken)


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

    def ranked(self, kind: Kind, state: RoundState, rows_M: Tensor) -> list[Tree]:
        """Trees of requests whose drafts stay while they are the target's own tokens."""
        logits_MKPC = self.lattice.logits_RKPC[rows_M]
        if kind.form == "greedy":
            chances_MKPC = logits_MKPC.softmax(dim=-1)
        else:
            law_MKPC = self._law(state, rows_M)
            scores_MKPC = law_MKPC.log() + self._noise(state, rows_M)
            chances_MKPC = scores_MKPC.mul_(_COUPLED_SHARPNESS).softmax(dim=-1)
        most = min(_MOST_CHILDREN, chances_MKPC.shape[-1])
        best = chances_MKPC.topk(most, dim=-1)
        chances, columns = best.values.double().cpu().numpy(), best.indices.cpu().numpy()
        return [
            grow_ranked(*self._places(r), columns[m], chances[m], self._most(r), self.depths[r])
            for m, r in enumerate(rows_M.tolist())
        ]

    def drawn(self, state: RoundState, rows_M: Tensor) -> tuple[list[Tree], Tensor]:
        """Trees of requests whose drafts are judged by what they were drawn from, and that."""
        law_MKPC = self._law(state, rows_M)
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

    def _law(self, state: RoundState, rows_M: Tensor) -> Tensor:
        """The draft distributions [M, K, P, C], float64: bias and filters, but no penalties.

        Penalties would make them hang on a whole path; those of the target count, and a draft is
        judged by what it was really drawn from.
        """
        logits_MKPC = self.lattice.logits_RKPC[rows_M]
        requests, slots, parents, width = logits_MKPC.shape
        index_N = torch.arange(requests, device=rows_M.device).repeat_interleave(slots * parents)
        chain_N = replace(state.sampling.draft_chain, penalised=False).rows(index_N)
        tokens_NC = self.lattice.tokens_RKC[rows_M].repeat_interleave(parents, dim=1).flatten(0, 1)
        known = Known(tokens_NC, state.sampling.vocab_size)
        logits_NC = logits_MKPC.reshape(-1, width)
        found = token_distribution(logits_NC, chain_N, None, None, known)
        law_NC = found.probs_NC
        if not (isinstance(found, Sparse) and found.tokens_NC is tokens_NC):
            law_NC = found.at(torch.arange(len(found), device=rows_M.device), tokens_NC)
        return law_NC.double().view(requests, slots, parents, width)

    def _noise(self, state: RoundState, rows_M: Tensor) -> Tensor:
        """The coupled verifier's noise of every candidate at its position, [M, K, 1, C]."""
        tokens_MKC = self.lattice.tokens_RKC[rows_M]
        requests, slots, _ = tokens_MKC.shape
        places_K = torch.arange(1, slots + 1, device=rows_M.device)
        positions_MK = state.anchors_R[:, None] + places_K
        seeds_N = state.sampling.seeds_R.repeat_interleave(slots)
        noise_NC = gumbel(seeds_N, positions_MK.flatten(), tokens_MKC.flatten(0, 1))
        return noise_NC.view(requests, slots, 1, -1)
