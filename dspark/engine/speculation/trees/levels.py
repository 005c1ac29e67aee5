"""Drafting trees level by level, of drafters that have a state per node (EAGLE-2, Li et al. 2024).

The drafter runs once per level, over the nodes that are likeliest to stay; of all children the
likeliest make the tree. Where drafts are judged against what they were drawn from, all children of
a level are drawn at once; but which of them are in the tree, and which have children of their own,
follows from survivals alone, and these from tokens nearer to the root that are in the tree before
them (docs/trees.md).
Letters: R requests, N nodes of a level, W of them of a request at most, C candidates, B children.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from dspark.drafters.base import Level
from dspark.drafters.lattice import likeliest
from dspark.engine.speculation.sampling_state import Kind, RoundState
from dspark.engine.speculation.trees.forest import Forest
from dspark.engine.speculation.trees.growth import FloatArray, IntArray, Tree
from dspark.engine.speculation.trees.laws import draft_law, ranked_children
from dspark.engine.speculation.trees.level_growth import (
    LevelGrowth,
    draw_children,
    drawn_survivals,
)

# Nodes of a level that have children at most; in small trees a third of all nodes.
_MOST_ROWS = 16
# Candidates of a node, and its children at most.
_CANDIDATES, _CHILDREN = 256, 8


def level_rows(nodes: int) -> int:
    """Nodes of a level that have children, in trees of so many nodes at most, W."""
    return min(_MOST_ROWS, nodes // 3 + 1)


@dataclass
class Levels:
    """The trees of a round while they grow. Implements `drafters.base.Expand`.

    Attributes:
        state: of the requests.
        limits: nodes of each at most.
        depths: of each likewise.
        rates: of second and further children (`level_growth.drawn_survivals`).
        broken: requests whose draft logits were no numbers.
    """

    state: RoundState
    limits: Sequence[int]
    depths: Sequence[int]
    rates: Sequence[float]
    broken: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Begin with the anchors."""
        width = level_rows(max(self.limits))
        limits = zip(self.limits, self.depths, strict=True)
        self._growths = [LevelGrowth(nodes, width, depth) for nodes, depth in limits]
        self._rows = [1] * len(self.limits)  # of each request in the level that comes next
        self._tokens, self._laws = list[Tensor](), list[Tensor]()
        shape = (max(self.depths), width, _CHILDREN)
        self._state = replace(self.state, num_drafts=int(np.prod(shape)))
        uniforms_RX = self._state.draft_uniforms(self._state.num_drafts).cpu().numpy()
        self._uniforms_RKWB = uniforms_RX.reshape(-1, *shape)

    def __call__(self, logits_NC: Tensor, tokens: Tensor | None = None) -> Level:
        """Add the children of a level's nodes, and name those that have children of their own."""
        logits_RWV = self._by_request(logits_NC)
        columns_RWC = likeliest(logits_RWV, min(_CANDIDATES, logits_RWV.shape[-1]))
        logits_RWC = logits_RWV.gather(-1, columns_RWC)
        tokens_RWC = columns_RWC if tokens is None else tokens[columns_RWC]
        found = list[list[tuple[int, int]]]([[]] * len(self._rows))
        law_RWC = logits_RWC.new_zeros(logits_RWC.shape, dtype=torch.float64)
        named_RWC = tokens_RWC.cpu().numpy()
        for kind, (rows_M, own) in self._state.groups().items():
            numbers = rows_M.tolist()
            if kind.verifier == "coupled":
                grown = self._ranked(kind, own, logits_RWC[rows_M], tokens_RWC[rows_M], numbers)
            else:
                law_RWC[rows_M] = draft_law(
                    logits_RWC[rows_M].unsqueeze(1), tokens_RWC[rows_M].unsqueeze(1), own
                ).squeeze(1)
                grown = self._drawn(law_RWC[rows_M].cpu().numpy(), numbers)
            for r, (survival_WB, columns_WB) in zip(numbers, grown, strict=True):
                if r not in self.broken:
                    named_WB = np.take_along_axis(named_RWC[r, : len(columns_WB)], columns_WB, 1)
                    found[r] = self._growths[r].add(survival_WB, columns_WB, named_WB)
        self._tokens.append(tokens_RWC)
        self._laws.append(law_RWC)
        self._rows = list(map(len, found))
        return found

    def _by_request(self, logits_NV: Tensor) -> Tensor:
        """The rows [R, W, V] of each request; anything behind its last."""
        sound_N = logits_NV.amax(dim=1).isfinite()
        index_RW = np.zeros((len(self._rows), max(self._rows)), dtype=np.int64)
        begin = 0
        for r, count in enumerate(self._rows):
            index_RW[r, :count] = range(begin, begin + count)
            if not all(sound_N[begin : begin + count]):
                self.broken.add(r)
            begin += count
        if self.broken:
            logits_NV = logits_NV.masked_fill(~sound_N[:, None], 0)
        return logits_NV[torch.from_numpy(index_RW).to(logits_NV.device)]

    def _ranked(
        self,
        kind: Kind,
        state: RoundState,
        logits_MWC: Tensor,
        tokens_MWC: Tensor,
        numbers: Sequence[int],
    ) -> list[tuple[FloatArray, IntArray]]:
        """Survivals and columns of children, of requests whose drafts are the target's own."""
        places = logits_MWC.unsqueeze(1), tokens_MWC.unsqueeze(1)
        best = ranked_children(kind, *places, state, len(self._tokens), _CHILDREN)
        chances_MWB, columns_MWB = (x.squeeze(1).cpu().numpy() for x in best)
        found = []
        for m, r in enumerate(numbers):
            count = self._rows[r]
            above_W1 = self._growths[r].reached[:count, None]
            found.append((above_W1 * chances_MWB[m, :count], columns_MWB[m, :count]))
        return found

    def _drawn(
        self, law_MWC: FloatArray, numbers: Sequence[int]
    ) -> list[tuple[FloatArray, IntArray]]:
        """Survivals and columns of children that are drawn."""
        found = []
        for law_WC, r in zip(law_MWC, numbers, strict=True):
            count = self._rows[r]
            above_W = self._growths[r].reached[:count]
            uniforms_WB = self._uniforms_RKWB[r, len(self._tokens), :count]
            columns_WB = draw_children(law_WC[:count], uniforms_WB)
            confidence_W = law_WC[:count].max(axis=1)
            survival_WB = drawn_survivals(above_W, confidence_W, self.rates, _CHILDREN)
            survival_WB[columns_WB < 0] = -1.0
            found.append((survival_WB, columns_WB))
        return found

    def trees(self) -> list[Tree]:
        """Of each request."""
        grown = (growth.done() for growth in self._growths)
        return [Tree() if r in self.broken else tree for r, tree in enumerate(grown)]

    def forest(self) -> Forest:
        """What the trees' children were drawn from, without the trees."""
        most = max(tokens_RWC.shape[1] for tokens_RWC in self._tokens)

        def stacked(levels: Sequence[Tensor]) -> Tensor:
            return torch.stack([pad(x, (0, 0, 0, most - x.shape[1])) for x in levels], dim=1)

        drawn = any(kind.verifier != "coupled" for kind in self._state.sampling.kinds)
        return Forest((), stacked(self._tokens), stacked(self._laws) if drawn else None)
