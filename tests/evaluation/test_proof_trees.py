"""The proof's cases about trees: all as they must be, and they notice what breaks."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from dspark.engine.speculation.trees import level_growth
from dspark.evaluation.proof import level_trees, trees
from dspark.evaluation.proof.worlds import total_variation
from dspark.sampling import recursive_rejection
from dspark.sampling.recursive_rejection import Judged


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def test_every_case_passes():
    cases = [*trees.tree_cases(), *level_trees.level_tree_cases()]
    assert [case.name for case in cases if not case.passed] == []
    assert {case.expected for case in cases} == {"exact", "biased"}


def test_chances_of_all_trees_sum_to_one_and_no_two_are_the_same():
    for size in trees.SIZES[1]:
        [world] = trees._requests(1, size, 0)
        drawn = world.drawn()
        assert sum(each.chance for each in drawn) == pytest.approx(1, abs=1e-12)
        assert len({each.tree for each in drawn}) == len(drawn)
        assert any(len(own) > 1 for each in drawn for own in each.tree.children())


def test_draws_that_are_not_in_the_tree_are_enumerated_too():
    for size in level_trees.SIZES[1]:
        [world] = level_trees._requests(1, size, 0)
        drawn = world.drawn()
        assert sum(each.chance for each in drawn) == pytest.approx(1, abs=1e-12)
        assert all(len(each.tree) == world.nodes for each in drawn)
        everything = level_growth.LevelGrowth(99, level_trees.ROWS, world.pair.block_size)
        columns = np.array([[0, 1]])
        while len(everything.reached):
            rows = len(everything.reached)
            everything.add(
                np.full((rows, 2), 0.1), columns.repeat(rows, 0), columns.repeat(rows, 0)
            )
        assert len(everything.done()) > world.nodes


def test_an_output_without_a_tree_is_plain_decodings_by_hand():
    [world] = trees._requests(1, (2, 2, 3), 0)
    law = world.output(world.drawn()[0].tree.first(0))
    by_hand = [
        float(world.target[0][0, a] * world.target[1][a, b] * world.target[2][2 * a + b, c])
        for a, b, c in product(range(2), repeat=3)
    ]
    assert total_variation(law, torch.tensor(by_hand, dtype=torch.float64)) < 1e-15


@pytest.mark.parametrize("part", ["keep", "left"])
def test_a_wrong_judgement_is_noticed(monkeypatch, part):
    judge = recursive_rejection.judge

    def wrong(p_NC, rest_N, q_NC, children_NB):
        keep_NB, left_NC = judge(p_NC, rest_N, q_NC, children_NB)
        return Judged(0.9 * keep_NB, left_NC) if part == "keep" else Judged(keep_NB, p_NC)

    monkeypatch.setattr(recursive_rejection, "judge", wrong)
    requests = trees._requests(1, (3, 2, 3), 0)
    distance, _ = trees.measure(requests, trees.prunings("fixed", 3)[0])
    assert distance.largest > 1e-3
