"""Cases about draft trees: every tree that can be drawn, every path that can stay.

The drafter's lattice, the growth of trees, their judgement and the schedules that prune them are
the production code. A place of a tree is chosen before its token is drawn, so a tree is enumerated
node by node: grown with one uniform number more, its new node's place is known, and every token
that can come there is drawn in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial, reduce
from itertools import product

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dspark.engine.speculation.trees import growth
from dspark.evaluation.proof import schedules
from dspark.evaluation.proof.case import Case, control, exact
from dspark.evaluation.proof.coupled_trees import coupled_tree_cases
from dspark.evaluation.proof.pairs import SmallPair, telling_pair
from dspark.evaluation.proof.worlds import Distance, Prefix
from dspark.sampling import recursive_rejection
from dspark.scheduling import budget as admission
from dspark.scheduling import survival as chances

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
RATES = (0.5, 0.4)
SIZES = {1: ((3, 2, 4), (2, 3, 5)), 2: ((2, 2, 3), (3, 2, 2))}
"""(V, K, M): vocabulary, depth and nodes of one request's round, and of two requests'."""
WORLDS = 3

Size = tuple[int, int, int]
Prune = Callable[[FloatArray, FloatArray], IntArray]
"""(survivals [R, M], draft probabilities of the tokens drawn [R, M]) -> nodes to verify [R]"""
Make = Callable[[int, Size, int], "Sequence[TreeWorld]"]
"""(number of requests, their size, seed) -> requests"""


@dataclass(frozen=True)
class DrawnTree:
    """A tree that can be drawn.

    Attributes:
        tree: as it has grown.
        chance: of drawing it.
        drawn_M: the probability that each node's token had.
    """

    tree: growth.Tree
    chance: float
    drawn_M: tuple[float, ...]


@dataclass
class TreeWorld:
    """One round of one request whose drafter drafts trees.

    Attributes:
        pair: target and drafter.
        nodes: of a tree, M.
        replaced: draw children as if those before them were still there (a wrong variant).
    """

    pair: SmallPair
    nodes: int
    replaced: bool = False

    @cached_property
    def target(self) -> tuple[Tensor, ...]:
        """The target's distributions at every depth."""
        return self.pair(()).target

    @cached_property
    def law_KPC(self) -> FloatArray:
        """What children are drawn from, by slot and by the token before."""
        return self.pair.lattice(()).law_KPC

    def drawn(self) -> list[DrawnTree]:
        """Every tree that can be drawn."""
        found, count = [DrawnTree(growth.Tree(), 1.0, ())], self.nodes
        for _ in range(count):
            found = [longer for shorter in found for longer in self._longer(shorter)]
        return found

    def _longer(self, shorter: DrawnTree) -> Iterator[DrawnTree]:
        uniforms = self._uniforms(shorter.tree)
        grown = self._grow([*uniforms, 0.5])
        if len(grown) == len(shorter.tree):  # it cannot grow
            yield shorter
            return
        law_C = self._law(grown, len(grown) - 1)
        for column in np.flatnonzero(law_C):
            middle = float(law_C[:column].sum() + law_C[column] / 2)
            tree = self._grow([*uniforms, middle])
            if self.replaced:
                tree = _with_column(tree, int(column))
            assert tree.columns[-1] == column, "drawn by the inverse distribution function"
            share = float(law_C[column])
            yield DrawnTree(tree, shorter.chance * share, (*shorter.drawn_M, share))

    def _grow(self, uniforms: Sequence[float]) -> growth.Tree:
        lattice = self.pair.lattice(())
        return growth.grow_drawn(
            lattice.tokens_KC,
            lattice.rows_KC,
            lattice.law_KPC,
            chances.confidence(lattice.logits_KP),
            RATES,
            uniforms,
            self.pair.block_size,
        )

    def _uniforms(self, tree: growth.Tree) -> list[float]:
        """Numbers that draw this tree again."""
        found = []
        for node, column in enumerate(tree.columns):
            law_C = self._law(tree, node, replaced=False)
            found.append(float(law_C[:column].sum() + law_C[column] / 2))
        return found

    def _law(self, tree: growth.Tree, node: int, *, replaced: bool | None = None) -> FloatArray:
        """What a node's token is drawn from, given the nodes before it."""
        parent = tree.parents[node]
        law_C: FloatArray = self.law_after(tree, parent).copy()
        if not (self.replaced if replaced is None else replaced):
            before = [c for n, c in enumerate(tree.columns[:node]) if tree.parents[n] == parent]
            law_C[before] = 0.0
        whole: FloatArray = law_C / law_C.sum()
        return whole

    def output(self, tree: growth.Tree) -> Tensor:
        """The distribution of the next K + 1 tokens where this tree is verified, [V**(K + 1)]."""
        children = tree.children()
        paths = tree.paths()
        total = torch.zeros(self.pair.vocab_size ** (self.pair.block_size + 1)).double()

        def visit(node: int, chance: float) -> None:
            own, prefix = children[node + 1], paths[node + 1]
            p_1V = self._after(prefix)[None]
            if not own:
                self._emit(total, prefix, chance * p_1V[0])
                return
            q_1V = torch.from_numpy(self.law_after(tree, node))[None]
            columns_1B = torch.tensor([[tree.columns[child] for child in own]])
            keep_1B, left_1V = recursive_rejection.judge(p_1V, p_1V.new_zeros(1), q_1V, columns_1B)
            for child, keep in zip(own, keep_1B[0].tolist(), strict=True):
                if keep > 0:
                    visit(child, chance * keep)
                chance *= 1 - keep
            if chance > 0:
                self._emit(total, prefix, chance * left_1V[0] / left_1V.sum())

        visit(-1, 1.0)
        return total

    def law_after(self, tree: growth.Tree, node: int) -> FloatArray:
        """What the children of a node are drawn from; -1 is the anchor."""
        slot, row = (0, 0) if node < 0 else (tree.depths[node], tree.rows[node])
        law_C: FloatArray = self.law_KPC[slot, row]
        return law_C

    def _after(self, prefix: Prefix) -> Tensor:
        return self.target[len(prefix)][place_of(prefix, self.pair.vocab_size)]

    def _emit(self, total: Tensor, prefix: Prefix, law_V: Tensor) -> None:
        """Add outputs that begin with a prefix and a token of this law, and go on plainly."""
        for token, chance in enumerate(law_V.tolist()):
            if chance > 0:
                begin = (*prefix, token)
                rest = self._rest(begin)
                place = place_of(begin, self.pair.vocab_size) * len(rest)
                total[place : place + len(rest)] += chance * rest

    def _rest(self, prefix: Prefix) -> Tensor:
        """The distribution of the tokens after a prefix in plain decoding."""
        if len(prefix) > self.pair.block_size:
            return torch.ones(1, dtype=torch.float64)
        law_V = self._after(prefix).tolist()
        return torch.cat([p * self._rest((*prefix, token)) for token, p in enumerate(law_V)])


