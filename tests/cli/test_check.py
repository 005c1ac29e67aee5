import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dspark.cli.measure.check import closing
from dspark.evaluation.check.findings import CheckReport, Finding, LiveRun
from dspark.sources.gguf_file import write_gguf

KEYS = {"ok", "expected_speedup", "findings"}
QUICK = ("--max-new-tokens", 12, "--threads", 1)


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    questions = ("how many apples", "a table for two", "left", "two")
    path.write_text("".join(json.dumps({"turns": [q]}) + "\n" for q in questions))
    return path


@pytest.fixture
def drafter(pair, tmp_path):
    """A copy of the drafter's directory to spoil."""
    return Path(shutil.copytree(pair.drafter, tmp_path / "drafter"))


def change_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_drafter_that_is_always_wrong_is_an_error_and_status_1(dspark, pair, drafter, prompts):
    path = drafter / "model.safetensors"
    state = load_file(path)
    save_file(state | {"norm.weight": -state["norm.weight"]}, path)
    words = [pair.target, "--draft", drafter, "--prompts", prompts, *QUICK]
    result = dspark("check", *words, "--json")
    report = result.json
    assert result.status == 1
    assert report.keys() >= KEYS
    assert report["ok"] is False
    assert all(f.keys() == {"what", "severity", "remedy"} for f in report["findings"])
    assert "hardly more than plain decoding" in report["findings"][0]["what"]
    assert [run["temperature"] for run in report["runs"]] == [0, 1]
    assert report["expected_speedup"] == report["runs"][0]["speedup"] > 0
    tried = [trial["what"] for trial in report["trials"]]
    assert tried[:2] == ["every layer id lowered by 1", "every layer id raised by 1"]
    assert tried[2:] == ["slot 0 of every block thrown away", "raw prompts"]
    assert len(result.out.splitlines()) == 1
    assert "hardly more" in " ".join(result.err.split())


def test_prompt_lookup_passes_and_the_last_line_says_how_fast(dspark, pair, prompts):
    result = dspark("check", pair.target, "--draft", "ngram", "--prompts", prompts, *QUICK)
    assert result.status == 0
    last = result.out.splitlines()[-1]
    assert last.startswith(("The drafter", "Undecided"))
    assert last.endswith("times plain decoding.")


@pytest.mark.parametrize("words", [(), ("--draft", "none")])
def test_a_target_without_a_drafter_says_what_to_do(dspark, pair, words):
    result = dspark("check", pair.target, *words, "--json")
    assert result.status == 1
    assert result.json["expected_speedup"] is None
    (finding,) = result.json["findings"]
    assert "has no drafter" in finding["what"]
    assert "--draft ngram" in finding["remedy"]


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"vocab_size": 290}, "vocab_size is 290"),
        ({"mask_token_id": 999}, "mask_token_id 999"),
        ({"num_target_layers": 9, "target_layer_ids": [0, 7]}, "target has 4 layers"),
        ({"block_size": 0}, "block_size 0"),
    ],
)
def test_what_loading_refuses_is_a_finding(dspark, pair, drafter, changes, what):
    if "vocab_size" in changes:
        shorten(drafter, 290)
    change_config(drafter, **changes)
    result = dspark("check", pair.target, "--draft", drafter, "--json")
    assert result.status == 1
    (finding,) = result.json["findings"]
    assert what in finding["what"]
    assert finding["severity"] == "error"
    assert finding["remedy"]


def shorten(directory, rows):
    """Cut every vocabulary-sized table, as a drafter made without the padding would have it."""
    path = directory / "model.safetensors"
    state = {k: t[:rows].clone() if t.shape[0] == 300 else t for k, t in load_file(path).items()}
    save_file(state, path)


def test_a_missing_head_is_a_finding(dspark, pair, drafter):
    path = drafter / "model.safetensors"
    state = {k: t for k, t in load_file(path).items() if not k.startswith("confidence_head")}
    save_file(state, path)
    result = dspark("check", pair.target, "--draft", drafter, "--json")
    assert result.status == 1
    assert "lacks the tensors confidence_head" in result.json["findings"][0]["what"]
    assert result.json["findings"][0]["remedy"].startswith("Fetch or save it again")
    change_config(drafter, enable_confidence_head=False)
    result = dspark("check", pair.target, "--draft", drafter, *QUICK, "--json")
    assert any(
        f["severity"] == "note" and "no confidence head" in f["what"]
        for f in result.json["findings"]
    )


