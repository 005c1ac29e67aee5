"""Growth of trees: the best nodes first, against a slow search through all of them."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from dspark.engine.speculation.trees.growth import (
    ChildRates,
    Tree,
    grow_drawn,
    grow_ranked,
    rows_of_columns,
)

SLOTS, WIDTH = 3, 4


def lattice(seed):
    generator = np.random.default_rng(seed)
    law = generator.dirichlet(np.ones(WIDTH), size=(SLOTS, WIDTH))
    tokens = np.arange(SLOTS * WIDTH).reshape(SLOTS, WIDTH)
    parents = np.tile(np.arange(WIDTH), (SLOTS, 1))
    return law, tokens, rows_of_columns(parents, WIDTH)


def is_tree(tree):
    return (
        all(parent < node for node, parent in enumerate(tree.parents))
        and len(set(tree.paths())) == len(tree) + 1
    )


@pytest.mark.parametrize("seed", range(4))
def test_ranked_nodes_are_the_likeliest_of_all_paths(seed):
    law, tokens, rows = lattice(seed)
    order = np.argsort(-law, axis=-1)
    tree = grow_ranked(tokens, rows, order, np.take_along_axis(law, order, -1), 12, SLOTS)
    every = {}
    for depth in range(1, SLOTS + 1):
        for path in product(range(WIDTH), repeat=depth):
            steps = zip(range(depth), (0, *path), path, strict=False)
            every[path] = float(np.prod([law[k, before, own] for k, before, own in steps]))
    best = sorted(every.values(), reverse=True)[:12]
    assert tree.survival == pytest.approx(best)
    for path, survival in zip(tree.paths()[1:], tree.survival, strict=True):
        assert every[tuple(token % WIDTH for token in path)] == pytest.approx(survival)
    assert is_tree(tree)


def test_drawn_trees_never_rise_and_draw_without_replacement():
    for seed in range(8):
        law, tokens, rows = lattice(seed)
        generator = np.random.default_rng(seed)
        confidence, uniforms = generator.random((SLOTS, WIDTH)), generator.random(14)
        tree = grow_drawn(tokens, rows, law, confidence, (0.4, 0.3), uniforms.tolist(), SLOTS)
        assert len(tree) == 14
        assert is_tree(tree)
        assert all(a >= b for a, b in zip(tree.survival, tree.survival[1:], strict=False))
        assert tree.survival[0] == confidence[0, 0]
        assert is_tree(tree.first(5))
        assert tree.first(5).survival == tree.survival[:5]


def test_a_law_of_one_token_grows_a_chain():
    law, tokens, rows = lattice(0)
    law = np.eye(WIDTH)[np.argmax(law, axis=-1)]
    tree = grow_drawn(tokens, rows, law, np.full((SLOTS, WIDTH), 0.9), (0.5,), [0.3] * 9, SLOTS)
    assert tree.parents == (-1, 0, 1)
    assert tree.survival == pytest.approx([0.9, 0.81, 0.729])


def test_candidates_without_a_row_have_no_children():
    law, tokens, _ = lattice(1)
    rows = rows_of_columns(np.array([[0], [2], [1]]), WIDTH)
    assert rows.tolist() == [[-1, -1, 0, -1], [-1, 0, -1, -1], [-1] * 4]
    order = np.argsort(-law, axis=-1)
    chances = np.take_along_axis(law, order, -1)
    tree = grow_ranked(tokens, rows, order[:, :1], chances[:, :1], 30, SLOTS)
    assert {tree.columns[p] for p in tree.parents if p >= 0 and tree.depths[p] == 1} <= {2}


def test_rates_count_the_children_that_were_tested():
    rates = ChildRates()
    before = rates.values
    tree = Tree((7, 8, 9, 7), (-1, -1, -1, 1), (1, 1, 1, 2), (0,) * 4, (0,) * 4, (0.5,) * 4)
    for _ in range(200):
        rates.learn(tree, [1, 3])  # the second child stayed; the third was never tested
    assert rates.values[0] > 0.85 > before[0]
    assert rates.values[1:] == before[1:]
    calibrated = ChildRates((0.4, 0.1, 0.3))
    assert calibrated.values == pytest.approx([0.4, 0.1, 0.3])
    calibrated.learn(tree, [1, 3])
    assert calibrated.values[0] == pytest.approx(0.4 * 40 / 41 + 1 / 41, rel=1e-3)
    assert tree.reach([1, 3]) == 2
    assert tree.reach([1]) == 2
    assert tree.reach([]) == 1
    assert tree.reach([2]) == 1
