"""Drafters for SGLang: what is written, what is refused, and what its own parsers make of it.

The real SGLang is asked where DSPARK_SGLANG names its Python; no GPU is needed to parse.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from dspark.drafters.checkpoints.checkpoint import load_drafter, save
from dspark.drafters.checkpoints.eagle import beyond_sglang, sglang_options
from dspark.errors import CompatibilityError
from dspark.integrations.engines import (
    sglang_arguments,
    takes_temperatures,
    write_temperatures,
)
from dspark.scheduling.calibration import Rounds
from dspark.scheduling.calibration_file import calibrate
from dspark.targets.target import Target
from tests.helpers.drafters import tiny_backbone, tiny_dspark, tiny_eagle3
from tests.helpers.targets import tiny_qwen3

NO_HEADS = {"markov_rank": 0, "confidence_head": False}
# Name -> changes of a DSpark drafter, or None for Eagle3.
CASES = {
    "dspark": {},
    "dspark_gated": {"markov_head_type": "gated"},
    "dspark_rnn": {"markov_head_type": "rnn", "sample_from_anchor": False, "block_size": 5},
    "dflash": NO_HEADS | {"sample_from_anchor": False, "block_size": 5},
    "eagle3": None,
    "eagle3_reduced": None,
}


@pytest.fixture(scope="module")
def target():
    return Target.from_model(tiny_qwen3(seed=2, num_hidden_layers=4))


def made(target, name):
    if CASES[name] is not None:
        return tiny_dspark(target, taps=(0, 2), **CASES[name])
    llama = tiny_backbone(target.hidden_size, 3, query_key_norms=False)
    known = (1, 2, 5) if name.endswith("reduced") else None
    return tiny_eagle3(target, taps=(0, 1, 2), backbone=llama, known=known)


def entry(shifts):
    logits = [[1.0 - 0.1 * k + 0.01 * (n % 7) for k in range(4)] for n in range(200)]
    rounds = Rounds.of(logits, [n % 5 for n in range(200)], [4] * 200)
    return calibrate(rounds, "token", "sampled", shifts=shifts)


@pytest.mark.parametrize("name", CASES)
def test_what_is_written_is_read_back(target, name, tmp_path):
    drafter = made(target, name)
    save(drafter, tmp_path, "sglang", dtype=None)
    back = load_drafter(tmp_path)
    for field in ("backbone", "target_layer_ids", "draft_vocab_size", "vocab_size"):
        assert getattr(back.config, field) == getattr(drafter.config, field)
    assert back.block_size == drafter.block_size == 4
    state = drafter.state_dict()
    assert back.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[n]) for n, tensor in back.state_dict().items())
    torch.testing.assert_close(back.own_head_VH, drafter.borrowed.head_VH)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (NO_HEADS, "markov_rank 0 with sample_from_anchor true"),
        (NO_HEADS | {"sample_from_anchor": False, "known": (1, 2, 5)}, "reduced vocabulary"),
        ({"known": (1, 2, 5)}, "reduced vocabulary"),
        ({"mask_token_id": None}, "learned mask embedding"),
        ({"taps": (0, 3)}, "the target's last layer"),
        ({"taps": (-1, 1)}, "the embedding's output"),
    ],
)
def test_what_sglang_would_read_otherwise_is_refused(target, changes, words, tmp_path):
    drafter = tiny_dspark(target, **({"taps": (0, 2)} | changes))
    with pytest.raises(CompatibilityError, match=words):
        save(drafter, tmp_path / "out", "sglang")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "Qwen3's layer"),
        ({"query_key_norms": False, "norm_before_residual": True}, "norm_before_residual"),
        ({"query_key_norms": False, "attention_bias": True}, "attention_bias"),
    ],
)
def test_other_layers_of_eagle3_are_refused(target, changes, words):
    backbone = tiny_backbone(target.hidden_size, 2, **changes)
    drafter = tiny_eagle3(target, taps=(0, 2), backbone=backbone)
    assert any(words in reason for reason in beyond_sglang(drafter))


def test_temperatures_go_as_sglang_reads_them(target, tmp_path):
    fitted = entry(shifts=False)
    path = write_temperatures(fitted, tmp_path)
    record = json.loads(path.read_text())
    assert record["temperatures"] == list(fitted.scaling.temperatures)
    assert len(record["ece_before"]) == len(record["ece_after"]) == 4
    assert record["num_samples"] == 200
    taken = [n for n in CASES if takes_temperatures(made(target, n))]
    assert taken == ["dspark", "dspark_gated", "dspark_rnn"]


def test_shifts_have_no_place_there(tmp_path):
    shifted = entry(shifts=True)
    assert any(shifted.scaling.shifts)
    with pytest.raises(CompatibilityError, match="--temperatures-only"):
        write_temperatures(shifted, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def said(target, tmp_path_factory):
    """What SGLang's own parsers say of each case."""
    folder, jobs = tmp_path_factory.mktemp("sglang"), []
    for name in CASES:
        drafter = made(target, name)
        save(drafter, folder / name, "sglang")
        heads = takes_temperatures(drafter)
        sts = write_temperatures(entry(shifts=False), folder / name) if heads else None
        arguments = sglang_arguments(drafter, str(folder / name), sts and str(sts))
        jobs.append(
            {
                "arguments": arguments.split(),
                "directory": str(folder / name),
                "vocab": drafter.config.vocab_size,
            }
        )
    script = Path(__file__).with_name("sglang_reads.py")
    done = subprocess.run(
        [os.environ["DSPARK_SGLANG"], str(script), json.dumps(jobs)],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(zip(CASES, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.peer
@pytest.mark.skipif("DSPARK_SGLANG" not in os.environ, reason="DSPARK_SGLANG names no Python")
@pytest.mark.parametrize("name", CASES)
def test_sglangs_parsers_read_what_is_meant(target, name, said):
    drafter, found = made(target, name), said[name]
    config, arguments = drafter.config, found["arguments"]
    assert found["taps"] == list(config.target_layer_ids)
    if name.startswith("eagle3"):
        assert found["architecture"] == "LlamaForCausalLMEagle3"
        assert arguments["speculative_num_steps"] == 4
        assert arguments["speculative_num_draft_tokens"] == 5
        assert found["vocab"] == (config.draft_vocab_size or config.vocab_size)
        return
    assert (found["block_size"], found["mask"]) == (config.block_size, config.mask_token_id)
    if name == "dflash":
        assert found["architecture"] == "DFlashDraftModel"
        assert arguments["speculative_dflash_block_size"] == 5
        return
    assert (found["drafts"], found["rank"]) == (4, config.markov_rank)
    assert found["head"] == config.markov_head_type
    assert found["from_anchor"] is config.sample_from_anchor
    assert found["temperatures"] == list(entry(shifts=False).scaling.temperatures)


def test_each_kind_has_its_own_method(target):
    methods = [sglang_options(made(target, name)).split()[1] for name in CASES]
    assert methods == ["DSPARK"] * 3 + ["DFLASH"] + ["EAGLE3"] * 2
