"""Growth of one request's draft tree: the node of the highest survival first.

A tree in the order of its growth is a list of nodes whose survivals never rise and of which any
first part is a tree again. So it takes the place of a chain in every schedule: lengths become
numbers of nodes, budgets are filled by the same rule, and a chain is the tree that grows where no
second child is likelier than the next first one.

Two ways to grow, by how drafts are judged. Where a draft stays while it is the target's own token
(temperature 0, `coupled`), children are the likeliest candidates and a node may be chosen by
anything. Where it is judged against the distribution that it was drawn from, a place in the tree is
scored before its token is drawn, by what has been admitted before (docs/trees.md).
Letters: K slots, P parents, C candidates, B children, M nodes.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
# Kept of those tested, of second and later children, where no calibration says so (docs/LOG.md),
# and how many tests that is worth.
_PRIOR_RATES, _PRIOR_TESTS = (0.25, 0.15, 0.1, 0.05), 40.0
_HALF_LIFE = 4000.0


@dataclass(frozen=True)
class Tree:
    """A draft tree of M nodes in the order of its growth.

    Attributes:
        tokens: the draft of each node.
        parents: the number of each node's parent; -1 for the anchor.
        depths: drafts on the way to each node, itself included.
        rows: the row of the lattice that each node's children are drawn from; -1 for a node that
            can have none.
        columns: each node's candidate in its slot, which is its depth less 1.
        survival: the chance, as predicted, that it stays; never rising.
    """

    tokens: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()
    depths: tuple[int, ...] = ()
    rows: tuple[int, ...] = ()
    columns: tuple[int, ...] = ()
    survival: tuple[float, ...] = ()

    def __len__(self) -> int:
        return len(self.tokens)

    def first(self, count: int) -> Tree:
        """The first nodes of its growth."""
        if count >= len(self):
            return self
        return Tree(
            self.tokens[:count],
            self.parents[:count],
            self.depths[:count],
            self.rows[:count],
            self.columns[:count],
            self.survival[:count],
        )

    def reach(self, path: Sequence[int]) -> int:
        """Depth of the deepest node that is tested where this path stays."""
        end = path[-1] if path else -1
        return len(path) + (end in self.parents)

    def children(self) -> list[list[int]]:
        """Children of the anchor and of each node, in the order in which they came: M + 1 lists."""
        found: list[list[int]] = [[] for _ in range(len(self) + 1)]
        for node, parent in enumerate(self.parents):
            found[parent + 1].append(node)
        return found

    def paths(self) -> list[tuple[int, ...]]:
        """The drafts up to the anchor and to each node, itself included: M + 1 tuples."""
        found: list[tuple[int, ...]] = [()]
        for token, parent in zip(self.tokens, self.parents, strict=True):
            found.append((*found[parent + 1], token))
        return found


@dataclass
class _Growing:
    """A tree that is not complete, in a lattice whose slots have rows for some candidates."""

    tokens_KC: IntArray
    rows_KC: IntArray
    columns: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    survival: list[float] = field(default_factory=list)

    def add(self, parent: int, column: int, survival: float) -> int:
        """Add a node; its number."""
        self.columns.append(column)
        self.parents.append(parent)
        self.depths.append(1 if parent < 0 else self.depths[parent] + 1)
        self.survival.append(survival)
        return len(self.columns) - 1

    def done(self) -> Tree:
        """The complete tree."""
        slots = np.array(self.depths, dtype=np.int64) - 1
        columns = np.array(self.columns, dtype=np.int64)
        return Tree(
            tuple(self.tokens_KC[slots, columns].tolist()),
            tuple(self.parents),
            tuple(self.depths),
            tuple(self.rows_KC[slots, columns].tolist()),
            tuple(self.columns),
            tuple(self.survival),
        )


def rows_of_columns(parents_KP: IntArray, width: int) -> IntArray:
    """The row in slot k + 1 of each candidate of slot k, [K, C]; -1 where it has none.

    Args:
        parents_KP: columns of the candidates of slot k - 1 that slot k has rows for.
        width: C.
    """
    slots, parents = parents_KP.shape
    rows_KC = np.full((slots, width), -1, dtype=np.int64)
    rows_KC[np.arange(slots - 1)[:, None], parents_KP[1:]] = np.arange(parents)
    return rows_KC


def grow_ranked(
    tokens_KC: IntArray,
    rows_KC: IntArray,
    columns_KPB: IntArray,
    chances_KPB: FloatArray,
    nodes: int,
    depth: int,
) -> Tree:
    """Grow by the likeliest children.

    Args:
        tokens_KC: candidates of each slot.
        rows_KC: `rows_of_columns`.
        columns_KPB: the likeliest candidates after each parent, best first.
        chances_KPB: that the target's token is this one, given that its parent stays; never rising.
        nodes: M at most.
        depth: of the tree at most.
    """
    tree, places = _Growing(tokens_KC, rows_KC), 0
    columns, chances = columns_KPB.tolist(), chances_KPB.tolist()
    # (-survival, order of arrival, parent, survival of the parent, slot, row there, child)
    queue = [(-chances[0][0][0], 0, -1, 1.0, 0, 0, 0)] if depth else []
    width = columns_KPB.shape[2]
    while queue and len(tree.columns) < nodes:
        cost, _, parent, above, slot, row, child = heapq.heappop(queue)
        column = columns[slot][row][child]
        node = tree.add(parent, column, -cost)
        if child + 1 < width:
            places += 1
            survival = above * chances[slot][row][child + 1]
            entry = (max(cost, -survival), places, parent, above, slot, row, child + 1)
            heapq.heappush(queue, entry)
        own = int(rows_KC[slot, column])
        if slot + 1 < depth and own >= 0:
            places += 1
            survival = -cost * chances[slot + 1][own][0]
            heapq.heappush(queue, (-survival, places, node, -cost, slot + 1, own, 0))
    return tree.done()


class _Place(NamedTuple):
    """Where a node may be added: behind the children that its parent has.

    Attributes:
        cost: minus the survival of the node.
        order: of arrival, which breaks ties.
        parent: number of the parent.
        reach: the chance that the place is tested at all.
        child: how many children the parent has before it.
        slot: of the lattice.
        law_C: what the parent's children before this one have left of its draft distribution.
    """

    cost: float
    order: int
    parent: int
    reach: float
    child: int
    slot: int
    law_C: FloatArray


def grow_drawn(
    tokens_KC: IntArray,
    rows_KC: IntArray,
    law_KPC: FloatArray,
    confidence_KP: FloatArray,
    rates: Sequence[float],
    uniforms_M: Sequence[float],
    depth: int,
) -> Tree:
    """Grow by places, and draw the token of each place without replacement once it is chosen.

    A place's score hangs on the drafts that lead to it and, by their number alone, on the children
    before it; never on its own token nor on any that is not yet admitted.

    Args:
        tokens_KC: candidates of each slot.
        rows_KC: `rows_of_columns`.
        law_KPC: draft distribution of the children of each parent.
        confidence_KP: chance that the first child of each parent stays, if the parent does.
        rates: chance that the second, third, ... child stays, if the ones before it do not; the
            last holds for all further ones.
        uniforms_M: one number per node at most, in (0, 1).
        depth: of the tree at most.
    """
    tree, places = _Growing(tokens_KC, rows_KC), 0
    queue = list[_Place]()

    def offer(above: float, parent: int, slot: int, row: int) -> None:
        survival = above * float(confidence_KP[slot, row])
        law_C = law_KPC[slot, row].copy()
        heapq.heappush(queue, _Place(-survival, places, parent, above, 0, slot, law_C))

    if depth:
        offer(1.0, -1, 0, 0)
    for uniform in uniforms_M:
        if not queue:
            break
        place = heapq.heappop(queue)
        column = _draw(place.law_C, uniform)
        node = tree.add(place.parent, column, -place.cost)
        place.law_C[column] = 0.0
        reach = max(place.reach + place.cost, 0.0)
        if place.law_C.any():
            places += 1
            survival = min(reach * rates[min(place.child, len(rates) - 1)], -place.cost)
            beside = place._replace(
                cost=-survival, order=places, reach=reach, child=place.child + 1
            )
            heapq.heappush(queue, beside)
        own = int(rows_KC[place.slot, column])
        if place.slot + 1 < depth and own >= 0:
            places += 1
            offer(-place.cost, node, place.slot + 1, own)
    return tree.done()


def _draw(law_C: FloatArray, uniform: float) -> int:
    cumulated_C = law_C.cumsum()
    total = cumulated_C[-1]
    mass = min(uniform * total, np.nextafter(total, 0.0))
    return int(cumulated_C.searchsorted(mass, side="right"))


class ChildRates:
    """How often second, third, ... children stay, if the ones before them did not.

    Learned from finished rounds.

    Args:
        calibrated: what they are before any round; none for what is usual.
    """

    def __init__(self, calibrated: Sequence[float] = ()) -> None:
        prior_B = np.array(calibrated or _PRIOR_RATES)
        self._tests_B = np.full(len(prior_B), _PRIOR_TESTS)
        self._kept_B = prior_B * _PRIOR_TESTS

    @property
    def values(self) -> list[float]:
        """The rates, of the second child on; the last of all further ones."""
        return [float(rate) for rate in self._kept_B / self._tests_B]

    def learn(self, tree: Tree, path: Sequence[int]) -> None:
        """A round kept this path of a tree."""
        children = tree.children()
        kept = set(path)
        for node in (-1, *path):
            for rank, child in enumerate(children[node + 1]):
                if rank:
                    place = min(rank, len(self._tests_B)) - 1
                    fade = 0.5 ** (1 / _HALF_LIFE)
                    self._tests_B[place] = fade * self._tests_B[place] + 1
                    self._kept_B[place] = fade * self._kept_B[place] + (child in kept)
                if child in kept:
                    break
