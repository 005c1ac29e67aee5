"""Corrections of a cost table by made-up rounds whose real times are known."""

from __future__ import annotations

import numpy as np
import pytest

from dspark.errors import NumericsError
from dspark.scheduling.cost_table import CostPoint, CostTable, MachineKey
from dspark.scheduling.step_times import StepTime, StepTimes

MACHINE = MachineKey("test", 1, "float32", "tiny", "tiny")
NUM_DRAFTS = 7


def table(step_ms=10.0, row_ms=1.0, draft_ms=4.0):
    points = [
        CostPoint(tokens, requests, step_ms + row_ms * tokens, draft_ms, 0.5)
        for requests in (1, 2, 4, 8)
        for tokens in range(requests, (NUM_DRAFTS + 1) * requests + 1)
    ]
    return CostTable(tuple(points), MACHINE)


def rounds(real_ms, count, *, noise=0.0, seed=0, lengths=(0, 56), draft_ms=4.0):
    """Rounds of 8 requests that take what `real_ms` says of requests, drafts and prompt rows."""
    generator = np.random.default_rng(seed)
    for number in range(count):
        drafts = int(generator.integers(lengths[0], lengths[1] + 1)) if number % 16 else 0
        prompt_rows = int(generator.integers(0, 40)) if number % 4 == 0 else 0
        spent = real_ms(8, drafts, prompt_rows) * generator.lognormal(0, noise)
        depth = NUM_DRAFTS if drafts else 0
        yield StepTime(8, drafts, prompt_rows, depth, draft_ms * bool(drafts), spent, 8)


def linear(requests, drafts, prompt_rows):
    return 30.0 + 0.5 * (requests + drafts) + 0.3 * prompt_rows


def test_nothing_is_corrected_before_the_first_round():
    times = StepTimes(table(), NUM_DRAFTS)
    np.testing.assert_allclose(times.verify_ms(8, 56), table().verify_curve(8))
    assert times.off_ms(8) == table().off_ms(8)
    assert times.draft_ms(8, NUM_DRAFTS) == pytest.approx(4.0)
    assert times.draft_ms(8, 1) == pytest.approx(2.0)


def test_rounds_correct_a_table_in_which_rows_are_too_dear():
    times = StepTimes(table(), NUM_DRAFTS)
    for seen in rounds(linear, 200):
        times.learn(seen)
    real = [linear(8, drafts, 0) for drafts in range(57)]
    np.testing.assert_allclose(times.verify_ms(8, 56), real, rtol=0.05)
    assert times.off_ms(8) == pytest.approx(34.0, rel=0.05)
    row_ms = table().verify_curve(8)
    assert times.scales[2] * (row_ms[-1] - row_ms[0]) / 56 == pytest.approx(0.3, rel=0.4)


def test_noise_does_not_mislead_it():
    times = StepTimes(table(), NUM_DRAFTS)
    for seen in rounds(linear, 400, noise=0.2):
        times.learn(seen)
    real = [linear(8, drafts, 0) for drafts in (0, 28, 56)]
    np.testing.assert_allclose(times.verify_ms(8, 56)[[0, 28, 56]], real, rtol=0.1)


def test_a_machine_that_became_slower_keeps_its_proportions():
    """All rounds verify alike, so only the whole is seen: every part is taken for dearer."""
    times = StepTimes(table(), NUM_DRAFTS)
    for _ in range(300):
        times.learn(StepTime(8, 20, 0, 7, 4.0, 2 * (10.0 + 28.0), 8))
    np.testing.assert_allclose(times.verify_ms(8, 56), 2 * table().verify_curve(8), rtol=0.02)


def test_a_stair_that_is_not_there_is_mended():
    """One point was measured at twice its time; rounds on both sides of it tell."""
    points = [
        CostPoint(8 + drafts, 8, (30.0 + 0.4 * drafts) * (1.6 if drafts >= 32 else 1.0), 4.0)
        for drafts in (0, 8, 16, 32, 56)
    ]
    times = StepTimes(CostTable(tuple(points), MACHINE), NUM_DRAFTS)
    for number in range(240):
        drafts = (0, 20, 28, 40, 52, 36)[number % 6]
        times.learn(StepTime(8, drafts, 0, 7 * bool(drafts), 4.0, 30.0 + 0.4 * drafts, 8))
    real = [30.0 + 0.4 * drafts for drafts in range(57)]
    np.testing.assert_allclose(times.verify_ms(8, 56), real, rtol=0.08)


def test_what_is_learned_of_one_load_serves_at_another():
    times = StepTimes(table(), NUM_DRAFTS)
    for seen in rounds(linear, 200):
        times.learn(seen)
    assert times.verify_ms(4, 28)[28] == pytest.approx(linear(4, 28, 0), rel=0.15)


def test_depths_have_drafting_times_of_their_own():
    times = StepTimes(table(), NUM_DRAFTS)
    for _ in range(100):
        times.learn(StepTime(8, 8, 0, 1, 6.0, 26.0, 8))
        times.learn(StepTime(8, 20, 0, 7, 4.0, 38.0, 8))
    assert times.draft_ms(8, 1) == pytest.approx(6.0, rel=0.05)
    assert times.draft_ms(8, 7) == pytest.approx(4.0, rel=0.05)
    assert times.draft_ms(8, 4) > 3.0  # unseen: as the others together


def test_one_round_moves_little_and_corrections_are_bounded():
    times = StepTimes(table(), NUM_DRAFTS)
    times.learn(StepTime(8, 0, 0, 0, 0.0, 1e6, 8))
    assert times.off_ms(8) < 2 * table().off_ms(8)
    for _ in range(500):
        times.learn(StepTime(8, 20, 0, 7, 1e6, 1e6, 8))
    assert times.off_ms(8) <= 10 * table().off_ms(8)
    assert times.draft_ms(8, 7) <= 40.0
    for _ in range(500):
        times.learn(StepTime(8, 20, 0, 7, 0.0, 0.0, 8))
    costs = times.verify_ms(8, 56)
    assert costs.min() > 0
    assert (np.diff(costs) >= 0).all()
    assert times.draft_ms(8, 7) > 0


def test_what_the_table_does_not_know_teaches_nothing():
    times = StepTimes(table(), NUM_DRAFTS)
    times.learn(StepTime(9, 3, 0, 7, 4.0, 1e3, 9))
    times.learn(StepTime(0, 0, 60, 0, 0.0, 1e3, 0))
    assert times.scales == (1.0, 1.0, 1.0)
    with pytest.raises(NumericsError, match="not a number"):
        times.learn(StepTime(8, 0, 0, 0, 0.0, float("nan"), 8))
