"""Draft trees of a recorded evaluation: which node of a tree each further token would have been.

A tree in the order of its growth is verified up to some node, so a record of whole trees says what
any smaller budget would have kept. A tree whose anchor lies within a recorded path is what that one
grew behind it: it has fewer nodes than the engine would have grown there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dspark.evaluation.records import TreeRound
from dspark.simulation.traffic import FloatArray, IntArray

_NEVER = 1 << 30  # number of a node that no tree has


@dataclass(frozen=True)
class TreeStream:
    """An answer's trees, one behind each of its T tokens.

    Attributes:
        first_T: whether each token was the first child of the node before it, as a chain has it.
        path_TK: number of the node that each of the next K tokens is; a huge one for none.
        survival_TM: of the nodes, 0 behind the last.
    """

    first_T: npt.NDArray[np.bool_]
    path_TK: IntArray
    survival_TM: FloatArray


@dataclass(frozen=True)
class Trees:
    """Trees of many answers, in the order of `Acceptance`'s tokens; arrays as in `TreeStream`."""

    path_TK: IntArray
    survival_TM: FloatArray

    @property
    def nodes(self) -> int:
        """Of a tree at most, M."""
        return int(self.survival_TM.shape[1])

    @classmethod
    def of(cls, streams: Sequence[TreeStream], num_drafts: int) -> Trees:
        """Join streams."""
        nodes = max(stream.survival_TM.shape[1] for stream in streams)
        survivals = [
            np.pad(s.survival_TM, ((0, 0), (0, nodes - s.survival_TM.shape[1]))) for s in streams
        ]
        paths = [stream.path_TK[:, :num_drafts] for stream in streams]
        return cls(np.concatenate(paths), np.concatenate(survivals))

    def kept(self, places_R: IntArray, lengths_R: Sequence[int]) -> list[int]:
        """Drafts that stay of trees of which so many nodes are verified."""
        stays_RK = self.path_TK[places_R] < np.asarray(lengths_R)[:, None]
        found: list[int] = stays_RK.sum(axis=1).tolist()
        return found


def first_children(parents: Sequence[int]) -> list[int]:
    """The chain of a tree: the anchor's first child, its first child, and so on."""
    chain, end = list[int](), -1
    for node, parent in enumerate(parents):
        if parent == end:
            chain.append(node)
            end = node
    return chain


def trees_behind(rounds: Sequence[TreeRound], num_drafts: int) -> TreeStream:
    """The trees behind each token of an answer.

    Args:
        rounds: one after the other; each ends with a token that no node of its tree was.
        num_drafts: K, how deep a tree is at most.
    """
    nodes = max((len(each.parents) for each in rounds), default=0)
    first, paths, survivals = list[bool](), list[IntArray](), list[FloatArray]()
    for each in rounds:
        children = {parent: node for node, parent in reversed(list(enumerate(each.parents)))}
        before = (-1, *each.path)
        first += [children[a] == b for a, b in zip(before, each.path, strict=False)]
        first.append(True)  # whether the chain foresees it hangs on what was verified
        for depth, root in enumerate(before):
            path_K, survival_M = _behind(each, root, each.path[depth:], nodes)
            paths.append(np.append(path_K, np.full(num_drafts, _NEVER))[:num_drafts])
            survivals.append(survival_M)
    return TreeStream(np.array(first), np.array(paths), np.array(survivals))


def _behind(
    found: TreeRound, root: int, path: Sequence[int], nodes: int
) -> tuple[IntArray, FloatArray]:
    """The part of a tree behind a node: numbers of the path there, and survivals."""
    numbers = {root: -1}
    survival_M = np.zeros(nodes)
    whole = found.survival[root] if root >= 0 else 1.0
    for node, parent in enumerate(found.parents):
        if parent in numbers:
            number = numbers[node] = len(numbers) - 1
            survival_M[number] = found.survival[node] / max(whole, 1e-9)
    survival_M = np.minimum.accumulate(np.minimum(survival_M, 1.0))
    return np.array([numbers[node] for node in path], dtype=np.int64), survival_M
