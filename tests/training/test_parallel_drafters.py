"""Drafters trained by two processes on a CPU (gloo) take the steps that one process takes."""

import json

import pytest
import torch
from rich.console import Console

from dspark.drafters.checkpoints.checkpoint import load_drafter
from dspark.request import Stats
from dspark.training.run import Judge, run_recipe
from tests.helpers.samples import write_samples
from tests.helpers.targets import tiny_llama

RECIPE = """
kind: drafter
algorithm: {algorithm}
target: {root}/target
samples: {{root: {root}, paths: [s.jsonl.gz], max_length: 32, min_supervised: 2}}
optimiser: {{learning_rate: 0.01}}
evaluation: {{heldout: 4, max_new_tokens: 6}}
run: {{output_dir: unused, steps: 10, rows: 8, log_every: 1, save_every: 100, evaluate_every: 10}}
"""
DRAFTERS = {
    "dspark": "{num_layers: 1, block_size: 4, markov_rank: 8, target_layer_ids: [0, 2], "
    "mask_token_id: 39}",
    "eagle3": "{ttt_length: 3, target_layer_ids: [0, 2]}",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A target, and samples of which few have many supervised tokens."""
    root = tmp_path_factory.mktemp("drafters")
    tiny_llama().save_pretrained(root / "target")

    def prompt_len(i, length):
        return 1 if i % 4 == 0 else length - 2 - i % 3

    write_samples(root / "s.jsonl.gz", 48, prompt_len)
    for algorithm in DRAFTERS:
        (root / f"{algorithm}.yaml").write_text(RECIPE.format(algorithm=algorithm, root=root))
    return root


def options(folder, algorithm, *others):
    drafter = f"drafter={DRAFTERS[algorithm]}"
    anchors = ["samples.num_anchors=6"] if algorithm == "dspark" else []
    return [drafter, *anchors, *others]


def losses(directory):
    lines = (directory / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.parametrize(
    ("algorithm", "parallel", "accumulate"),
    [
        ("dspark", "fsdp", 2),
        ("eagle3", "ddp", 2),
        pytest.param("dspark", "ddp", 1, marks=pytest.mark.slow),
        pytest.param("eagle3", "fsdp", 1, marks=pytest.mark.slow),
    ],
)
def test_two_processes_take_the_steps_of_one(folder, run_two, algorithm, parallel, accumulate):
    alone = folder / f"{algorithm}_alone"
    if not alone.is_dir():
        run_recipe(
            str(folder / f"{algorithm}.yaml"),
            options(folder, algorithm, f"run.output_dir={alone}"),
            device="cpu",
            console=Console(quiet=True),
            judge=Judge(lambda target, drafter, requests: Stats(), lambda target, prompts: []),
        )
    both = folder / f"{algorithm}_{parallel}_{accumulate}"
    others = [f"run.output_dir={both}", f"run.parallel={parallel}", f"run.accumulate={accumulate}"]
    words = [w for o in options(folder, algorithm, *others) for w in ("--set", o)]
    run_two("-m", "dspark", "train", folder / f"{algorithm}.yaml", *words, "--device", "cpu")
    assert len(losses(alone)) == 10
    assert losses(both) == pytest.approx(losses(alone), rel=1e-5)
    mine, theirs = (load_drafter(directory).state_dict() for directory in (alone, both))
    for name, tensor in mine.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-2, atol=1e-4)
    assert load_drafter(both / "best").taps == (0, 2)
    last = json.loads((both / "log.jsonl").read_text().splitlines()[-1])
    assert last["real_accepted_length"] >= 1
