"""`dspark bench` on a tiny pair: every schedule, its figures, its files."""

import json
import sys
from types import SimpleNamespace

import pytest

from dspark.cli.measure import bench
from dspark.evaluation.load.sweep import CONTENDERS
from dspark.targets.target import Target
from tests.helpers.checkpoints import save_published
from tests.helpers.drafters import tiny_backbone, tiny_eagle3

QUICK = ("--requests", 2, "--max-new-tokens", 8, "--threads", 1, "--json")
ROW = {
    "concurrency", "schedule", "tokens_per_s", "ci95", "tokens_per_s_per_user",
    "tokens_per_s_per_user_median", "ttft_ms", "accepted_length", "verified_per_request",
    "draft_ms", "schedule_ms", "verify_ms", "identical", "requests", "repeats",
}  # fmt: skip


@pytest.fixture(scope="module")
def mtp(pair, tmp_path_factory):
    """An MTP-1 drafter of the tiny target."""
    target = Target.load(pair.target, offline=True)
    shape = {"intermediate_size": 32, "num_heads": 2, "num_kv_heads": 1}
    drafter = tiny_eagle3(
        target,
        taps=(target.num_layers - 1,),
        backbone=tiny_backbone(target.hidden_size, 1, **shape),
        ttt_length=1,
        max_position_embeddings=160,
    )
    path = tmp_path_factory.mktemp("mtp")
    save_published(drafter, path, dtype=None)
    return path


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    words = ("how many apples", "a table for two", "left", "two apples", "for how many")
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in words))
    return path


def test_every_schedule_at_every_concurrency(dspark, pair, mtp, prompts, tmp_path):
    out = tmp_path / "made" / "here"
    result = dspark(
        "bench", pair.attached, "--mtp", mtp, "--prompts", prompts, "--concurrency", "2,1",
        "--repeats", 2, "--floors", "0.001,1e9", "--out", out, *QUICK,
    )  # fmt: skip
    assert result.status == 0
    report = result.json
    rows = report["rows"]
    names = ["off", "fixed", "mtp1", "prefix", "lagged"]
    assert [(row["concurrency"], row["schedule"]) for row in rows] == [
        (users, name) for users in (1, 2) for name in names
    ]
    by = {(row["concurrency"], row["schedule"]): row for row in rows}
    for row in rows:
        assert set(row) == ROW
        assert (row["repeats"], row["requests"]) == (2, max(2, 2 * row["concurrency"]))
        assert row["ci95"][0] <= row["tokens_per_s"] <= row["ci95"][1]
        assert row["identical"] == (None if row["schedule"] == "off" else 1.0)
    for users in (1, 2):
        assert by[users, "off"]["verified_per_request"] == 1
        assert by[users, "off"]["draft_ms"] == 0
        assert by[users, "off"]["accepted_length"] == 1
        assert 1 < by[users, "mtp1"]["verified_per_request"] <= 2
        assert 2 < by[users, "fixed"]["verified_per_request"] <= 5
        assert by[users, "fixed"]["draft_ms"] > 0
    low, high = report["at_floor"]
    assert low["tokens_per_s"]["off"] == max(by[users, "off"]["tokens_per_s"] for users in (1, 2))
    assert set(high["tokens_per_s"].values()) == {None}
    assert len(report["over_mtp1"]) == 8
    assert report["costs_measured"] is True
    assert "Measured what steps of up to 2 requests cost" in result.err
    assert report["out"] == [str(out / f"load.{kind}") for kind in ("json", "png", "svg")]
    written = json.loads((out / "load.json").read_text())
    assert written == {name: report[name] for name in written}
    assert (out / "load.svg").stat().st_size > 0


def test_a_second_run_finds_the_costs_measured(dspark, pair, prompts):
    words = ("bench", pair.attached, "--prompts", prompts, "--schedule", "lagged", *QUICK)
    words = (*words, "--concurrency", 1, "--repeats", 1)
    assert [dspark(*words).json["costs_measured"] for _ in range(2)] == [True, False]


def test_without_an_mtp_drafter_mtp1_is_left_out_and_said(dspark, pair, prompts):
    words = ("bench", pair.target, "--draft", pair.drafter, "--prompts", prompts, *QUICK)
    words = (*words, "--concurrency", 1, "--repeats", 1)
    result = dspark(*words)
    assert result.status == 0
    assert [row["schedule"] for row in result.json["rows"]] == ["off", "fixed", "prefix", "lagged"]
    assert result.json["over_mtp1"] == []
    assert bench.NO_MTP in result.err
    asked = dspark(*words, "--schedule", "off,mtp1")
    assert asked.status == 2
    assert "'mtp1' needs an MTP drafter" in asked.err


def test_a_drafter_that_is_mtp_is_its_own_baseline(dspark, pair, mtp, prompts):
    words = ("bench", pair.target, "--draft", mtp, "--prompts", prompts, "--schedule", "mtp1")
    result = dspark(*words, "--concurrency", 1, "--repeats", 1, *QUICK)
    assert [row["schedule"] for row in result.json["rows"]] == ["mtp1"]


def test_the_bundled_model_has_a_baseline_of_its_own(monkeypatch):
    loaded = []
    monkeypatch.setattr("dspark.engine.loading.load_draft", lambda *a, **k: loaded.append(a[1]))
    options = SimpleNamespace(target="bundled", mtp=None, offline=False)
    model = SimpleNamespace(target=None, drafter=None)
    bench._mtp(options, model)
    bench._mtp(SimpleNamespace(target="other", mtp=None, offline=False), model)
    assert loaded == ["bundled-mtp"]


def test_without_matplotlib_the_figures_are_still_written_as_json(
    dspark, pair, prompts, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = dspark(
        "bench", pair.attached, "--prompts", prompts, "--schedule", "off,fixed", "--concurrency",
        1, "--repeats", 1, "--temperature", 1, "--out", tmp_path, *QUICK,
    )  # fmt: skip
    assert result.status == 0
    assert result.json["out"] == [str(tmp_path / "load.json")]
    assert "pip install 'dspark[plots]'" in result.err
    assert {row["identical"] for row in result.json["rows"]} == {None}


def test_a_target_without_drafter_decodes_plainly_or_says_what_is_missing(dspark, pair, prompts):
    words = ("bench", pair.target, "--prompts", prompts, "--concurrency", 1, "--repeats", 1)
    refused = dspark(*words, *QUICK)
    assert refused.status == 2
    assert "'fixed' needs a drafter" in refused.err
    plain = dspark(*words, "--schedule", "off", *QUICK)
    assert [row["schedule"] for row in plain.json["rows"]] == ["off"]
    assert plain.json["costs_measured"] is False


def test_the_command_knows_every_way():
    assert bench.ALL_SCHEDULES == CONTENDERS
