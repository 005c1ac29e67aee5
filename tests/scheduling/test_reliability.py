from __future__ import annotations

import numpy as np
import pytest

from dspark.errors import UsageError
from dspark.scheduling.reliability import reliability


def slow_ece(predicted, stayed):
    bins = [[] for _ in range(20)]
    for p, s in zip(predicted, stayed, strict=True):
        bins[min(int(p * 20), 19)].append((p, s))
    total = 0.0
    for content in filter(None, bins):
        mean = sum(p for p, _ in content) / len(content)
        share = sum(s for _, s in content) / len(content)
        total += len(content) / len(predicted) * abs(mean - share)
    return total


def slow_auc(predicted, stayed):
    good = [p for p, s in zip(predicted, stayed, strict=True) if s]
    bad = [p for p, s in zip(predicted, stayed, strict=True) if not s]
    wins = sum((g > b) + (g == b) / 2 for g in good for b in bad)
    return wins / (len(good) * len(bad))


@pytest.mark.parametrize("seed", range(8))
def test_every_figure_is_the_obvious_one(seed):
    generator = np.random.default_rng(seed)
    predicted = generator.random(200)
    if seed % 2:
        predicted = np.round(predicted * 8) / 8  # ties and bin edges
    stayed = generator.random(200) < predicted**2
    got = reliability(predicted, stayed)
    pairs = list(zip(predicted.tolist(), stayed.tolist(), strict=True))
    assert got.count == 200
    assert got.ece == pytest.approx(slow_ece(predicted.tolist(), stayed.tolist()))
    assert got.auc == pytest.approx(slow_auc(predicted.tolist(), stayed.tolist()))
    assert got.brier == pytest.approx(sum((p - s) ** 2 for p, s in pairs) / 200)
    for b in range(20):
        inside = [(p, s) for p, s in pairs if min(int(p * 20), 19) == b]
        assert got.bin_counts[b] == len(inside)
        if inside:
            assert got.bin_predicted[b] == pytest.approx(sum(p for p, _ in inside) / len(inside))
            assert got.bin_observed[b] == pytest.approx(sum(s for _, s in inside) / len(inside))


@pytest.mark.parametrize("count", [500, 8000])
def test_right_predictions_err_by_chance_and_wrong_ones_by_more(count):
    generator = np.random.default_rng(3)
    right, wrong, chance = [], [], []
    for _ in range(40):
        predicted = generator.beta(2, 3, count)
        stayed = generator.random(count) < predicted
        found = reliability(predicted, stayed)
        right.append(found.ece)
        chance.append(found.ece_by_chance)
        wrong.append(reliability(np.minimum(1.2 * predicted, 1.0), stayed).ece)
    assert np.mean(chance) == pytest.approx(np.mean(right), rel=0.06)
    assert np.mean(wrong) > 1.2 * np.mean(chance)


def test_predictions_that_are_right_and_wrong():
    sure = reliability([0.0, 1.0, 1.0], [False, True, True])
    assert (sure.ece, sure.auc, sure.brier) == (0.0, 1.0, 0.0)
    assert sure.bin_counts[0] == 1
    assert sure.bin_counts[19] == 2
    wrong = reliability([0.0, 1.0], [True, False])
    assert (wrong.ece, wrong.auc, wrong.brier) == (1.0, 0.0, 1.0)
    assert reliability([0.4, 0.6], [True, True]).auc is None
    nothing = reliability([], [])
    assert (nothing.count, nothing.ece, nothing.auc, nothing.brier) == (0, 0.0, None, 0.0)


@pytest.mark.parametrize("bad", [[0.5, 1.5], [0.5, -0.1], [0.5, float("nan")]])
def test_predictions_that_are_no_probabilities_are_refused(bad):
    with pytest.raises(UsageError, match="outside"):
        reliability(bad, [True, False])
    with pytest.raises(UsageError, match="outcome"):
        reliability([0.5], [True, False])
