"""Cases about draft trees that grow level by level: all draws of every level, in the tree or not.

The drafter's distributions and confidences hang on the whole path, as Eagle3's do. Growth by
levels, draws, survivals, judgement and the schedules are the production code. All children of a
level are drawn before it is known which of them are in the tree, so all draws are enumerated.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import numpy as np

from dspark.engine.speculation.trees import level_growth
from dspark.engine.speculation.trees.growth import Tree
from dspark.evaluation.proof.case import Case, control
from dspark.evaluation.proof.pairs import telling_pair
from dspark.evaluation.proof.trees import (
    RATES,
    DrawnTree,
    FloatArray,
    IntArray,
    Size,
    TreeWorld,
    farthest_of_worlds,
    of_schedules,
    place_of,
)
from dspark.evaluation.proof.worlds import Prefix
from dspark.scheduling.survival import confidence

SIZES = {1: ((3, 2, 4), (2, 3, 5)), 2: ((2, 2, 3), (2, 2, 4))}
"""As of the other trees."""
ROWS, CHILDREN = 2, 2


@dataclass
class LevelWorld(TreeWorld):
    """One round of one request whose drafter runs once per level.

    Attributes:
        peeking: survivals have seen the token that they judge (a wrong variant).
    """

    peeking: bool = False

    def drawn(self) -> list[DrawnTree]:
        """Every tree that can be drawn."""
        found = defaultdict[Tree, float](float)

        def visit(levels: tuple[IntArray, ...], chance: float) -> None:
            growth, prefixes = self._grown(levels)
            if not prefixes:
                found[growth.done()] += chance
                return
            rows = [list(self._draws(prefix)) for prefix in prefixes]
            for draws in product(*rows):
                uniforms_PB = np.array([uniforms for uniforms, _, _ in draws])
                laws_PC = np.stack([self._law_of(prefix) for prefix in prefixes])
                columns_PB = level_growth.draw_children(laws_PC, uniforms_PB)
                assert columns_PB.tolist() == [columns for _, columns, _ in draws]
                share = float(np.prod([share for _, _, share in draws]))
                visit((*levels, columns_PB), chance * share)

        visit((), 1.0)
        return [DrawnTree(tree, chance, (1.0,) * len(tree)) for tree, chance in found.items()]

    def _grown(
        self, levels: Sequence[IntArray]
    ) -> tuple[level_growth.LevelGrowth, Sequence[Prefix]]:
        """The tree after these levels of draws, and the paths with rows in the next."""
        depth = self.pair.block_size
        growth, prefixes = level_growth.LevelGrowth(self.nodes, ROWS, depth), [Prefix()]
        for columns_PB in levels:
            above_P = growth.reached
            confidence_P = np.array([self._confidence(prefix) for prefix in prefixes])
            survival_PB = level_growth.drawn_survivals(above_P, confidence_P, RATES, CHILDREN)
            if self.peeking:
                laws_PC = np.stack([self._law_of(prefix) for prefix in prefixes])
                survival_PB = above_P[:, None] * np.take_along_axis(laws_PC, columns_PB, 1)
            survival_PB[columns_PB < 0] = -1.0
            nodes = growth.add(survival_PB, columns_PB, columns_PB)
            prefixes = [(*prefixes[row], token) for row, token in nodes]
        return growth, prefixes

    def _draws(self, prefix: Prefix) -> Iterator[tuple[list[float], list[int], float]]:
        """Numbers that draw each sequence of children, its columns, and its chance."""

        def longer(
            law_C: FloatArray, uniforms: list[float], columns: list[int], chance: float
        ) -> Iterator[tuple[list[float], list[int], float]]:
            if len(columns) == CHILDREN:
                yield uniforms, columns, chance
                return
            law_C = law_C / law_C.sum()
            for column in np.flatnonzero(law_C).tolist():
                middle = float(law_C[:column].sum() + law_C[column] / 2)
                left_C = law_C.copy()
                left_C[column] = 0.0
                share = chance * float(law_C[column])
                yield from longer(left_C, [*uniforms, middle], [*columns, column], share)

        yield from longer(self._law_of(prefix), [], [], 1.0)

    def _law_of(self, prefix: Prefix) -> FloatArray:
        """What a draft after this path is drawn from."""
        law_V = self.pair(()).draft[len(prefix)][place_of(prefix, self.pair.vocab_size)]
        law: FloatArray = law_V.numpy()
        return law

    def _confidence(self, prefix: Prefix) -> float:
        logits = self.pair(()).logits[len(prefix)]
        return float(confidence(float(logits[place_of(prefix, self.pair.vocab_size)])))

    def law_after(self, tree: Tree, node: int) -> FloatArray:
        """What the children of a node are drawn from; -1 is the anchor."""
        return self._law_of(tree.paths()[node + 1])


def level_tree_cases(seed: int = 0) -> Iterator[Case]:
    """Every schedule with one and two requests, and what must fail."""
    yield from of_schedules("tree by levels", _requests, SIZES, seed)
    found = [
        farthest_of_worlds(partial(_requests, 1, (3, 2, 3), peeking=peeking), seed)
        for peeking in (True, False)
    ]
    yield control("tree by levels: survivals by q of the node's own token", *found)


def _requests(count: int, size: Size, seed: int, *, peeking: bool = False) -> list[LevelWorld]:
    vocab_size, block_size, nodes = size
    return [
        LevelWorld(
            telling_pair(2 * seed + r, vocab_size, block_size, "rnn", 0, tied=False),
            nodes,
            peeking=peeking,
        )
        for r in range(count)
    ]
