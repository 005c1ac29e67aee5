"""A DeepSeek-V4 target with a draft module of its own, from the command line."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.deepseek_v4 import write_target

RUN = ("--dtype", "float32", "--threads", 1, "--json")


@pytest.fixture(scope="module")
def v4(tmp_path_factory):
    return write_target(tmp_path_factory.mktemp("target"))


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    words = ("how many apples", "a table for two", "left", "two")
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in words * 3))
    return path


def test_check_lists_the_module_and_loads_nothing(dspark, v4, tmp_path, monkeypatch):
    copy = shutil.copytree(v4, tmp_path / "copy")
    (copy / "model-00001.safetensors").unlink()
    result = dspark("check", copy, "--json")
    assert result.status == 0, result.err
    module, report = result.json["draft_module"], result.json
    assert report["ok"] is True
    assert report["expected_speedup"] is None
    tensors = load_file(copy / "model-00002.safetensors")
    assert module["tensors"] == len(tensors) == module["kinds"]["float32"]
    assert module["bytes"] == sum(x.numel() * x.element_size() for x in tensors.values())
    assert (module["stages"], module["block_size"], module["markov_rank"]) == (3, 5, 64)
    assert (module["target_layer_ids"], module["num_target_layers"]) == ([1, 3], 4)
    assert (module["shards"], module["all_shards"]) == (["model-00002.safetensors"], 2)
    assert all(f.keys() == {"what", "severity", "remedy"} for f in report["findings"])
    said = report["findings"][0]["what"]
    assert "3 stages, 5 drafts a round from outputs of the layers [1, 3] of 4, window 8" in said


def test_check_names_what_is_wrong_with_it(dspark, v4, tmp_path):
    copy = shutil.copytree(v4, tmp_path / "copy")
    (copy / "model-00002.safetensors").unlink()
    result = dspark("check", copy, "--json")
    assert result.status == 1
    assert result.json["ok"] is False
    assert "model-00002.safetensors is missing" in result.json["findings"][0]["what"]


def test_generating_without_naming_a_drafter_drafts_and_changes_nothing(dspark, v4, prompts):
    result = dspark("generate", v4, "--prompts", prompts, "--compare", "--max-new-tokens", 8, *RUN)
    assert result.status == 0, result.err
    assert result.json["identical"] is True
    assert result.json["verified"] > 0


def test_to_a_drafter_by_itself_and_back(dspark, v4, tmp_path):
    alone, back = tmp_path / "alone", tmp_path / "back"
    there = dspark("convert", v4, alone, "--to", "deepspec", "--target", v4, "--json")
    assert there.status == 0, there.err
    again = dspark("convert", alone, back, "--to", "deepseek_v4", "--target", v4, "--json")
    assert again.status == 0, again.err
    before, after = load_file(v4 / "model-00002.safetensors"), load_file(back / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    for layout in ("speculators", "sglang"):
        refused = dspark("convert", v4, tmp_path / "no", "--to", layout, "--target", v4)
        assert refused.status == 1
        assert not (tmp_path / "no").exists()


def test_calibration_stands_beside_the_target(dspark, v4, prompts, tmp_path):
    copy = shutil.copytree(v4, tmp_path / "copy")
    result = dspark("calibrate", copy, "--prompts", prompts, "--max-new-tokens", 24, *RUN)
    assert result.status == 0, result.err
    assert len(result.json["temperatures"]) == 5
    assert (copy / "calibration.json").is_file()


@pytest.mark.parametrize(
    ("engine", "runs"), [("vllm", True), ("sglang", False), ("llama.cpp", False)]
)
def test_other_engines_are_spoken_of_truly(dspark, v4, engine, runs):
    result = dspark("check", v4, "--engine", engine, "--json")
    assert result.json["ok"] is runs
    if runs:
        assert "GPU only" in result.json["notes"][0]
