from __future__ import annotations

import numpy as np
import pytest

from dspark.errors import NumericsError, UsageError
from dspark.scheduling.online import OnlineLogistic, observed
from dspark.scheduling.reliability import reliability
from dspark.scheduling.survival import confidence

SLOPE, INTERCEPT = 0.45, -0.8


def drafts(generator, count, slope=SLOPE, intercept=INTERCEPT):
    margins = generator.exponential(3.0, count)
    return margins, generator.random(count) < confidence(slope * margins + intercept)


def test_observed_drafts_are_those_up_to_the_first_rejection_or_the_trim():
    margins = np.arange(12.0).reshape(3, 4)
    accepted, verified = [1, 2, 0], [3, 2, 0]
    expected = []
    for row, a, v in zip(margins, accepted, verified, strict=True):
        for k in range(v):
            expected.append((row[k], k < a))
            if k >= a:
                break
    got = observed(margins, accepted, verified)
    assert list(zip(*(part.tolist() for part in got), strict=True)) == expected
    assert expected == [(0.0, True), (1.0, False), (4.0, True), (5.0, True)]


def test_it_starts_as_the_raw_margin():
    assert OnlineLogistic().apply([[0.5, 3.0]]).tolist() == [[0.5, 3.0]]


def test_it_learns_the_logistic_that_made_the_outcomes():
    generator = np.random.default_rng(0)
    model = OnlineLogistic()
    for _ in range(400):
        model.update(*drafts(generator, 20))
    margins, stayed = drafts(generator, 20_000)
    assert model.slope == pytest.approx(SLOPE, abs=0.06)
    assert model.intercept == pytest.approx(INTERCEPT, abs=0.15)
    after = reliability(confidence(model.apply(margins)), stayed)
    before = reliability(confidence(margins), stayed)
    assert after.ece < 0.02
    assert before.ece > 0.1
    assert after.auc == pytest.approx(before.auc), "order is kept"


def test_online_steps_end_near_the_fit_of_all_drafts_at_once():
    generator = np.random.default_rng(1)
    margins, stayed = drafts(generator, 4000)
    online = OnlineLogistic(half_life=1e9)
    for part in range(0, 4000, 10):
        online.update(margins[part : part + 10], stayed[part : part + 10])
    slope, intercept = 1.0, 0.0
    for _ in range(20_000):  # plain gradient ascent on the likelihood
        missing = stayed - confidence(slope * margins + intercept)
        slope += 0.02 * float((missing * margins).mean())
        intercept += 0.02 * float(missing.mean())
    assert online.slope == pytest.approx(slope, abs=0.05)
    assert online.intercept == pytest.approx(intercept, abs=0.1)


def test_it_follows_a_change():
    generator = np.random.default_rng(2)
    model = OnlineLogistic(half_life=2000)
    for intercept in (1.0, -2.0):
        for _ in range(500):
            model.update(*drafts(generator, 20, intercept=intercept))
        assert model.intercept == pytest.approx(intercept, abs=0.3)


def test_the_slope_never_turns_negative_and_order_is_kept():
    generator = np.random.default_rng(3)
    model = OnlineLogistic()
    for _ in range(50):
        margins = generator.exponential(3.0, 20)
        model.update(margins, margins < 1)
        assert model.slope >= 0
        assert (np.diff(model.apply(np.sort(margins))) >= 0).all()


def test_extremes_and_nothing():
    model = OnlineLogistic()
    model.update([], [])
    assert (model.slope, model.intercept) == (1.0, 0.0)
    for _ in range(100):
        model.update([0.0, 50.0, np.inf], [False, False, False])
    assert np.isfinite([model.slope, model.intercept]).all()
    for _ in range(100):
        model.update([1e30], [True])
    assert np.isfinite(model.apply([np.inf, 0.0])).all()


def test_bad_margins_are_refused_and_teach_nothing():
    model = OnlineLogistic()
    with pytest.raises(NumericsError, match="NaN"):
        model.update([1.0, float("nan")], [True, True])
    with pytest.raises(NumericsError, match="NaN"):
        model.apply([float("nan")])
    with pytest.raises(UsageError, match="one outcome for each"):
        model.update([1.0], [True, False])
    assert (model.slope, model.intercept) == (1.0, 0.0)
