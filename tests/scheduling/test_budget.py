from __future__ import annotations

import itertools
import time

import numpy as np
import pytest

from dspark.errors import NumericsError, UsageError
from dspark.scheduling.budget import (
    best_budget,
    drafting_gain,
    fill_budget,
    prefix_lengths,
    survey_depths,
    throughput,
    worth_drafting,
)

SEEDS = range(40)


def slow_order(survival_RK, limits_R):
    """Every draft within limits as (survival, request), sorted by Python."""
    drafts = [
        (-a, k, r) for r, row in enumerate(survival_RK) for k, a in enumerate(row[: limits_R[r]])
    ]
    return [(-minus, r) for minus, _, r in sorted(drafts)]


def slow_prefix(survival_RK, step_ms_N, limits_R):
    """Algorithm 1 as the paper words it."""
    lengths = [0] * len(survival_RK)
    tokens, best = float(len(survival_RK)), len(survival_RK) / step_ms_N[0]
    for n, (a, r) in enumerate(slow_order(survival_RK, limits_R), start=1):
        if a == 0 or n >= len(step_ms_N) or (tokens + a) / step_ms_N[n] <= best:
            break
        tokens += a
        best = tokens / step_ms_N[n]
        lengths[r] += 1
    return lengths


def slow_throughput(survival_RK, lengths_R, step_ms_N):
    gained = sum(sum(row[:length]) for row, length in zip(survival_RK, lengths_R, strict=True))
    return (len(survival_RK) + gained) / step_ms_N[sum(lengths_R)]


def a_case(seed, most_requests=4, most_drafts=4):
    """Survivals with ties, limits and a jagged cost table."""
    generator = np.random.default_rng(seed)
    requests = int(generator.integers(1, most_requests + 1))
    drafts = int(generator.integers(1, most_drafts + 1))
    confidence = generator.integers(0, 5, (requests, drafts)) / 4
    if seed % 2:
        confidence = generator.random((requests, drafts))
    survival = np.multiply.accumulate(confidence, axis=1)
    limits = generator.integers(0, drafts + 1, requests)
    steps = generator.choice([0.0, 0.05, 1.0], requests * drafts + 1, p=[0.5, 0.3, 0.2])
    step_ms = 4 + np.cumsum(steps)[: int(generator.integers(1, requests * drafts + 2))]
    return survival, step_ms, limits


