"""A tiny Llama as safetensors and as GGUF, and a hub that cannot be reached."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dspark.sources import cache
from tests.helpers.gguf import tiny_llama_with_tokenizer, write_gguf


@dataclass(frozen=True)
class Twins:
    """One model in two formats."""

    model: Any
    tokenizer: Any
    directory: Path
    gguf: Path


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("twins")
    model, tokenizer = tiny_llama_with_tokenizer()
    model.save_pretrained(root / "safetensors")
    tokenizer.save_pretrained(root / "safetensors")
    gguf = write_gguf(root / "tiny.gguf", model, tokenizer)
    return Twins(model, tokenizer, root / "safetensors", gguf)


@pytest.fixture
def twins(written, tmp_path):
    """The same with a GGUF of its own, which a test may damage."""
    folder = tmp_path / "folder"
    folder.mkdir()
    gguf = Path(shutil.copy2(written.gguf, folder))
    return Twins(written.model, written.tokenizer, written.directory, gguf)


@pytest.fixture
def no_hub(monkeypatch):
    """Nothing answers; how often it was tried."""
    tries = []

    class Session:
        def head(self, url, timeout):
            tries.append(url)
            raise OSError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.get_session", Session)
    monkeypatch.setattr(cache, "_unreachable", {})
    return tries