def place_of(prefix: Prefix, vocab_size: int) -> int:
    """The number of a prefix among those of its length."""
    return reduce(lambda n, token: n * vocab_size + token, prefix, 0)


def _with_column(tree: growth.Tree, column: int) -> growth.Tree:
    """The tree with another last node; candidates are tokens here, and all of them have rows."""
    row = column if tree.rows[-1] >= 0 else -1
    return growth.Tree(
        (*tree.tokens[:-1], column),
        tree.parents,
        tree.depths,
        (*tree.rows[:-1], row),
        (*tree.columns[:-1], column),
        tree.survival,
    )


def measure(requests: Sequence[TreeWorld], prune: Prune) -> tuple[Distance, int]:
    """How far the output of requests that share a schedule is from plain decoding's.

    Returns:
        The distance, and how many different numbers of nodes the schedule has chosen.
    """
    choices = [world.drawn() for world in requests]
    known: dict[tuple[int, growth.Tree], Tensor] = {}
    most = max(world.nodes for world in requests)
    size = [world.pair.vocab_size ** (world.pair.block_size + 1) for world in requests]
    total, seen = torch.zeros(size, dtype=torch.float64), set[tuple[int, ...]]()
    for everyone in product(*choices):
        survival_RM, drawn_RM = np.zeros((2, len(everyone), most))
        for r, each in enumerate(everyone):
            survival_RM[r, : len(each.tree)] = each.tree.survival
            drawn_RM[r, : len(each.tree)] = each.drawn_M
        counts = tuple(map(int, prune(survival_RM, drawn_RM)))
        seen.add(counts)
        law = torch.ones(1, dtype=torch.float64)
        for r, (each, count) in enumerate(zip(everyone, counts, strict=True)):
            tree = each.tree.first(count)
            if (r, tree) not in known:
                known[r, tree] = requests[r].output(tree)
            law = torch.tensordot(law, each.chance * known[r, tree], dims=0)
        total += law.view(size)
    targets = [world._rest(()) for world in requests]
    return Distance.of(total, targets), len(seen)


