"""A target's embedding and head read from its files, without loading the target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dspark.drafters.checkpoints.files import CONFIG, INDEX, fetch, read_json, read_named
from dspark.drafters.checkpoints.speculators import TARGET_ARCHITECTURES, TARGET_NAME
from dspark.errors import CheckpointError
from dspark.sources.names import public_name, target_source

_EMBEDDING, _HEAD, _TIED = "embed_tokens.weight", "lm_head.weight", "tie_word_embeddings"
# DeepSeek-V4's own names for them.
_ITS_OWN = {"embed.weight": _EMBEDDING, "head.weight": _HEAD}


@dataclass(frozen=True)
class TargetTables:
    """What a checkpoint of a drafter borrows from its target's: `BorrowedParts` without scales.

    Enough to save a drafter with, not to run it.

    Attributes:
        name: the directory or hub id.
        architectures: of its config.json.
        num_layers: decoder layers.
        embedding_VH: input embedding.
        head_VH: output head; the embedding where they are tied.
    """

    name: str
    architectures: tuple[str, ...]
    num_layers: int
    embedding_VH: Tensor
    head_VH: Tensor
    embedding_scale: float = 1.0
    head_bias_V: Tensor | None = None
    logit_softcap: float | None = None
    final_norm_H: Tensor | None = None
    head: None = None
    pack: None = None

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.embedding_VH.shape[0]

    @property
    def hidden_size(self) -> int:
        """H."""
        return self.embedding_VH.shape[1]

    @classmethod
    def read(
        cls, source: str | Path, *, revision: str | None = None, offline: bool = False
    ) -> TargetTables:
        """Read them from a directory, a GGUF file, a hub id or a name that ships.

        Raises:
            CheckpointError: files are missing or damaged, or hold no such tables.
            CompatibilityError: a GGUF cannot be loaded here.
        """
        place = target_source(source, offline=offline)
        directory = Path(place)
        if not directory.is_dir():
            directory = fetch(str(place), revision, offline, (CONFIG, "*.safetensors", INDEX))
        if not (directory / CONFIG).is_file():
            raise CheckpointError(f"{directory} has no {CONFIG}; give a target's directory.")
        config = read_json(directory / CONFIG)
        text = config.get("text_config", config)
        layers = text.get("num_hidden_layers") if isinstance(text, Mapping) else None
        if type(layers) is not int or layers < 1:
            raise CheckpointError(
                f"{directory / CONFIG} has num_hidden_layers {layers!r}; give a target's directory."
            )
        found = read_named(
            directory, lambda name: name in _ITS_OWN or name.endswith((_EMBEDDING, _HEAD))
        )
        found = {_ITS_OWN.get(name, name): table for name, table in found.items()}
        embedding = _one(found, _EMBEDDING, directory)
        if embedding is None:
            raise CheckpointError(
                f"{directory} has no tensor that ends in {_EMBEDDING}; bind the drafter to the "
                "loaded target in Python and save it there."
            )
        head = _one(found, _HEAD, directory)
        if head is None and not text.get(_TIED, config.get(_TIED, True)):
            raise CheckpointError(
                f"{directory} has no tensor that ends in {_HEAD}, though its {_TIED} is false; "
                "bind the drafter to the loaded target in Python and save it there."
            )
        architectures = config.get("architectures")
        return cls(
            name=public_name(source, offline=offline),
            architectures=tuple(architectures) if isinstance(architectures, list) else (),
            num_layers=layers,
            embedding_VH=embedding,
            head_VH=embedding if head is None else head,
        )

    def as_dtype(self, dtype: torch.dtype) -> TargetTables:
        """The same in another dtype; tied tables stay one."""
        embedding = self.embedding_VH.to(dtype)
        tied = self.head_VH is self.embedding_VH
        head = embedding if tied else self.head_VH.to(dtype)
        return replace(self, embedding_VH=embedding, head_VH=head)

    def named(self) -> dict[str, Any]:
        """The target's name and architectures, as a drafter's configuration records them."""
        return {TARGET_NAME: self.name, TARGET_ARCHITECTURES: list(self.architectures)}


def _one(found: Mapping[str, Tensor], suffix: str, directory: Path) -> Tensor | None:
    names = [name for name in found if name.endswith(suffix)]
    # Vision and audio towers may embed things of their own; the language model's comes first.
    text = [name for name in names if "language_model" in name] or names
    if len(text) > 1:
        raise CheckpointError(
            f"{directory} has {len(text)} tensors that end in {suffix} ({', '.join(text[:3])}); "
            "bind the drafter to the loaded target in Python and save it there."
        )
    return found[text[0]] if text else None
