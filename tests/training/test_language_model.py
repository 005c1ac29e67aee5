"""A target's own training: from scratch, and on from an earlier checkpoint."""

import json

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from dspark.errors import RecipeError
from dspark.training.language_model import prepare_tokenizer
from dspark.training.recipe import load_recipe
from dspark.training.run import run_recipe

QUIET = Console(quiet=True)
RECIPE = """
kind: target
architecture: {vocab_size: 300, hidden_size: 16, intermediate_size: 16, num_hidden_layers: 2,
  num_attention_heads: 2, num_key_value_heads: 1, head_dim: 8, max_position_embeddings: 64}
corpus: {root: ROOT, sources: [{path: talk.jsonl}], heldout: {talk: {path: talk.jsonl}}}
run: {output_dir: ROOT/first, steps: 3, rows: 2, row_tokens: 32, device: cpu}
"""


@pytest.fixture
def recipe(tmp_path):
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"How many apples are {i} apples?"},
                {"role": "assistant", "content": f"They are {i} apples, I am sure."},
            ]
        }
        for i in range(40)
    ]
    (tmp_path / "talk.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("ROOT", str(tmp_path)))
    run_recipe(str(path), console=QUIET)
    return path


def second(recipe, *more):
    out = f"run.output_dir={recipe.parent / 'second'}"
    return run_recipe(str(recipe), [out, "run.steps=1", *more], console=QUIET).output_dir


def test_a_run_goes_on_from_an_earlier_checkpoint(recipe):
    first = recipe.parent / "first"
    out = second(recipe, f"initial={first}", "optimiser.learning_rate=1e-12")
    before, after = load_file(first / "model.safetensors"), load_file(out / "model.safetensors")
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    assert (out / "tokenizer.json").read_text() == (first / "tokenizer.json").read_text()
    scratch = load_file(second(recipe, f"run.output_dir={out}-2") / "model.safetensors")
    assert any(not torch.equal(before[name], tensor) for name, tensor in scratch.items())


def test_held_out_text_is_measured_at_the_end(recipe):
    report = json.loads((recipe.parent / "first" / "heldout.json").read_text())
    assert report["talk"]["bits_per_byte"] > 0
    assert report["talk"]["conversations"] == 40


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["initial=/absent"], "'/absent', which holds no tokenizer.json"),
        (["initial=FIRST", "architecture.hidden_size=32"], "not those of the recipe's"),
    ],
)
def test_an_initial_model_that_cannot_be_used_is_refused(recipe, more, sentence):
    more = [m.replace("FIRST", str(recipe.parent / "first")) for m in more]
    with pytest.raises(RecipeError, match=sentence):
        second(recipe, *more)


def test_recipes_start_from_scratch_by_default():
    assert load_recipe("bundled_target").initial is None


def test_a_tokenizer_that_other_ranks_read_is_not_written_again(recipe):
    file = recipe.parent / "first" / "tokenizer.json"
    written = file.stat().st_mtime_ns
    prepare_tokenizer(load_recipe(str(recipe)))
    assert file.stat().st_mtime_ns == written
