from __future__ import annotations

import numpy as np
import pytest

from dspark.errors import UsageError
from dspark.scheduling.budget import prefix_lengths
from dspark.scheduling.history import LAST, LEAST_FACTOR, RequestHistory

CONFIDENCE = np.array([0.9, 0.85, 0.8, 0.75, 0.7])


def a_round(generator, honesty=1.0):
    """Predicted survivals of a block, and how many of it stay."""
    confidence = CONFIDENCE * generator.uniform(0.8, 1.0, 5)
    stays = generator.random(5) < confidence * honesty
    return np.cumprod(confidence), int(np.logical_and.accumulate(stays).sum())


def play(history, tag, rounds, generator, honesty=1.0, verified=5):
    for _ in range(rounds):
        survival, accepted = a_round(generator, honesty)
        history.update([tag], [survival], [min(accepted, verified)], [verified])
    return float(history.factors([tag])[0])


def test_a_request_without_a_history_counts_as_survival_1():
    history = RequestHistory(3)
    assert history.earlier([("slot", 0)]).tolist() == [[1.0, 1.0, 1.0]]
    assert history.factors([("slot", 0)]).tolist() == [1.0]
    assert history.typical.tolist() == [1.0, 1.0, 1.0]
    assert history.earlier([]).shape == (0, 3)
    assert history.factors([]).shape == (0,)
    history.fade([("slot", 0)])
    assert len(history) == 0


def test_rounds_that_are_counted_fade_as_rounds_one_by_one():
    ways = []
    for counted in (True, False):
        history, generator = RequestHistory(5), np.random.default_rng(4)
        play(history, "a", 12, generator, honesty=0.3)
        if counted:
            history.fade(["a"], 7)
        else:
            for _ in range(7):
                history.fade(["a"])
        ways.append(history.factors(["a"]).tolist())
    assert ways[0] == pytest.approx(ways[1], rel=1e-12)
    assert ways[0] < [1.0]


def test_what_a_request_is_expected_to_keep_is_its_mean_of_late_and_its_last_round():
    generator = np.random.default_rng(5)
    history, means = RequestHistory(3, memory=0.8, typical_K=[0.6, 0.4, 0.1]), {}
    for _ in range(40):
        tags = [int(tag) for tag in generator.permutation(9)[:4]]
        last = -np.sort(-generator.random((4, 3)))
        typical = history.typical  # as the round begins
        history.update(tags, last, [0] * 4, [0] * 4)
        for tag, survival in zip(tags, last, strict=True):
            means[tag] = 0.8 * means.get(tag, typical) + 0.2 * survival
        assert history.earlier(tags) == pytest.approx(last, rel=1e-12), "several: the last round"
        for tag, survival in zip(tags, last, strict=True):
            expected_K = (1 - LAST) * means[tag] + LAST * survival
            assert history.earlier([tag])[0] == pytest.approx(expected_K, rel=1e-12)
    assert history.earlier(["new"], [0.7, 0.6, 0.5]).tolist() == [[0.7, 0.6, 0.5]]


def test_the_first_round_of_all_is_all_that_is_known_and_short_blocks_fall_as_is_typical():
    history = RequestHistory(2)
    history.update(["a", "c"], [[0.9, 0.5], [0.3, 0.2]], [0, 0], [2, 0])
    for tag, survival_K in (("c", [0.3, 0.2]), ("a", [0.9, 0.5])):
        assert history.earlier([tag])[0] == pytest.approx(survival_K)
    first, second = history.typical
    for _ in range(300):
        history.update(["a"], [[0.6]], [0], [1])
    got = history.earlier(["a"])[0]
    assert got == pytest.approx([0.6, 0.6 * second / first])


def test_the_mean_and_the_last_round_foretell_the_next_better_than_the_last_alone():
    """Rounds of a request vary about a level of its own, as those of real drafters do."""
    generator, errors = np.random.default_rng(6), np.zeros((2, 400))
    for tag in range(400):
        level = generator.beta(4, 8)
        history, last = RequestHistory(1, typical_K=[1 / 3]), 1 / 3
        for number in range(20):
            survival = generator.beta(4 * level, 4 * (1 - level))
            if number:
                guesses = history.earlier([tag])[0, 0], last
                errors[:, tag] += [(guess - survival) ** 2 for guess in guesses]
            history.update([tag], [[survival]], [0], [0])
            last = survival
    blended, last_alone = errors.mean(axis=1)
    assert blended < 0.75 * last_alone


