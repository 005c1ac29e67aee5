"""Drafters trained by two processes on a CPU (gloo) take the steps that one process takes."""

import gzip
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from dspark.drafters.checkpoint import load_drafter
from dspark.request import Stats
from dspark.training.run import Judge, run_recipe

ROOT = Path(__file__).parents[2]
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
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(root / "target")
    generator = torch.Generator().manual_seed(1)
    with gzip.open(root / "s.jsonl.gz", "wt") as file:
        for i in range(48):
            ids = torch.randint(0, 40, (12 + i % 12,), generator=generator).tolist()
            prompt = 1 if i % 4 == 0 else len(ids) - 2 - i % 3
            file.write(json.dumps({"input_ids": ids, "prompt_len": prompt}) + "\n")
    for algorithm in DRAFTERS:
        (root / f"{algorithm}.yaml").write_text(RECIPE.format(algorithm=algorithm, root=root))
    return root


def options(folder, algorithm, *others):
    drafter = f"drafter={DRAFTERS[algorithm]}"
    anchors = ["samples.num_anchors=6"] if algorithm == "dspark" else []
    return [drafter, *anchors, *others]


def run_two(folder, algorithm, *overrides):
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "dspark", "train", folder / f"{algorithm}.yaml"]
    command += [w for o in options(folder, algorithm, *overrides) for w in ("--set", o)]
    both = []
    for rank in range(2):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        place |= {"PYTHONPATH": str(ROOT)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        words = [*map(str, command), "--device", "cpu"]
        both.append(subprocess.Popen(words, cwd=ROOT, env=os.environ | place, **pipes))
    said = [process.communicate(timeout=240)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said


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
def test_two_processes_take_the_steps_of_one(folder, algorithm, parallel, accumulate):
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
    others = [f"run.output_dir={both}", f"run.parallel={parallel}"]
    run_two(folder, algorithm, *others, f"run.accumulate={accumulate}")
    assert len(losses(alone)) == 10
    assert losses(both) == pytest.approx(losses(alone), rel=1e-5)
    mine, theirs = (load_drafter(directory).state_dict() for directory in (alone, both))
    for name, tensor in mine.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-2, atol=1e-4)
    assert load_drafter(both / "best").taps == (0, 2)
    last = json.loads((both / "log.jsonl").read_text().splitlines()[-1])
    assert last["real_accepted_length"] >= 1
