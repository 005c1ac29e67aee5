"""Growth of one request's draft tree a level at a time, where the drafter runs once per level.

Letters: P nodes of a level that have children, B children, C candidates, M nodes of the tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dspark.engine.speculation.trees.growth import FloatArray, IntArray, Tree


class _Node(NamedTuple):
    """A node of a tree that grows by levels; nodes are ordered by the first four.

    Attributes:
        cost: minus its survival.
        level: its depth less 1.
        row: of its parent in that level.
        child: how many children its parent has before it.
        column: its candidate.
        token: its draft.
    """

    cost: float
    level: int
    row: int
    child: int
    column: int
    token: int


class LevelGrowth:
    """Growth of one request's tree where the drafter runs once per level.

    The tree has the nodes of the highest survival, of which the first of each level, as many as it
    has rows, have children. That is growth node by node, in order of survival and then of levels,
    rows and children: whether a node has a row depends on how many of its level come before it in
    this order, and all their ancestors do, too. So where tokens are drawn, a place depends on none
    that is not yet in the tree, as in `grow_drawn`, although they are drawn before it is known
    which of them are in it.

    Args:
        nodes: M at most.
        rows: of a level at most.
        depth: of the tree at most.
    """

    def __init__(self, nodes: int, rows: int, depth: int) -> None:
        self._nodes, self._most, self._depth = nodes, rows, depth
        self._kept = list[_Node]()
        self._rows: list[list[_Node]] = []  # whose children each level has, but the first

    @property
    def reached(self) -> FloatArray:
        """Survivals [P] of the nodes that have rows in the next level."""
        return np.array([-node.cost for node in self._rows[-1]]) if self._rows else np.ones(1)

    def add(
        self, survival_PB: FloatArray, columns_PB: IntArray, tokens_PB: IntArray
    ) -> list[tuple[int, int]]:
        """Add the children of all rows of a level.

        Args:
            survival_PB: chance that each stays, at most its parent's and never rising; negative
                for one that does not exist.
            columns_PB: candidates of the parent.
            tokens_PB: drafts.

        Returns:
            The row of the parent and the token of each node that has a row in the next level.
        """
        level, kept = len(self._rows), self._kept
        places = zip(survival_PB.tolist(), columns_PB.tolist(), tokens_PB.tolist(), strict=True)
        for row, children in enumerate(places):
            for child, (survival, column, token) in enumerate(zip(*children, strict=True)):
                if survival >= 0:
                    kept.append(_Node(-survival, level, row, child, column, token))
        kept.sort()
        del kept[self._nodes :]
        most = self._most if level + 1 < self._depth else 0
        self._rows.append([node for node in kept if node.level == level][:most])
        return [(node.row, node.token) for node in self._rows[-1]]

    def done(self) -> Tree:
        """The complete tree."""
        kept, rows = self._kept, self._rows
        number = {node: i for i, node in enumerate(kept)}
        own = {node: row for nodes in rows for row, node in enumerate(nodes)}
        return Tree(
            tuple(node.token for node in kept),
            tuple(number[rows[node.level - 1][node.row]] if node.level else -1 for node in kept),
            tuple(node.level + 1 for node in kept),
            tuple(own.get(node, -1) for node in kept),
            tuple(node.column for node in kept),
            tuple(-node.cost for node in kept),
        )


def drawn_survivals(
    above_P: FloatArray, confidence_P: FloatArray, rates: Sequence[float], children: int
) -> FloatArray:
    """Survivals [P, B] of the places behind each parent, as `grow_drawn` has them.

    Args:
        above_P: survivals of the parents.
        confidence_P: chance that the first child of each stays, if the parent does.
        rates: as there.
        children: B.
    """
    survivals, reach_P = [above_P * confidence_P], above_P
    for child in range(children - 1):
        reach_P = np.maximum(reach_P - survivals[-1], 0.0)
        rate = rates[min(child, len(rates) - 1)]
        survivals.append(np.minimum(reach_P * rate, survivals[-1]))
    return np.stack(survivals, axis=1)


def draw_children(law_PC: FloatArray, uniforms_PB: FloatArray) -> IntArray:
    """Columns [P, B] drawn one after the other, each from what those before it have left.

    -1 where nothing is left.

    Args:
        law_PC: what the first is drawn from.
        uniforms_PB: numbers in (0, 1).
    """
    left_PC, columns = law_PC.copy(), []
    for uniform_P in uniforms_PB.T:
        cumulated_PC = left_PC.cumsum(axis=1)
        total_P = cumulated_PC[:, -1]
        mass_P = np.minimum(uniform_P * total_P, np.nextafter(total_P, 0.0))
        column_P = (cumulated_PC <= mass_P[:, None]).sum(axis=1)
        columns.append(np.where(total_P > 0, column_P, -1))
        left_PC[np.arange(len(left_PC)), columns[-1]] = 0.0
    return np.stack(columns, axis=1)
