"""`dspark calibrate` and `dspark profile`, and what `dspark generate` makes of them."""

import json
import shutil
from pathlib import Path

import pytest

from dspark.engine.loading import load
from dspark.engine.speculation.trees.growth import ChildRates
from dspark.request import Request, SamplingParams
from dspark.scheduling.calibration_file import Calibration
from dspark.scheduling.cost_table import CostTable


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    words = ("how many apples", "a table for two", "left", "two", "apples left", "for how many")
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in words * 3))
    return path


@pytest.fixture
def drafter(pair, tmp_path):
    return Path(shutil.copytree(pair.drafter, tmp_path / "drafter"))


def calibrate(dspark, pair, drafter, prompts, *words):
    return dspark(
        "calibrate", pair.target, "--draft", drafter, "--prompts", prompts,
        "--max-new-tokens", 90, "--threads", 1, "--json", *words,
    )  # fmt: skip


def test_calibration_stands_beside_the_drafter_one_entry_for_each_use(
    dspark, pair, drafter, prompts
):
    greedy = calibrate(dspark, pair, drafter, prompts)
    sampled = calibrate(dspark, pair, drafter, prompts, "--temperature", 1, "--verifier", "token")
    assert (greedy.status, sampled.status) == (0, 0)
    for report in (greedy.json, sampled.json):
        for name in ("temperatures", "ece_before", "ece_after", "ece_by_chance", "auc"):
            assert len(report[name]) == report["block_size"] == 4
        assert report["rounds"] >= 200
    known = Calibration.load(drafter / "calibration.json")
    assert {entry.key for entry in known.entries} == {
        (4, "block", "greedy"),
        (4, "token", "sampled"),
    }
    assert list(known.entry(4, "block", "greedy").scaling.temperatures) == pytest.approx(
        greedy.json["temperatures"]
    )


def test_rates_of_further_children_are_fitted_where_trees_are_asked_for(
    dspark, pair, drafter, prompts
):
    words = ("--temperature", 1, "--tree-nodes", 12)
    report = calibrate(dspark, pair, drafter, prompts, *words).json
    [entry] = Calibration.load(drafter / "calibration.json").entries
    assert list(entry.child_rates) == report["child_rates"]
    assert len(entry.child_rates) > 1
    assert list(entry.child_rates) != ChildRates().values
    model = load(pair.target, drafter, offline=True)
    request = Request((1, 2), SamplingParams(4, temperature=1.0))
    for block_size, rates in ((None, entry.child_rates), (3, ChildRates().values)):
        trees = model.engine([request], tree_nodes=9, block_size=block_size)._speculator.trees
        assert trees.rates.values == pytest.approx(rates)
    calibrate(dspark, pair, drafter, prompts, "--temperature", 1)
    [again] = Calibration.load(drafter / "calibration.json").entries
    assert again.child_rates == entry.child_rates
    assert "--temperature" in calibrate(dspark, pair, drafter, prompts, "--tree-nodes", 12).err
    coupled = (*words, "--verifier", "coupled")
    assert "coupled" in calibrate(dspark, pair, drafter, prompts, *coupled).err


def test_errors_are_measured_on_held_out_prompts_where_some_are_given(
    dspark, pair, drafter, prompts, tmp_path
):
    other = tmp_path / "other.jsonl"
    other.write_text("".join(prompts.read_text().splitlines(keepends=True)[:2]))
    report = calibrate(dspark, pair, drafter, prompts, "--held-out", other).json
    assert report["rounds"] > 4 * report["held_out_rounds"] > 0
    entry = Calibration.load(drafter / "calibration.json").entries[0]
    assert entry.rounds == report["rounds"]
    assert entry.after[0].count == report["held_out_rounds"]


def test_too_few_rounds_are_said(dspark, pair, drafter, prompts):
    result = calibrate(dspark, pair, drafter, prompts, "--rounds", 20)
    assert result.status == 1
    assert "100 are needed" in result.err
    assert not (drafter / "calibration.json").exists()


def test_a_damaged_calibration_is_said_and_left_out(dspark, pair, drafter):
    (drafter / "calibration.json").write_text("{")
    words = ("generate", pair.target, "--draft", drafter, "--prompt", "two", "--threads", 1)
    result = dspark(*words, "--max-new-tokens", 8)
    assert result.status == 0
    said = " ".join(result.err.split())
    assert "calibration.json" in said
    assert "until then confidences are used uncalibrated" in said


def test_a_damaged_table_in_the_cache_is_said_and_left_out(dspark, pair, drafter, prompts):
    calibrate(dspark, pair, drafter, prompts)
    words = (pair.target, "--draft", drafter, "--threads", 1)
    made = dspark("profile", *words, "--max-requests", 1, "--repeats", 1, "--json")
    Path(made.json["out"]).write_text("{")
    result = dspark("generate", *words, "--prompt", "two", "--max-new-tokens", 8, "--no-profile")
    assert result.status == 0
    assert "until then the schedule is 'auto'" in " ".join(result.err.split())


def test_profile_then_generate_weighs_costs(dspark, pair, drafter, prompts):
    words = (pair.target, "--draft", drafter, "--threads", 1)
    result = dspark("profile", *words, "--max-requests", 2, "--repeats", 2, "--json")
    assert result.status == 0
    points = result.json["points"]
    assert {point["requests"] for point in points} == {1, 2}
    assert all(p.keys() >= {"tokens", "requests", "verify_ms", "draft_ms"} for p in points)
    calibrate(dspark, pair, drafter, prompts)
    plain, lagged = (
        dspark("generate", *words, "--prompts", prompts, "--batch-size", 2, "--max-new-tokens", 20,
               "--schedule", schedule, "--json").json
        for schedule in ("off", "lagged")
    )  # fmt: skip
    assert [o["token_ids"] for o in lagged["outputs"]] == [o["token_ids"] for o in plain["outputs"]]


def test_a_cost_table_of_another_machine_is_refused(dspark, pair, drafter, tmp_path):
    words = (pair.target, "--draft", drafter, "--threads", 1)
    path = tmp_path / "costs.json"
    made = dspark("profile", *words, "--max-requests", 1, "--repeats", 1, "--out", path, "--json")
    assert made.json["out"] == str(path)
    table = json.loads(path.read_text())
    table["machine"]["hardware"] = "an abacus"
    path.write_text(json.dumps(table))
    generate = ("generate", *words, "--prompt", "two", "--schedule", "lagged", "--cost", path)
    result = dspark(*generate)
    assert result.status == 1
    assert "an abacus" in result.err
    assert "the schedule is 'auto'" in result.err
    table["points"] = []
    path.write_text(json.dumps(table))
    assert "is empty" in dspark(*generate).err


def test_a_table_is_measured_once_where_there_is_none(dspark, pair, drafter, monkeypatch):
    words = ("generate", pair.target, "--draft", drafter, "--threads", 1, "--prompt", "two")
    saved, save = [], CostTable.save
    monkeypatch.setattr(CostTable, "save", lambda table, *a: saved.append(1) or save(table, *a))
    for _ in range(2):
        assert dspark(*words, "--max-new-tokens", 8, "--schedule", "lagged").status == 0
    assert len(saved) == 1