@pytest.mark.parametrize("seed", SEEDS)
def test_prefix_is_algorithm_1(seed):
    survival, step_ms, limits = a_case(seed)
    for most in (limits, np.full_like(limits, survival.shape[1])):
        got = prefix_lengths(survival, step_ms, most)
        assert got.tolist() == slow_prefix(survival.tolist(), step_ms.tolist(), most.tolist())
        assert got.dtype == np.int64
    everything = np.full_like(limits, survival.shape[1])
    assert prefix_lengths(survival, step_ms).tolist() == (
        prefix_lengths(survival, step_ms, everything).tolist()
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_budget_and_filling_are_the_best_of_all_length_vectors(seed):
    survival, step_ms, limits = a_case(seed)
    budget = best_budget(survival, step_ms, limits)
    lengths = fill_budget(survival, budget, limits)
    vectors = itertools.product(*(range(most + 1) for most in limits))
    allowed = [v for v in vectors if sum(v) < len(step_ms)]
    best = max(slow_throughput(survival, v, step_ms) for v in allowed)
    got = throughput(survival, lengths, step_ms[budget])
    assert got == pytest.approx(best, rel=1e-12)
    assert lengths.sum() == budget
    assert (lengths <= limits).all()


@pytest.mark.parametrize("margin", [0.0, 0.1])
@pytest.mark.parametrize("most_requests", [1, 4])
@pytest.mark.parametrize("seed", SEEDS)
def test_depths_are_surveyed_as_blocks_of_each_alone(seed, most_requests, margin):
    survival, verify_ms, limits = a_case(seed, most_requests)
    draft_ms = {depth: 0.7 + 0.2 * depth for depth in range(1, survival.shape[1] + 1)}
    found = survey_depths(survival, verify_ms, draft_ms, limits, margin)
    for depth, spent_ms in draft_ms.items():
        block, steps = survival[:, :depth], verify_ms + spent_ms
        budget = best_budget(block, steps, limits, margin)
        best = best_budget(block, steps, limits)
        highest = throughput(block, fill_budget(block, best, limits), steps[best])
        assert found[depth] == (budget, pytest.approx(highest, rel=1e-12))
    stopped = survey_depths(survival, verify_ms, draft_ms, limits, margin, stops=True)
    for depth, spent_ms in draft_ms.items():
        block, steps = survival[:, :depth], verify_ms + spent_ms
        lengths = prefix_lengths(block, steps, limits)
        promised = throughput(block, lengths, steps[int(lengths.sum())])
        assert stopped[depth] == (found[depth][0], pytest.approx(promised, rel=1e-12))


@pytest.mark.parametrize("seed", SEEDS)
def test_filling_takes_the_first_of_the_sorted_list(seed):
    survival, _, limits = a_case(seed)
    order = slow_order(survival.tolist(), limits.tolist())
    for budget in range(limits.sum() + 3):
        expected = [0] * len(survival)
        for _, r in order[:budget]:
            expected[r] += 1
        assert fill_budget(survival, budget, limits).tolist() == expected


@pytest.mark.parametrize("seed", SEEDS)
def test_with_one_peak_algorithm_1_finds_the_best_budget(seed):
    generator = np.random.default_rng(seed)
    survival = np.multiply.accumulate(generator.random((6, 5)), axis=1)
    step_ms = 3 + 0.02 * np.arange(31) ** 1.3
    lengths = prefix_lengths(survival, step_ms)
    assert lengths.tolist() == fill_budget(survival, best_budget(survival, step_ms)).tolist()


def test_algorithm_1_stops_at_a_stair_and_the_budget_does_not():
    survival = [[0.9, 0.8, 0.7, 0.6]]
    step_ms = [1.0, 2.0, 2.0, 2.0, 2.0]
    assert prefix_lengths(survival, step_ms).tolist() == [0]
    assert best_budget(survival, step_ms) == 4


@pytest.mark.parametrize("seed", SEEDS)
def test_a_length_does_not_see_behind_the_first_draft_that_is_not_admitted(seed):
    """Drafts behind each request's first refused one may hold any survival that is no higher."""
    survival, step_ms, limits = a_case(seed)
    lengths = prefix_lengths(survival, step_ms, limits)
    generator = np.random.default_rng(seed)
    changed = survival.copy()
    for r, length in enumerate(lengths):
        behind = changed[r, length + 1 :]
        if behind.size:
            behind[:] = changed[r, length] * np.multiply.accumulate(generator.random(len(behind)))
    assert prefix_lengths(changed, step_ms, limits).tolist() == lengths.tolist()


def test_ties_break_by_position_then_request():
    survival = [[0.5, 0.5, 0.5], [0.5, 0.5, 0.1], [0.5, 0.5, 0.5]]
    got = [fill_budget(survival, budget).tolist() for budget in range(10)]
    assert got == [
        [0, 0, 0],
        [1, 0, 0],
        [1, 1, 0],
        [1, 1, 1],
        [2, 1, 1],
        [2, 2, 1],
        [2, 2, 2],
        [3, 2, 2],
        [3, 2, 3],
        [3, 3, 3],
    ]


def test_drafts_that_cannot_survive_are_not_admitted_by_algorithm_1():
    falling = [4.0, 3.0, 2.0, 1.0]
    assert prefix_lengths([[1.0, 0.0, 0.0]], falling).tolist() == [1]
    assert prefix_lengths([[1.0, 0.5, 0.25]], falling).tolist() == [3]


def test_never_more_drafts_than_the_table_was_measured_for():
    survival = np.ones((3, 4))
    for measured in range(12):
        step_ms = np.ones(measured + 1)
        assert prefix_lengths(survival, step_ms).sum() == measured
        assert best_budget(survival, step_ms) == measured
        assert best_budget(survival, step_ms, margin=0.5) == measured


def test_a_margin_keeps_the_full_budget_against_small_promises():
    survival, step_ms = [[0.5, 0.1]], [1.0, 1.0, 1.2]
    full, best = 1.6 / 1.2, 1.5
    assert best_budget(survival, step_ms, margin=0.9 * (best / full - 1)) == 1
    assert best_budget(survival, step_ms, margin=1.1 * (best / full - 1)) == 2
    assert best_budget([[0.0, 0.0]], [1.0, 1.0, 1.0]) == 2, "a tie is no promise"


def test_worth_drafting_compares_the_best_budget_with_a_step_without_drafts():
    survival, step_ms = [[0.5, 0.1]], [1.0, 1.0, 1.2]  # 1.5 tokens per ms at best
    assert worth_drafting(survival, step_ms, off_ms=0.67)
    assert not worth_drafting(survival, step_ms, off_ms=0.66)
    assert worth_drafting(survival, step_ms, off_ms=0.66, margin=0.02)
    assert not worth_drafting(survival, step_ms, off_ms=0.67, limits_R=[0])


@pytest.mark.parametrize("seed", SEEDS)
def test_the_gain_of_drafting_is_the_quotient_of_throughputs(seed):
    survival, step_ms, limits = a_case(seed)
    off_ms, plain = 3.5, len(survival) / 3.5
    lengths = fill_budget(survival, best_budget(survival, step_ms, limits), limits)
    best = slow_throughput(survival, lengths, step_ms) / plain
    assert drafting_gain(survival, step_ms, off_ms, limits) == pytest.approx(best)
    assert worth_drafting(survival, step_ms, off_ms, limits) == (best >= 1)
    lengths = prefix_lengths(survival, step_ms, limits)
    stopped = slow_throughput(survival, lengths, step_ms) / plain
    got = drafting_gain(survival, step_ms, off_ms, limits, budget=int(lengths.sum()))
    assert got == pytest.approx(stopped)
    everything = drafting_gain(survival, step_ms, off_ms, limits, budget=1000)
    full = fill_budget(survival, min(len(step_ms) - 1, limits.sum()), limits)
    assert everything == pytest.approx(slow_throughput(survival, full, step_ms) / plain)


def test_no_requests_or_no_drafts():
    nothing = np.zeros((0, 4))
    assert prefix_lengths(nothing, [1.0, 1.0]).tolist() == []
    assert best_budget(nothing, [1.0, 1.0]) == 0
    assert drafting_gain(nothing, [1.0, 1.0], 1.0) == 0
    assert fill_budget(nothing, 5).tolist() == []
    assert prefix_lengths(np.zeros((2, 0)), [1.0]).tolist() == [0, 0]
    assert fill_budget(np.zeros((2, 0)), 5).tolist() == [0, 0]
    assert throughput(np.zeros((2, 0)), [0, 0], 4.0) == 0.5


def test_bad_numbers_are_refused_by_name():
    good, costs = [[0.5, 0.4]], [1.0, 1.0]
    for function in (
        lambda survival: prefix_lengths(survival, costs),
        lambda survival: best_budget(survival, costs),
        lambda survival: fill_budget(survival, 1),
        lambda survival: throughput(survival, [1, 1], 1.0),
        lambda survival: worth_drafting(survival, costs, 1.0),
    ):
        with pytest.raises(NumericsError, match=r"request 1 .*NaN"):
            function([[0.5, 0.4], [float("nan"), 0.1]])
        with pytest.raises(NumericsError, match=r"request 1 .*NaN"):
            function([[0.5, 0.4], [0.5, float("nan")]])
        with pytest.raises(UsageError, match=r"request 0 .*rise"):
            function([[0.4, 0.5], [0.5, 0.4]])
    for bad in ([], [1.0, 0.0], [1.0, float("nan")], [1.0, float("inf")], [[1.0]]):
        with pytest.raises(UsageError, match="--schedule fixed"):
            prefix_lengths(good, bad)
        with pytest.raises(UsageError, match="--schedule fixed"):
            best_budget(good, bad)
    with pytest.raises(UsageError, match="budget is -1"):
        fill_budget(good, -1)
    with pytest.raises(UsageError, match="budget is -1"):
        drafting_gain(good, costs, 1.0, budget=-1)
    with pytest.raises(UsageError, match="--schedule fixed"):
        drafting_gain(good, costs, 0.0)
    for margin in (-0.1, float("nan")):
        with pytest.raises(UsageError, match="margin"):
            best_budget(good, costs, margin=margin)
        with pytest.raises(UsageError, match="margin"):
            worth_drafting(good, costs, 1.0, margin=margin)


def test_a_decision_for_256_requests_takes_less_than_a_millisecond():
    generator = np.random.default_rng(0)
    survival = np.multiply.accumulate(generator.random((256, 7)) ** 0.3, axis=1)
    limits, step_ms = np.full(256, 7), 20 + 0.01 * np.arange(256 * 7 + 1)
    decisions = (
        lambda: prefix_lengths(survival, step_ms, limits),
        lambda: fill_budget(survival, best_budget(survival, step_ms, limits), limits),
    )
    for decide in decisions:
        times = []
        for _ in range(50):
            started = time.perf_counter()
            decide()
            times.append(time.perf_counter() - started)
        assert min(times) < 1e-3
