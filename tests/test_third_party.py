"""A real third-party model, from its own samples to a served drafter, by the command line alone."""

import json
from pathlib import Path

import pytest

from dspark.cli.main import main

STORIES = Path(__file__).parents[2] / "shared" / "models" / "stories260K"
RECIPE = """
kind: drafter
target: {target}
drafter: {{num_layers: 1, block_size: 4, markov_rank: 32, target_layer_ids: [0, 2, 4]}}
loss: {{ce: 1.0, ce_first_steps: 60}}
samples: {{root: {root}, paths: [stories.jsonl.gz], max_length: 96, num_anchors: 24}}
optimiser: {{name: muon, learning_rate: 0.01, matrix_learning_rate: 0.01}}
run: {{output_dir: {root}/drafter, steps: 60, rows: 8}}
"""


@pytest.mark.skipif(not STORIES.is_dir(), reason="needs ../shared")
def test_train_and_serve_stories260k(tmp_path, capsys):
    def run(*words):
        assert main([str(word) for word in (*words, "--json")]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    prompts, stories = tmp_path / "prompts.jsonl", tmp_path / "stories.jsonl.gz"
    prompts.write_text('{"prompt": "Once upon a time"}\n' * 48)
    words = ["--prompts", prompts, "--out", stories, "--batch-size", 48, "--max-new-tokens", 80]
    answered = run("data", "regenerate", STORIES, *words)
    assert (answered["records"], answered["failed"]) == (48, 0)

    (tmp_path / "recipe.yaml").write_text(RECIPE.format(target=STORIES, root=tmp_path))
    trained = run("train", tmp_path / "recipe.yaml")
    assert trained["steps"] == 60

    words = ["--prompt", "Once upon a time", "--prompt", "Lily and Tom", "--max-new-tokens", 64]
    report = run("generate", STORIES, "--draft", tmp_path / "drafter", *words, "--compare")
    assert report["identical"] is True
    assert report["accepted_length"] > 1.1
    assert report["verified"] >= report["accepted"] > 0
    control = run("generate", STORIES, "--draft", "ngram", *words, "--compare")
    assert control["identical"] is True
    assert control["accepted_length"] < report["accepted_length"]
