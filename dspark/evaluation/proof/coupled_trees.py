"""Cases about draft trees under `coupled`: any tree is lawful, token for token.

A draft stays while it is the target's own token, so a tree may be grown and pruned by anything, the
noise included. Two requests share a budget; the control keys noise by a node's number in place of
its depth.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from dspark.engine.speculation.trees import growth
from dspark.evaluation.proof.case import Case, control, exact
from dspark.evaluation.proof.pairs import SmallPair, telling_pair
from dspark.evaluation.proof.worlds import Distance, Prefix
from dspark.sampling import verification
from dspark.sampling.distribution import Dense
from dspark.sampling.noise import gumbel, seed_tensor
from dspark.scheduling import budget as admission

SEEDS, TOKENS, NODES, BUDGET = 48, 5, 6, 9


def coupled_tree_cases(seed: int = 0) -> Iterator[Case]:
    """Against plain decoding, and a key that breaks the identity."""
    pairs = [telling_pair(2 * seed + r, 2, 3, "vanilla", TOKENS + 4, tied=False) for r in (0, 1)]
    for name, indexed in (("exact", False), ("positions by index", True)):
        different = []
        for first in range(seed, seed + 2 * SEEDS, 2):
            ours = _speculative(pairs, first, indexed=indexed)
            theirs = [_plain(pair, first + r) for r, pair in enumerate(pairs)]
            different.append([a != b for a, b in zip(ours, theirs, strict=True)])
        shares = np.array(different)
        distance = Distance(float(shares.mean(axis=0).max()), float(shares.any(axis=1).mean()))
        if indexed:
            yield control(f"tree: coupled, {name}", distance)
        else:
            yield exact("tree / coupled / filled budget / two requests", distance)


def _plain(pair: SmallPair, seed: int) -> Prefix:
    tokens: Prefix = ()
    while len(tokens) < TOKENS:
        law_1V = Dense.of(pair(tokens).target[0])
        tokens += (_own_token(law_1V, seed, len(tokens)),)
    return tokens


def _own_token(law_1V: Dense, seed: int, position: int) -> int:
    return int(verification.coupled_tokens(law_1V, seed_tensor([seed]), torch.tensor([position])))


def _speculative(pairs: Sequence[SmallPair], first: int, *, indexed: bool) -> list[Prefix]:
    outputs: list[Prefix] = [()] * len(pairs)
    while min(map(len, outputs)) < TOKENS:
        trees = [
            _ranked(pair, done, first + r)
            for r, (pair, done) in enumerate(zip(pairs, outputs, strict=True))
        ]
        survival_RM = np.array([tree.survival for tree in trees])
        for r, count in enumerate(admission.fill_budget(survival_RM, BUDGET).tolist()):
            tree, done = trees[r].first(count), outputs[r]
            outputs[r] = (*done, *_kept(pairs[r], done, tree, first + r, indexed=indexed))[:TOKENS]
    return outputs


def _ranked(pair: SmallPair, done: Prefix, seed: int) -> growth.Tree:
    lattice = pair.lattice(done)
    slots, _, width = lattice.law_KPC.shape
    positions_K = torch.arange(slots) + len(done)
    noise_KC = gumbel(seed_tensor([seed] * slots), positions_K, torch.from_numpy(lattice.tokens_KC))
    scores_KPC = torch.from_numpy(lattice.law_KPC).log() + noise_KC[:, None]
    best = scores_KPC.softmax(-1).topk(width, dim=-1)
    places = lattice.tokens_KC, lattice.rows_KC, best.indices.numpy(), best.values.numpy()
    return growth.grow_ranked(*places, nodes=NODES, depth=slots)


def _kept(
    pair: SmallPair, done: Prefix, tree: growth.Tree, seed: int, *, indexed: bool
) -> list[int]:
    """The target's own tokens along the tree, and the one behind it."""
    children, node, found = tree.children(), -1, list[int]()
    while True:
        law_1V = Dense.of(pair((*done, *found)).target[0])
        place = node + 1 if indexed else len(found)
        found.append(_own_token(law_1V, seed, len(done) + place))
        stays = [child for child in children[node + 1] if tree.tokens[child] == found[-1]]
        if not stays:
            return found
        [node] = stays
