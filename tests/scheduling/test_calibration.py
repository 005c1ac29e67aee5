from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from dspark.errors import CompatibilityError, DataError, NumericsError, UsageError
from dspark.scheduling.calibration import (
    GRID,
    Rounds,
    TemperatureScaling,
    assess,
    fit,
    temperature_class,
)
from dspark.scheduling.calibration_file import Calibration, calibrate
from dspark.scheduling.survival import confidence, survival

TRUE = np.array([0.5, 1.6, 1.0, 2.5])


def rounds_of(count, seed=0, temperatures=TRUE, verified=None):
    """Rounds whose draft k stays, given the ones before, with sigmoid(logit / temperature)."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(1.5, 2.0, (count, len(temperatures)))
    stays = generator.random(logits.shape) < confidence(logits / temperatures)
    accepted = np.logical_and.accumulate(stays, axis=1).sum(axis=1)
    most = np.full(count, len(temperatures)) if verified is None else verified(generator, logits)
    return Rounds.of(logits, np.minimum(accepted, most), most)


def slow_fit(rounds):
    """Position by position, every temperature of the grid, the error by loops."""
    chosen = []
    for k in range(rounds.logits_NK.shape[1]):
        scores = []
        for temperature in GRID:
            bins = {}
            seen = 0
            for row, accepted, verified in zip(
                rounds.logits_NK, rounds.accepted_N, rounds.verified_N, strict=True
            ):
                if verified <= k:
                    continue
                product = 1.0
                for z, t in zip(row, [*chosen, temperature], strict=False):
                    product *= 1 / (1 + math.exp(-z / t))
                content = bins.setdefault(min(int(product * 20), 19), [0.0, 0])
                content[0] += product
                content[1] += int(accepted > k)
                seen += 1
            error = sum(abs(p - s) for p, s in bins.values()) / seen
            scores.append((round(error, 12), abs(math.log(temperature)), temperature))
        chosen.append(min(scores)[2])
    return chosen


def test_fit_is_the_slow_grid_search():
    rounds = rounds_of(150)
    assert fit(rounds, "token", shifts=False).temperatures == pytest.approx(slow_fit(rounds))
    assert fit(rounds, "block") == fit(rounds, "token"), "all rounds are full"


def test_fit_finds_the_temperatures_that_made_the_rounds():
    rounds, held_out = rounds_of(30_000), rounds_of(30_000, seed=1)
    scaling = fit(rounds, "token", shifts=False)
    assert np.array(scaling.temperatures) == pytest.approx(TRUE, rel=0.2)
    before, after = assess(held_out, "token"), assess(held_out, "token", scaling)
    assert np.mean([r.ece for r in before]) > 0.03
    assert np.mean([r.ece for r in after]) < 0.01
    assert all(b.auc is not None and b.auc > 0.7 for b in before)
    assert np.mean([r.brier for r in after]) < np.mean([r.brier for r in before])


def test_shifts_mend_what_temperatures_cannot():
    """Every draft stays less often than claimed, by a constant in the logit."""
    generator = np.random.default_rng(3)
    logits = generator.normal(0.5, 1.5, (30_000, 3))
    stays = generator.random(logits.shape) < confidence(logits + np.array([-0.8, 0.5, -0.4]))
    accepted = np.logical_and.accumulate(stays, axis=1).sum(axis=1)
    rounds = Rounds.of(logits, accepted, np.full(len(logits), 3))
    scaling, without = fit(rounds, "token"), fit(rounds, "token", shifts=False)
    assert scaling.shifts == pytest.approx([-0.8, 0.5, -0.4], abs=0.21)
    errors = [np.mean([r.ece for r in assess(rounds, "token", s)]) for s in (scaling, without)]
    assert errors[0] < 0.01 < errors[1]


def test_shifts_leave_order_alone():
    scaling = TemperatureScaling((0.3, 4.0), (-2.0, 1.7))
    logits = np.sort(np.random.default_rng(0).normal(0, 9, (500, 2)), axis=0)
    assert (np.diff(scaling.apply(logits), axis=0) >= 0).all()
    assert scaling.apply([[1.2, -3.0]])[0] == pytest.approx(
        [1 / (1 + math.exp(-2.0)), 1 / (1 + math.exp(-0.95))]
    )


def test_trimmed_positions_are_left_out_under_the_token_rule():
    """Lengths chosen by confidence: what was verified is calibrated as if nothing were trimmed."""
    rounds = rounds_of(
        40_000, verified=lambda g, z: np.logical_and.accumulate(z > 0, axis=1).sum(axis=1)
    )
    assert [int(rounds.observed(k, "token").sum()) for k in range(4)] == [
        int((rounds.verified_N > k).sum()) for k in range(4)
    ]
    after = assess(rounds, "token", TemperatureScaling(tuple(TRUE)))
    assert max(r.ece for r in after) < 0.02


def test_control_counting_rejected_rounds_behind_their_trim_biases_the_labels():
    """Trimmed at random: a rejection tells the later fates, an acceptance does not."""
    rounds = rounds_of(40_000, verified=lambda g, z: g.integers(1, 5, len(z)))
    truth = survival(confidence(rounds.logits_NK / TRUE))[:, 3]
    fate_known = (rounds.verified_N > 3) | (rounds.accepted_N < rounds.verified_N)
    wrong = truth[fate_known].mean() - (rounds.accepted_N[fate_known] > 3).mean()
    right = rounds.observed(3, "token")
    good = truth[right].mean() - (rounds.accepted_N[right] > 3).mean()
    assert abs(wrong) > 0.03
    assert abs(good) < 0.01


def test_under_the_block_rule_only_full_rounds_count():
    rounds = rounds_of(1000, verified=lambda g, z: g.integers(0, 5, len(z)))
    full = rounds.verified_N == 4
    for k in range(4):
        assert rounds.observed(k, "block").tolist() == full.tolist()
    only_full = Rounds(rounds.logits_NK[full], rounds.accepted_N[full], rounds.verified_N[full])
    assert full.sum() >= 100
    assert fit(rounds, "block") == fit(only_full, "token") != fit(rounds, "token")
    with pytest.raises(DataError, match=r"position 1 .*uncalibrated"):
        fit(rounds_of(400, verified=lambda g, z: np.full(len(z), 3)), "block")


def test_scaling_keeps_order_and_monotone_survival_in_floating_point():
    generator = np.random.default_rng(0)
    logits = np.sort(generator.normal(0, 20, (400, 4)), axis=0)
    logits[1::2] = np.nextafter(logits[::2], np.inf)
    scaling = TemperatureScaling((0.3, 3.0, 1.0, 7.7))
    got = scaling.apply(np.sort(logits, axis=0))
    assert (np.diff(got, axis=0) >= 0).all()
    assert (np.diff(survival(got), axis=1) <= 0).all()
    assert scaling.apply(logits[:, :2]).shape == (400, 2)
    assert scaling.apply(logits[:, 2:3])[0, 0] == confidence(logits[:1, 2:3] / 0.3)[0, 0]


def test_bad_scalings_and_rounds_are_refused():
    for bad in ((), (0.0,), (1.0, -1.0), (float("nan"),), (float("inf"),)):
        with pytest.raises(DataError, match="uncalibrated"):
            TemperatureScaling(bad)
    with pytest.raises(CompatibilityError, match=r"3 drafts.* 2 temperatures.*uncalibrated"):
        TemperatureScaling((1.0, 1.0)).apply(np.zeros((1, 3)))
    with pytest.raises(NumericsError, match="round 1 "):
        Rounds.of([[0.0], [float("nan")]], [0, 0], [1, 1])
    for accepted, verified in (([2], [1]), ([0], [3]), ([-1], [1])):
        with pytest.raises(DataError, match="Round 0"):
            Rounds.of([[0.0, 0.0]], accepted, verified)
    with pytest.raises(DataError, match="shape"):
        Rounds.of([[0.0]], [0, 0], [1])
    with pytest.raises(UsageError, match="verifier"):
        fit(rounds_of(100), "tokens")
    with pytest.raises(UsageError, match="verifier"):
        assess(rounds_of(100), "tokens")


def test_temperature_classes():
    assert temperature_class(0.0) == "greedy"
    assert temperature_class(0.3) == "sampled"


@pytest.fixture
def entry():
    return calibrate(rounds_of(300), "token", "sampled", held_out=rounds_of(200, seed=1))


def test_entries_are_assessed_on_held_out_rounds(entry):
    assert entry.rounds == 300
    assert [r.count for r in entry.before] == [200] * 4
    assert entry.before == assess(rounds_of(200, seed=1), "token")
    assert entry.after == assess(rounds_of(200, seed=1), "token", entry.scaling)
    alone = calibrate(rounds_of(300), "token", "sampled")
    assert [r.count for r in alone.after] == [300] * 4


def test_mean_survival_is_that_of_the_assessed_rounds(entry):
    held_out = rounds_of(200, seed=1)
    means = survival(entry.scaling.apply(held_out.logits_NK)).mean(axis=0)
    assert entry.mean_survival == pytest.approx(means)
    assert (np.diff(entry.mean_survival) <= 0).all()


def test_save_and_load(tmp_path, entry):
    path = tmp_path / "dspark" / "calibration.json"
    greedy = calibrate(rounds_of(300), "block", "greedy")
    calibration = Calibration().with_entry(entry).with_entry(greedy)
    calibration.save(path)
    assert [file.name for file in path.parent.iterdir()] == ["calibration.json"]
    loaded = Calibration.load(path)
    assert loaded == calibration
    assert loaded.entry(4, "token", "sampled") == entry
    assert loaded.entry(4, "block", "greedy") == greedy
    again = calibrate(rounds_of(400), "token", "sampled")
    replaced = loaded.with_entry(again)
    assert replaced.entry(4, "token", "sampled") == again
    assert len(replaced.entries) == 2


def test_rates_of_children_are_stored_where_there_are_some(tmp_path, entry):
    path = tmp_path / "calibration.json"
    Calibration((entry,)).save(path)
    assert "child_rates" not in path.read_text()  # older versions read it, too
    rated = replace(entry, child_rates=(0.3, 0.1))
    Calibration((rated,)).save(path)
    assert Calibration.load(path).entries == (rated,)
    # They hold for every verifier, so the latest are the only ones; of chains alone none are.
    other = replace(entry, verifier="block", child_rates=(0.2, 0.05))
    both = Calibration((rated,)).with_entry(other)
    assert [e.child_rates for e in both.entries] == [(0.2, 0.05), ()]
    again = both.with_entry(replace(other, child_rates=()))
    assert [e.child_rates for e in again.entries] == [(0.2, 0.05), ()]


def test_another_block_size_verifier_or_temperature_is_said(entry):
    calibration = Calibration((entry,))
    for key in ((5, "token", "sampled"), (4, "block", "sampled"), (4, "token", "greedy")):
        with pytest.raises(CompatibilityError, match=r"block size 4.*uncalibrated") as caught:
            calibration.entry(*key)
        assert f"block size {key[0]}, verifier {key[1]}, {key[2]}" in str(caught.value)
    with pytest.raises(CompatibilityError, match="it has nothing"):
        Calibration().entry(4, "token", "greedy")
    with pytest.raises(DataError, match="two calibrations"):
        Calibration((entry, entry))


def test_files_that_are_no_calibrations_are_refused_with_the_fallback(tmp_path, entry):
    path = tmp_path / "calibration.json"
    Calibration((entry,)).save(path)
    good = json.loads(path.read_text())
    row = good["entries"][0]

    def with_row(**changes):
        return json.dumps({**good, "entries": [{**row, **changes}]})

    bad = [
        "",
        "nonsense",
        "[1]",
        json.dumps({**good, "version": 7}),
        json.dumps({"version": 1}),
        json.dumps({**good, "entries": [3]}),
        json.dumps({**good, "entries": [row, row]}),
        with_row(block_size=5),
        with_row(child_rates=[0.2, 1.5]),
        with_row(child_rates=["0.2"]),
        with_row(block_size="4"),
        with_row(temperatures=[1.0, 1.0]),
        with_row(temperatures=[1.0, 1.0, 1.0, float("nan")]),
        with_row(temperatures=[1.0, 1.0, 1.0, -1.0]),
        with_row(temperatures=[1.0, 1.0, 1.0, "1"]),
        with_row(shifts=[0.0]),
        with_row(shifts=[0.0, 0.0, 0.0, float("inf")]),
        with_row(verifier="nobody"),
        with_row(temperature_class="hot"),
        with_row(rounds=0),
        with_row(more=1),
        with_row(before=[]),
        with_row(after=[{**r, "ece": float("nan")} for r in row["after"]]),
        with_row(after=[{**r, "bin_counts": [1]} for r in row["after"]]),
    ]
    for text in bad:
        path.write_text(text)
        with pytest.raises(DataError, match="uncalibrated") as caught:
            Calibration.load(path)
        assert str(path) in str(caught.value)
    with pytest.raises(DataError, match=r"does not exist.*uncalibrated"):
        Calibration.load(tmp_path / "absent.json")
