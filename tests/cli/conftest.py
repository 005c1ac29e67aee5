"""A tiny pair on disk, and a way to run the command in this process."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from dspark.cli.main import main
from dspark.data.templates import train_tokenizer
from dspark.drafters.checkpoints.checkpoint import save_attached
from dspark.drafters.dspark import DSparkDrafter
from dspark.targets.target import Target
from tests.helpers.checkpoints import save_published
from tests.helpers.drafters import tiny_backbone, tiny_dspark
from tests.helpers.targets import tiny_qwen3

WIDTH, LAYERS, VOCAB, CONTEXT = 16, 4, 300, 160


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


def tiny_target(seed: int, width: int = WIDTH) -> Any:
    return tiny_qwen3(
        seed=seed,
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.2,
        eos_token_id=2,
    )


def tiny_drafter(target: Target) -> DSparkDrafter:
    taps = (0, 2)
    shape = {"intermediate_size": 32, "num_heads": 2, "num_kv_heads": 1}
    backbone = tiny_backbone(target.hidden_size, len(taps), **shape)
    return tiny_dspark(target, taps=taps, backbone=backbone, max_position_embeddings=CONTEXT)


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