def tree_cases(seed: int = 0) -> Iterator[Case]:
    """Every schedule with one and two requests, `coupled`, and what must fail."""
    yield from of_schedules("tree", _requests, SIZES, seed)
    yield from coupled_tree_cases(seed)
    yield _own_score(seed)
    yield _replaced(seed)


def _requests(count: int, size: Size, seed: int, **options: bool) -> list[TreeWorld]:
    vocab_size, block_size, nodes = size
    return [
        TreeWorld(
            telling_pair(2 * seed + r, vocab_size, block_size, "vanilla", 0, tied=False),
            nodes,
            **options,
        )
        for r in range(count)
    ]


def of_schedules(
    kind: str, make: Make, sizes: Mapping[int, Sequence[Size]], seed: int
) -> Iterator[Case]:
    """Every schedule with one and two requests.

    Args:
        kind: of trees.
        make: so many requests of a size.
        sizes: by number of requests.
        seed: of the worlds.
    """
    for count, name in product((1, 2), ("fixed", "filled budget", "prefix")):
        found, most = [], 0
        for size, world in product(sizes[count], range(count)):
            requests, nodes = make(count, size, seed + 50 * world), size[2] * count
            own = prunings(name, nodes)
            if name == "prefix":
                own.append(_by_prefix(_telling_costs(requests)))
            for prune in own:
                distance, seen = measure(requests, prune)
                found.append(distance)
                most = max(most, seen)
        number = "one request" if count == 1 else "two requests"
        # A budget is always spent by a request alone; all else must have decided something.
        idle = name == "fixed" or (name, count) == ("filled budget", 1)
        holds = idle or most > 1
        yield exact(f"{kind} / {name} / {number}", Distance.farthest(found), holds=holds)


def _telling_costs(requests: Sequence[TreeWorld]) -> FloatArray:
    """Step costs under which a node pays in some trees and in others not."""
    trees = product(*(world.drawn() for world in requests))
    survivals = [np.concatenate([each.tree.survival for each in everyone]) for everyone in trees]
    return schedules.costs_between(survivals, len(requests))


def _by_prefix(step_ms: FloatArray) -> Prune:
    return lambda survival_RM, _: admission.prefix_lengths(survival_RM, step_ms)


def _by_budget(budget: int) -> Prune:
    return lambda survival_RM, _: admission.fill_budget(survival_RM, budget)


def prunings(name: str, nodes: int) -> list[Prune]:
    """A schedule under several settings."""
    if name == "fixed":
        return [lambda survival_RM, _: admission.fixed_lengths(*survival_RM.shape)]
    if name == "filled budget":
        return [_by_budget(budget) for budget in range(1, nodes)]
    return [_by_prefix(step_ms) for step_ms in schedules.step_costs(nodes).values()]


def _own_score(seed: int) -> Case:
    """Nodes are verified up to the first whose own token was unlikely."""

    def by_token(_survival_RM: FloatArray, drawn_RM: FloatArray) -> IntArray:
        return admission.threshold_lengths(drawn_RM, 0.3)

    wrong, right = [], []
    for s in range(seed, seed + WORLDS):
        requests = _requests(1, (3, 2, 3), s)
        wrong.append(measure(requests, by_token)[0])
        right.append(measure(requests, prunings("fixed", 3)[0])[0])
    name = "tree: nodes scored by q of their own token"
    return control(name, Distance.farthest(wrong), Distance.farthest(right))


def farthest_of_worlds(requests_of: Callable[[int], Sequence[TreeWorld]], seed: int) -> Distance:
    """How far whole trees of the requests of some seeds are from plain decoding at most."""
    [prune, *_] = prunings("fixed", 3)
    return Distance.farthest(
        [measure(requests_of(s), prune)[0] for s in range(seed, seed + WORLDS)]
    )


def _replaced(seed: int) -> Case:
    """Children are drawn with replacement, but judged as if they had been drawn without."""
    found = [
        farthest_of_worlds(partial(_requests, 1, (3, 2, 3), replaced=replaced), seed)
        for replaced in (True, False)
    ]
    return control("tree: children drawn with replacement, judged without", *found)
