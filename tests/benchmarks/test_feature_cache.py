"""The feature cache's measurement runs from end to end on a tiny pair."""

import pytest

from benchmarks import feature_cache
from benchmarks.paired_lengths import compare
from dspark.request import Stats

# The tiny pair's folder has held-out files only: they stand in for the training corpora.
HELDOUT = dict.fromkeys(feature_cache.DOMAINS, ("messages", "sgd_dialogues_dev.jsonl.gz"))
OPTIONS = (
    "--caches", "0.1/0.02", "bfloat16", "--seeds", "2", "--steps", "3", "--rows", "2",
    "--train-prompts", "3", "--answer-tokens", "12", "--prompts", "2", "--max-new-tokens", "8",
    "--max-length", "200", "--batch-size", "4",
)  # fmt: skip


def test_it_measures_size_and_accepted_length(run, monkeypatch):
    monkeypatch.setattr(feature_cache, "CORPUS", HELDOUT)
    line = run(feature_cache, *OPTIONS)
    coded, exact = line["caches"]["0.1/0.02"], line["caches"]["bfloat16"]
    for found in (coded, exact):
        assert found["published_bytes_per_token"] == 2 * 2 * 16 + 6
        assert found["ratio"] == pytest.approx(
            found["bytes_per_token"] / found["published_bytes_per_token"], rel=1e-3
        )
        assert found["size_reached"] is (found["ratio"] <= 0.25)
        for name in ("t0", "t1"):
            row = found["accepted_length"][name]
            assert len(row["online"]) == len(row["cache"]) == 2
            assert row["ci95"][0] <= row["relative_difference"] <= row["ci95"][1]
    assert exact["feature_bits_per_number"] == exact["teacher_bits_per_number"] == 16
    assert coded["feature_bits_per_number"] < 6
    assert exact["qwen3_4b"]["published_bytes_per_token"] == 30726
    assert line["online_bytes_per_token"] == 0
    assert exact["feature_relative_error"] < 3e-3 < coded["feature_relative_error"] < 0.15
    assert exact["teacher_total_variation"] < coded["teacher_total_variation"] < 0.1


def test_sizes_can_be_measured_alone(run, monkeypatch):
    monkeypatch.setattr(feature_cache, "CORPUS", HELDOUT)
    monkeypatch.setattr(feature_cache, "train_one", None)
    line = run(feature_cache, *OPTIONS, "--seeds", "0")
    assert set(line["caches"]) == {"0.1/0.02", "bfloat16"}
    assert "accepted_length" not in line["caches"]["bfloat16"]


def test_a_loss_is_seen():
    def runs(gained):
        return [[Stats(rounds=10, tokens=gained + p % 3) for p in range(30)] for _ in range(3)]

    worse = compare(runs(20), runs(22), seed=0)
    assert worse["relative_difference"] == pytest.approx(-2 / 23)
    assert worse["ci95"][1] < 0
    same = compare(runs(20), runs(20), seed=0)
    assert same["ci95"] == [0, 0]