def test_a_target_that_cannot_be_loaded_is_no_finding(dspark, tmp_path):
    result = dspark("check", tmp_path / "nowhere", "--json")
    assert result.status == 1
    assert result.out == ""
    assert "is not a directory" in result.err


@pytest.mark.parametrize("words", [("--batch-size", 0), ("--max-new-tokens", 0)])
def test_counts_below_one_are_wrong_usage(dspark, words):
    result = dspark("check", "x", *words)
    assert result.status == 2
    assert f"{words[0]} is 0" in result.err


def test_a_limit_must_be_above_zero_and_steps_are_told(dspark, pair, prompts):
    assert dspark("check", "x", "--time-limit", 0).status == 2
    words = ("--prompts", prompts, "--time-limit", "0.001", "--json", *QUICK)
    result = dspark("check", pair.target, "--draft", "ngram", *words)
    assert "Measuring the speed at temperature 0, plainly and drafting ..." in result.err
    notes = [f["what"] for f in result.json["findings"] if f["severity"] == "note"]
    assert any("limit of 0.001 seconds" in note for note in notes)


def test_a_missing_prompt_file_is_said_before_loading(dspark, tmp_path):
    result = dspark("check", "x", "--prompts", tmp_path / "none.jsonl")
    assert result.status == 1
    assert "does not exist" in result.err


def test_the_bundled_pair_fits(dspark):
    result = dspark("check", "bundled", "--threads", 1, "--json")
    report = result.json
    assert result.status == 0
    assert report["ok"] is True
    assert report["expected_speedup"] > 0
    assert [f for f in report["findings"] if f["severity"] == "error"] == []
    assert all(run["accepted_length"] > 1.3 for run in report["runs"])


def test_closing_sentences():
    def run_of(speed, tokens=60):
        return LiveRun(0.0, tokens, 2.5, 0.8, speed, 1.0)

    error, note = Finding("a", "error", "b"), Finding("a", "note", "b")
    assert closing(CheckReport((error, error))) == "Not ready for speculative decoding: 2 errors."
    assert closing(CheckReport((), (run_of(0.5, tokens=9),))).startswith("Undecided: too few")
    assert closing(CheckReport((note,), (run_of(2.0),))) == (
        "The drafter fits; tokens gained per round: 2.50 at temperature 0; measured speed on this "
        "machine: 2.00 times plain decoding."
    )
    assert closing(CheckReport((), (run_of(0.5),))).startswith(
        "The drafter works, but does not pay on this machine; "
    )
    warned = (Finding("a", "warning", "b"), note)
    assert closing(CheckReport(warned, (run_of(2.0),))).startswith(
        "The drafter works, with 1 warning; "
    )


def test_another_engine_is_asked_by_the_drafter_alone(dspark, pair):
    result = dspark("check", pair.drafter, "--engine", "llama.cpp", "--json")
    assert result.status == 0
    report = result.json
    assert report["ok"] is (report["why_not"] == [])
    assert "llama.cpp" in report["engine"]
    assert report["loses"]


def test_a_file_of_another_model_is_no_drafter_of_any_engine(dspark, tmp_path):
    pytest.importorskip("gguf")
    path = tmp_path / "target.gguf"
    write_gguf(path, "llama", {}, {"token_embd.weight": torch.zeros(8, 32)}, "f16")
    result = dspark("check", path, "--engine", "vllm")
    assert result.status == 1
    assert "a model of architecture llama, which is no drafter" in result.err
    assert result.err.count("\n") == 1


def test_a_draft_beside_an_engine_is_wrong_usage(dspark, pair):
    result = dspark("check", pair.target, "--draft", pair.drafter, "--engine", "vllm")
    assert result.status == 2
    assert "--draft" in result.err
