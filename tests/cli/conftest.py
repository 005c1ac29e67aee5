"""A tiny pair on disk, and a way to run the command in this process."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from dspark.cli.main import main
from dspark.data.tokenizer import train_tokenizer
from dspark.drafters.checkpoint import save_attached, save_published
from dspark.drafters.config import BackboneConfig, DSparkConfig
from dspark.drafters.dspark import DSparkDrafter
from dspark.targets.target import Target

WIDTH, LAYERS, VOCAB, CONTEXT, BLOCK = 16, 4, 300, 160, 4


@dataclass(frozen=True)
class Pair:
    """Directories: a target with its drafter attached, the target alone, the drafter alone."""

    attached: Path
    target: Path
    drafter: Path


@dataclass(frozen=True)
class Result:
    """What a command line did."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.out.splitlines()[-1])


def tiny_target(seed: int, width: int = WIDTH) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.2,
        eos_token_id=2,
    )
    return Qwen3ForCausalLM(config)


def tiny_drafter(target: Target, taps: tuple[int, ...] = (0, 2)) -> DSparkDrafter:
    config = DSparkConfig(
        backbone=BackboneConfig(
            hidden_size=target.hidden_size,
            intermediate_size=32,
            num_layers=1,
            num_heads=2,
            num_kv_heads=1,
            head_dim=8,
            num_taps=len(taps),
        ),
        vocab_size=VOCAB,
        block_size=BLOCK,
        mask_token_id=3,
        target_layer_ids=taps,
        num_target_layers=LAYERS,
        markov_rank=4,
        max_position_embeddings=CONTEXT,
    )
    generator = torch.Generator().manual_seed(1)
    return DSparkDrafter.from_target(target.parts(), config, generator=generator)


def write_pair(root: Path, width: int = WIDTH) -> Pair:
    tokenizer = train_tokenizer(["how many apples are left", "a table for two"] * 4, VOCAB)
    model = tiny_target(seed=width, width=width)
    for name in ("attached", "target"):
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    drafter = tiny_drafter(Target.from_model(model))
    save_attached(drafter, root / "attached", dtype=None)
    save_published(drafter, root / "drafter", dtype=None)
    return Pair(root / "attached", root / "target", root / "drafter")


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="session")
def wide_pair(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("wide"), width=32)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def dspark(capsys):
    def run(*words: object) -> Result:
        capsys.readouterr()
        status = main([str(word) for word in words])
        captured = capsys.readouterr()
        return Result(status, captured.out, captured.err)

    return run
