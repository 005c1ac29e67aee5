"""Interpolation and intervals, against slow and obvious references."""

from itertools import pairwise

import numpy as np
import pytest

from dspark.evaluation.load.report import best_at, matched, median_interval, spread

LINE = [(40.0, 40.0), (30.0, 60.0), (10.0, 80.0)]  # one user, two, eight


@pytest.mark.parametrize(
    ("floor", "throughput"),
    [(41, None), (40, 40), (35, 50), (30, 60), (20, 70), (10, 80), (1, 80)],
)
def test_throughput_at_a_floor(floor, throughput):
    assert best_at(LINE, floor) == throughput


@pytest.mark.parametrize(
    ("throughput", "speed"), [(39, None), (40, 40), (50, 35), (60, 30), (75, 15), (81, None)]
)
def test_speed_at_matched_throughput(throughput, speed):
    assert matched(LINE, throughput) == speed


def test_a_frontier_of_one_point_says_only_that():
    assert best_at([(5.0, 9.0)], 5.0) == 9.0
    assert best_at([(5.0, 9.0)], 5.1) is None
    assert matched([(5.0, 9.0)], 9.0) == 5.0
    assert matched([(5.0, 9.0)], 8.0) is None


def test_where_throughput_falls_with_more_users_the_better_point_counts():
    bent = [(40.0, 40.0), (20.0, 60.0), (10.0, 50.0)]
    assert best_at(bent, 10) == 60
    assert best_at(bent, 15) == 60
    assert matched(bent, 50) == 30  # and not 10


def test_any_line_agrees_with_many_points_on_it():
    random = np.random.default_rng(3)
    for _ in range(20):
        line = [tuple(point) for point in random.uniform(1, 9, (5, 2))]
        shares = np.linspace(0, 1, 2001)[:, None]
        dense = np.concatenate(
            [np.array(a) * (1 - shares) + np.array(b) * shares for a, b in pairwise(line)]
        )
        floor = random.uniform(2, 8)
        found = best_at(line, floor)
        reach = dense[dense[:, 0] >= floor]
        assert (found is None) == (len(reach) == 0)
        if found is not None:
            assert found == pytest.approx(reach[:, 1].max(), abs=0.02)
        there = dense[np.abs(dense[:, 1] - floor) < 0.003]
        speed = matched(line, floor)
        assert (speed is None) == (len(there) == 0)
        if speed is not None:
            assert speed == pytest.approx(there[:, 0].max(), abs=0.3)


def test_intervals_of_medians():
    assert median_interval([3.0]) is None
    assert median_interval([2.0, 2.0, 2.0]) == (2.0, 2.0)
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    low, high = median_interval(values)
    assert (low, high) == (1.0, 5.0)
    assert median_interval(values) == (low, high)  # nothing is left to chance
    wide = median_interval(list(np.linspace(1, 5, 101)))
    assert 2.0 < wide[0] < 3.0 < wide[1] < 4.0


def test_intervals_cover_the_true_median():
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        low, high = median_interval(random.normal(7, 2, 15).tolist())
        covered += low <= 7 <= high
    assert covered / 200 > 0.9


def test_floors_lie_between_what_was_measured():
    assert spread([10.0, 70.0, 40.0], 5) == [20.0, 30.0, 40.0, 50.0, 60.0]
