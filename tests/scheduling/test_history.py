from __future__ import annotations

import numpy as np
import pytest

from dspark.errors import UsageError
from dspark.scheduling.history import LEAST_FACTOR, RequestHistory
from dspark.scheduling.prefix import prefix_lengths

CONFIDENCE = np.array([0.9, 0.85, 0.8, 0.75, 0.7])


def a_round(generator, honesty=1.0):
    """Predicted survivals of a block, and how many of it stay."""
    confidence = CONFIDENCE * generator.uniform(0.8, 1.0, 5)
    stays = generator.random(5) < confidence * honesty
    return np.cumprod(confidence), int(np.logical_and.accumulate(stays).sum())


def play(history, tag, rounds, generator, honesty=1.0, verified=5):
    for _ in range(rounds):
        survival, accepted = a_round(generator, honesty)
        history.update(tag, survival, min(accepted, verified), verified)
    return history.factors([tag])[0]


def test_a_request_without_a_history_counts_as_survival_1():
    history = RequestHistory()
    assert history.earlier([("slot", 0)], 3).tolist() == [[1.0, 1.0, 1.0]]
    assert history.factors([("slot", 0)]).tolist() == [1.0]
    assert history.typical(3).tolist() == [1.0, 1.0, 1.0]
    assert history.earlier([], 3).shape == (0, 3)
    assert history.factors([]).shape == (0,)


def test_earlier_survivals_are_the_last_rounds():
    history = RequestHistory()
    history.update("a", [0.9, 0.5], 0, 2)
    history.update("a", [0.8, 0.4], 1, 1)
    history.update("a", [], 0, 0)
    assert history.earlier(["a", "b"], 2, [0.7, 0.6]).tolist() == [[0.8, 0.4], [0.7, 0.6]]
    assert history.earlier(["a"], 4).tolist() == [[0.8, 0.4, 0.4, 0.4]]
    assert history.earlier(["a"], 1).tolist() == [[0.8]]


def test_state_never_outlives_the_request():
    """A slot is used again by another generation."""
    history, generator = RequestHistory(), np.random.default_rng(0)
    assert play(history, (3, 0), 30, generator, honesty=0.1) < 0.5
    assert history.factors([(3, 1)]).tolist() == [1.0]
    assert history.earlier([(3, 1)], 5).tolist() == [[1.0] * 5]
    history.drop((3, 0))
    history.drop((3, 0))
    assert len(history) == 0
    assert history.factors([(3, 0)]).tolist() == [1.0]


def test_typical_survivals_are_the_mean_of_late_rounds_of_shared_requests():
    history, generator = RequestHistory(typical_K=[0.5, 0.2]), np.random.default_rng(0)
    assert history.typical(3).tolist() == [0.5, 0.2, 0.2]
    history.update("penalised", [0.0, 0.0], 0, 0, shared=False)
    assert history.typical(2).tolist() == [0.5, 0.2]
    for _ in range(2000):
        first = generator.uniform(0.7, 0.9)
        history.update("a", [first, first * 0.5], 0, 0)
    assert history.typical(2) == pytest.approx([0.8, 0.4], abs=0.02)
    assert (np.diff(history.typical(5)) <= 0).all()
    history.update("a", [0.3], 0, 0)
    assert history.typical(1).tolist() == [0.3], "another block size starts anew"


def test_a_request_that_keeps_failing_drafts_less_and_honest_ones_do_not():
    generator = np.random.default_rng(0)
    honest = [play(RequestHistory(), "a", 40, generator) for _ in range(200)]
    failing = [play(RequestHistory(), "a", 40, generator, honesty=0.2) for _ in range(200)]
    assert np.mean(honest) > 0.99
    assert np.mean(failing) < 0.6
    history = RequestHistory()
    factors = [play(history, "a", 1, generator, honesty=0.0) for _ in range(12)]
    assert factors[0] > 0.7, "one failure is luck"
    assert (np.diff(factors) <= 0).all()
    assert factors[-1] < 0.6
    survival = np.cumprod(CONFIDENCE)[None, :]
    step_ms = 10 + 2.0 * np.arange(6)
    lengths = [
        prefix_lengths(survival * factor, step_ms).sum()
        for factor in (1.0, history.factors(["a"])[0])
    ]
    assert lengths[1] < lengths[0]


def test_predicted_acceptance_of_trimmed_rounds_is_that_of_what_was_verified():
    """Trimming alone must not look like failing."""
    generator = np.random.default_rng(1)
    trimmed = [play(RequestHistory(), "a", 40, generator, verified=2) for _ in range(200)]
    assert np.mean(trimmed) > 0.99


def test_the_variance_of_acceptance_is_the_enumerated_one():
    survival = np.cumprod(CONFIDENCE)
    chances = np.append(-np.diff(np.append(1.0, survival)), survival[-1])
    counts = np.arange(6)
    mean = (chances * counts).sum()
    variance = (chances * counts**2).sum() - mean**2
    history = RequestHistory(doubt=1.0)
    history.update("a", survival, 0, 5)
    assert history.factors(["a"])[0] == pytest.approx((variance**0.5 + 1) / (mean + 1))


def test_factors_fade_back_to_1_while_nothing_is_drafted():
    history, generator = RequestHistory(), np.random.default_rng(2)
    low = play(history, "a", 40, generator, honesty=0.0)
    assert LEAST_FACTOR <= low < 0.5
    for _ in range(60):
        history.update("a", [], 0, 0)
    assert history.factors(["a"])[0] > 0.95


def test_bad_values_are_refused():
    for accepted, verified in ((3, 2), (-1, 1), (0, 3)):
        with pytest.raises(UsageError, match="cannot be"):
            RequestHistory().update("a", [0.5, 0.4], accepted, verified)
    for bad in ({"memory": 1.0}, {"memory": -0.1}, {"doubt": -1.0}, {"doubt": float("nan")}):
        with pytest.raises(UsageError):
            RequestHistory(**bad)
