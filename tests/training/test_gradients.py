"""Every head and loss: two processes (gloo), sharded or not, find the gradients of one.

Losses read weights (a head's tables, the final norm) outside the forward pass of the module that
has them; a sharded weight is whole only within a part of a step.
"""

import json

import pytest
import torch

from dspark.training.language_model import prepare_tokenizer
from dspark.training.parallel import World
from dspark.training.recipe import load_recipe
from tests.helpers.samples import write_samples
from tests.helpers.targets import tiny_llama

DRAFTER = """
kind: drafter
target: {root}/target
samples: {{root: {root}, paths: [s.jsonl.gz], max_length: 32, min_supervised: 2}}
run: {{output_dir: {root}/unused, steps: 10, rows: 4}}
"""
TARGET = """
kind: target
architecture: {{vocab_size: 300, hidden_size: 16, intermediate_size: 16, num_hidden_layers: 2,
  num_attention_heads: 2, num_key_value_heads: 1, head_dim: 8, max_position_embeddings: 64}}
corpus: {{root: {root}, sources: [{{path: talk.jsonl}}]}}
run: {{output_dir: {root}/model, steps: 10, rows: 4, row_tokens: 32, device: cpu}}
"""


@pytest.fixture(scope="module")
def worker(load_script):
    return load_script("gradients_worker.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A target, and samples of which few have many supervised tokens."""
    root = tmp_path_factory.mktemp("gradients")
    tiny_llama().save_pretrained(root / "target")

    def prompt_len(i, length):
        return 1 if i % 4 == 0 else length - 2 - i % 3

    write_samples(root / "s.jsonl.gz", 24, prompt_len)
    turns = [
        [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i} apples."}]
        for i in range(40)
    ]
    (root / "talk.jsonl").write_text("".join(json.dumps({"messages": t}) + "\n" for t in turns))
    (root / "drafter.yaml").write_text(DRAFTER.format(root=root))
    (root / "target.yaml").write_text(TARGET.format(root=root))
    prepare_tokenizer(load_recipe(str(root / "target.yaml")))
    return root


@pytest.fixture(scope="module")
def together(folder, worker, run_two):
    """Of each rank what it found, by scenario."""
    run_two(worker.__file__, folder)
    return [torch.load(folder / f"gradients_{rank}.pt") for rank in range(2)]


NAMES = (
    "vanilla", "gated", "rnn", "vanilla, other losses", "rnn of few tokens, 1 + n",
    "without confidence", "dflash", "dflash of few tokens", "eagle3", "eagle3 of few tokens",
    "mtp", "mtp of a projection, other losses", "language model",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_find_the_gradients_of_one(folder, worker, together, name):
    alone = worker.gradients(folder, name, World())
    for key, found in together[0].items():
        if key[0] != name:
            continue
        for other, tensor in together[1][key].items():
            assert torch.equal(tensor, found[other]), (key, other)
        # Of bfloat16 both sides round; what is left out or added twice is far more.
        rel = 1e-5 if "float32" in key else 0.05
        wanted = (
            alone if "float32" in key else worker.gradients(folder, name, World(), dtype=key[2])
        )
        assert found.keys() == wanted.keys()
        for parameter, tensor in wanted.items():
            assert tensor.any(), parameter
            distance = (found[parameter] - tensor).norm() / tensor.norm()
            assert distance < rel, (key, parameter, float(distance))


def test_every_scenario_is_compared(worker, together):
    assert {name for name, *_ in worker.scenarios()} == set(NAMES)
    assert list(together[0]) == list(worker.scenarios())