def test_state_never_outlives_the_request():
    """A slot is used again by another generation, and rows of memory by other requests."""
    history, generator = RequestHistory(5), np.random.default_rng(0)
    assert play(history, (3, 0), 30, generator, honesty=0.1) < 0.5
    assert history.factors([(3, 1)]).tolist() == [1.0]
    assert history.earlier([(3, 1)]).tolist() == [[1.0] * 5]
    history.drop((3, 0))
    history.drop((3, 0))
    assert len(history) == 0
    assert history.factors([(3, 0)]).tolist() == [1.0]
    fresh = RequestHistory(5)
    for other in (history, fresh):
        other.update([(3, 1)], [CONFIDENCE], [0], [5])
    assert history.factors([(3, 1)]).tolist() == fresh.factors([(3, 1)]).tolist()


def test_many_requests_together_are_many_alone():
    generator = np.random.default_rng(3)
    together, alone = RequestHistory(5), {tag: RequestHistory(5) for tag in range(40)}
    for number in range(30):
        tags = [int(t) for t in generator.permutation(40)[: 1 + number]]
        rounds = [a_round(generator, honesty=0.6) for _ in tags]
        survival, accepted = zip(*rounds, strict=True)
        together.update(tags, survival, accepted, [5] * len(tags))
        for tag, (row, count) in zip(tags, rounds, strict=True):
            alone[tag].update([tag], [row], [count], [5])
    for tag, history in alone.items():
        assert together.factors([tag]) == pytest.approx(history.factors([tag]))


def test_typical_survivals_are_the_mean_of_late_rounds_of_shared_requests():
    history, generator = RequestHistory(2, typical_K=[0.5, 0.2]), np.random.default_rng(0)
    assert history.typical.tolist() == [0.5, 0.2]
    history.update(["penalised"], [[0.0, 0.0]], [0], [0], shared_R=[False])
    assert history.typical.tolist() == [0.5, 0.2]
    history.update(["a", "penalised"], [[1.0, 1.0], [0.0, 0.0]], [0, 0], [0, 0], [True, False])
    assert history.typical == pytest.approx([(8 * 0.5 + 1) / 9, (8 * 0.2 + 1) / 9])
    for _ in range(2000):
        first = generator.uniform(0.7, 0.9)
        history.update(["a"], [[first, first * 0.5]], [0], [0])
    assert history.typical == pytest.approx([0.8, 0.4], abs=0.02)
    first = RequestHistory(2)
    first.update(["a", "b"], [[0.4, 0.2], [0.2, 0.0]], [0, 0], [0, 0])
    assert first.typical == pytest.approx([0.3, 0.1]), "nothing was given: rounds alone count"


def test_a_request_that_keeps_failing_drafts_less_and_honest_ones_do_not():
    generator = np.random.default_rng(0)
    honest = [play(RequestHistory(5), "a", 40, generator) for _ in range(200)]
    failing = [play(RequestHistory(5), "a", 40, generator, honesty=0.2) for _ in range(200)]
    assert np.mean(honest) > 0.99
    assert np.mean(failing) < 0.6
    history = RequestHistory(5)
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
    trimmed = [play(RequestHistory(5), "a", 40, generator, verified=2) for _ in range(200)]
    assert np.mean(trimmed) > 0.99


def test_the_variance_of_acceptance_is_the_enumerated_one():
    survival = np.cumprod(CONFIDENCE)
    chances = np.append(-np.diff(np.append(1.0, survival)), survival[-1])
    counts = np.arange(6)
    mean = (chances * counts).sum()
    variance = (chances * counts**2).sum() - mean**2
    history = RequestHistory(5, doubt=1.0)
    history.update(["a"], [survival], [0], [5])
    assert history.factors(["a"])[0] == pytest.approx((variance**0.5 + 1) / (mean + 1))


def test_factors_fade_back_to_1_while_nothing_is_drafted():
    history, generator = RequestHistory(5), np.random.default_rng(2)
    low = play(history, "a", 40, generator, honesty=0.0)
    assert LEAST_FACTOR <= low < 0.5
    for _ in range(60):
        history.fade(["a"])
    assert history.factors(["a"])[0] > 0.95


def test_bad_values_are_refused():
    for accepted, verified in ((2, 1), (-1, 1), (0, 3)):
        with pytest.raises(UsageError, match=r"Request 1 .*cannot be"):
            RequestHistory(2).update("ab", [[0.5, 0.4]] * 2, [0, accepted], [2, verified])
    for survival in ([[0.5, 0.4, 0.3]], [[]], [0.5]):
        with pytest.raises(UsageError, match="1 to 2 columns"):
            RequestHistory(2).update("a", survival, [0], [0])
    with pytest.raises(UsageError, match="give one each"):
        RequestHistory(2).update("ab", [[0.5, 0.4]] * 2, [0], [1, 1])
    for bad in (
        {"memory": 1.0},
        {"memory": -0.1},
        {"doubt": -1.0},
        {"doubt": float("nan")},
        {"typical_K": [1.0]},
    ):
        with pytest.raises(UsageError):
            RequestHistory(2, **bad)
