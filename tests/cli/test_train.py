import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from dspark.training.budget import Budget
from dspark.training.objective import TrainingResult

ROOT = Path(__file__).parents[2]


@pytest.fixture
def asked(monkeypatch):
    """A stand-in for training, which records what it was asked."""
    calls = []

    def run_recipe(name, overrides, *, resume, device, console, judge):
        calls.append((name, list(overrides), resume, device))
        metrics = {"accepted_length": 2.5, "real_accepted_length": 2.25}
        return TrainingResult(30, 1.25, metrics, 100.0, 4096, Path("runs/x"))

    def plan_recipe(name, overrides, *, device, console, judge):
        calls.append((name, list(overrides), device))
        return Budget(1000, 30, 30, 64.0, {"masters": 4000, "measured": 5000}, 12000, 36000, 1, 0.5)

    stand_in = ModuleType("dspark.training.run")
    stand_in.run_recipe, stand_in.plan_recipe = run_recipe, plan_recipe
    stand_in.Judge = lambda **parts: parts
    monkeypatch.setitem(sys.modules, "dspark.training.run", stand_in)
    return calls


def test_options_become_overrides_and_the_result_json(dspark, asked):
    words = ["--set", "run.steps=30", "--set", "run.rows=2", "--resume", "--device", "cpu"]
    words += ["--seed", 9, "--dtype", "bfloat16", "--json"]
    result = dspark("train", "some_recipe", *words)
    overrides = ["run.steps=30", "run.rows=2", "run.seed=9", "run.dtype=bfloat16"]
    assert asked == [("some_recipe", overrides, True, "cpu")]
    assert result.status == 0
    assert result.json == {
        "steps": 30,
        "loss": 1.25,
        "accepted_length_train": 2.5,
        "accepted_length_real": 2.25,
        "output_dir": "runs/x",
        "tokens_per_s": 100.0,
        "peak_memory_bytes": 4096,
    }


def test_the_recipe_rules_where_no_option_is_given(dspark, asked):
    result = dspark("train", "some_recipe")
    assert asked == [("some_recipe", [], False, "auto")]
    assert "step 30, loss 1.2500" in result.out


def test_a_dry_run_says_what_the_run_would_cost(dspark, asked):
    report = dspark("train", "some_recipe", "--dry-run", "--device", "cpu", "--json").json
    assert asked == [("some_recipe", [], "cpu")]
    assert (report["steps"], report["loss"], report["tokens_per_s"]) == (0, None, 128.0)
    assert report["peak_memory_bytes"] == 5000
    assert report["budget"]["parameters"] == 1000
    assert report["budget"]["seconds"] == 15.0
    assert report["budget"]["disk_bytes"] == 36000


@pytest.mark.parametrize(
    ("recipe", "words", "sentence"),
    [
        ("no_such_recipe", [], "There is no recipe 'no_such_recipe'"),
        ("bundled_target", ["--set", "run.colour=red"], "run.colour"),
        ("bundled_target", ["--set", "run.steps"], "not of the form key=value"),
        ("bundled_target", ["--dtype", "float16"], "run.dtype"),
    ],
)
def test_a_recipe_that_cannot_be_used_is_status_2(dspark, recipe, words, sentence):
    result = dspark("train", recipe, *words)
    assert (result.status, result.out) == (2, "")
    assert sentence in result.err
    assert result.err.startswith("dspark: ")


@pytest.mark.parametrize("command", [["train"], ["data", "cache"]])
def test_the_names_of_bundled_recipes_are_listed(dspark, command):
    result = dspark(*command, "--list")
    assert result.status == 0
    assert "bundled_target          a target from scratch\n" in result.out
    assert "eagle3_qwen3_8b         eagle3 for Qwen/Qwen3-8B\n" in result.out


RECIPE = """
kind: target
architecture: {vocab_size: 300, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1,
  num_attention_heads: 2, num_key_value_heads: 1, head_dim: 8}
corpus: {sources: [{path: corpus.jsonl}]}
run: {output_dir: OUTPUT, steps: 2, rows: 1, row_tokens: 16, save_every: 1}
"""


@pytest.fixture
def tiny(tmp_path):
    """The words that train a tiny model."""
    turn = '{"role": "%s", "content": "two apples and %d more"}'
    lines = [f'{{"messages": [{turn % ("user", i)}, {turn % ("assistant", i)}]}}' for i in range(8)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(RECIPE.replace("OUTPUT", str(tmp_path / "run")))
    return ["train", str(recipe), "--set", f"corpus.root={tmp_path}", "--device", "cpu", "--json"]


def test_a_tiny_run_from_recipe_to_weights(dspark, tmp_path, tiny):
    planned = dspark(*tiny, "--dry-run")
    assert planned.status == 0
    assert planned.json["budget"]["steps"] == 2
    assert "Budget: " in planned.err
    report = dspark(*tiny).json
    assert report["steps"] == 2
    assert report["output_dir"] == str(tmp_path / "run")
    assert report["accepted_length_train"] is None
    assert report["loss"] > 0
    assert (tmp_path / "run" / "model.safetensors").is_file()
    again = dspark(*tiny)
    assert again.status == 1
    assert "already holds a run" in again.err


def test_a_process_that_is_terminated_and_resumed_gives_the_same_weights(dspark, tmp_path, tiny):
    longer = [*tiny, "--set", "run.steps=400", "--set", "run.save_every=1000"]
    whole = ["--set", f"run.output_dir={tmp_path}/whole"]
    assert dspark(*longer, *whole).status == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "dspark", *longer, "--set", "run.log_every=1"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    log = tmp_path / "run" / "log.jsonl"
    deadline = time.monotonic() + 120
    while process.poll() is None and not (log.is_file() and log.stat().st_size):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 1, said
    assert "Stopped by SIGTERM after step" in said
    assert "go on with --resume" in said
    assert json.loads(log.read_text().splitlines()[-1])["step"] < 400
    assert dspark(*longer, "--resume").status == 0
    mine, theirs = (load_file(tmp_path / n / "model.safetensors") for n in ("run", "whole"))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
