from __future__ import annotations

import numpy as np
import pytest

from dspark.errors import NumericsError, UsageError
from dspark.scheduling.budget import best_budget, fill_budget, prefix_lengths
from dspark.scheduling.lookahead import expected_survival, lookahead_lengths

STEP_MS = [1.0, 2.0, 2.0, 2.0, 2.0]


def a_case(seed):
    generator = np.random.default_rng(seed)
    survival = np.multiply.accumulate(generator.random((5, 4)) ** 0.3, axis=1)
    earlier = np.multiply.accumulate(generator.random((5, 4)) ** 0.3, axis=1)
    step_ms = 4 + np.cumsum(generator.choice([0.0, 1.0], 21, p=[0.8, 0.2]))
    return survival, earlier, step_ms, generator.integers(0, 5, 5)


def test_expected_survivals_start_as_now_and_fall_as_before():
    expected = expected_survival([[0.8, 0.1], [0.5, 0.5]], [[0.4, 0.2], [0.0, 0.0]])
    assert expected == pytest.approx(np.array([[0.8, 0.4], [0.5, 0.0]]))
    with pytest.raises(UsageError, match="shape"):
        expected_survival([[0.5]], [[0.5, 0.4]])


@pytest.mark.parametrize("seed", range(20))
def test_lengths_are_the_expected_best_budget_filled(seed):
    survival, earlier, step_ms, limits = a_case(seed)
    expected = [
        [s[0] * e / rest[0] for e in rest] for s, rest in zip(survival, earlier, strict=True)
    ]
    budget = best_budget(expected, step_ms, limits, margin=0.01)
    got = lookahead_lengths(survival, earlier, step_ms, limits, margin=0.01)
    assert got.tolist() == fill_budget(survival, budget, limits).tolist()


@pytest.mark.parametrize("seed", range(20))
def test_the_budget_knows_no_draft_token(seed):
    """Confidences behind the first of each request may change: the number of drafts may not."""
    survival, earlier, step_ms, limits = a_case(seed)
    changed = a_case(seed + 100)[0]
    changed = changed / changed[:, :1] * survival[:, :1]
    lengths = lookahead_lengths(survival, earlier, step_ms, limits)
    assert lookahead_lengths(changed, earlier, step_ms, limits).sum() == lengths.sum()


def test_it_walks_over_a_stair_where_algorithm_1_stops():
    survival = [[0.9, 0.8, 0.7, 0.6]]
    assert prefix_lengths(survival, STEP_MS).tolist() == [0]
    assert lookahead_lengths(survival, survival, STEP_MS).tolist() == [4]
    assert lookahead_lengths([[0.3, 0.2, 0.1, 0.1]], survival, STEP_MS).tolist() == [0]


def test_nan_is_refused():
    with pytest.raises(NumericsError, match="request 0"):
        lookahead_lengths([[float("nan"), 0.1]], [[0.5, 0.4]], STEP_MS)
