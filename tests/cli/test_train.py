import sys
from pathlib import Path
from types import ModuleType

import pytest

from dspark.training.loop import TrainingResult


@pytest.fixture
def asked(monkeypatch):
    """A stand-in for training, which records what it was asked."""
    calls = []

    def run_recipe(name, overrides, *, resume, device, console):
        calls.append((name, list(overrides), resume, device))
        metrics = {"accepted_length": 2.5}
        return TrainingResult(30, 1.25, metrics, 100.0, 4096, Path("runs/x"))

    stand_in = ModuleType("dspark.training.run")
    stand_in.run_recipe = run_recipe
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
        "output_dir": "runs/x",
        "tokens_per_s": 100.0,
        "peak_memory_bytes": 4096,
    }


def test_the_recipe_rules_where_no_option_is_given(dspark, asked):
    result = dspark("train", "some_recipe")
    assert asked == [("some_recipe", [], False, "auto")]
    assert "step 30, loss 1.2500" in result.out


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


RECIPE = """
kind: target
architecture: {vocab_size: 300, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1,
  num_attention_heads: 2, num_key_value_heads: 1, head_dim: 8}
corpus: {sources: [{path: corpus.jsonl}]}
run: {output_dir: OUTPUT, steps: 2, rows: 1, row_tokens: 16, save_every: 1}
"""


def test_a_tiny_run_from_recipe_to_weights(dspark, tmp_path):
    turn = '{"role": "%s", "content": "two apples and %d more"}'
    lines = [f'{{"messages": [{turn % ("user", i)}, {turn % ("assistant", i)}]}}' for i in range(8)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(RECIPE.replace("OUTPUT", str(tmp_path / "run")))
    words = ["train", recipe, "--set", f"corpus.root={tmp_path}", "--json"]
    report = dspark(*words, "--device", "cpu").json
    assert report["steps"] == 2
    assert report["output_dir"] == str(tmp_path / "run")
    assert report["accepted_length_train"] is None
    assert report["loss"] > 0
    assert (tmp_path / "run" / "model.safetensors").is_file()
    again = dspark(*words, "--device", "cpu")
    assert again.status == 1
    assert "already holds a run" in again.err
