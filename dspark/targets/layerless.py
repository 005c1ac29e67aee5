"""A target without its layers: shapes, embedding, final norm and head, and nothing that runs.

For training on features that lie on disk: of a 4B model it loads 0.8 GB in place of 8.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from dspark.errors import CheckpointError, UsageError
from dspark.targets.build import Prepared
from dspark.targets.families import Anatomy, dissect
from dspark.targets.forward import TargetOutput
from dspark.targets.loading import (
    Source,
    load_config,
    quiet,
    resolve_device,
    resolve_dtype,
    resolve_source,
)
from dspark.targets.target import Target

# What comes before a text model's own names, in its module tree or in its checkpoint's.
_WRAPPERS = frozenset({"model", "language_model", "text_model", "transformer", "gpt_neox"})


@final
class LayerlessTarget(Target):
    """Knows what a drafter borrows and what its layers take after; `forward` is refused."""

    def forward(self, *_: Any, **__: Any) -> TargetOutput:
        """Refused.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            f"{self.name} was loaded without its layers, for training from a feature cache; load "
            "it with Target.load to run it."
        )


def load_without_layers(
    source: str | Path, *, device: str = "auto", dtype: str = "auto", offline: bool = False
) -> LayerlessTarget:
    """Load what a drafter borrows from a target.

    Args:
        source: as `Target.load`.
        device: as `Target.load`.
        dtype: as `Target.load`.
        offline: use only what has been downloaded before.

    Raises:
        CheckpointError: the checkpoint is missing or damaged, or has no such weights.
        CompatibilityError: the architecture is not supported.
        UsageError: device or dtype cannot be used.
    """
    place = resolve_device(device)
    wanted = resolve_dtype(dtype, place)
    found = resolve_source(
        source,
        revision=None,
        offline=offline,
        trust_remote_code=False,
        dtype=None if isinstance(wanted, str) else wanted,
    )
    config = load_config(found)
    with quiet(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    anatomy = dissect(model)
    stored = _read(found, _wanted(model, anatomy))
    _fill(anatomy, stored, place, None if isinstance(wanted, str) else wanted, found)
    return LayerlessTarget(
        Prepared(anatomy), name=str(source), eos_token_ids=frozenset(), source=found
    )


def _wanted(model: nn.Module, anatomy: Anatomy) -> dict[tuple[str, str], str]:
    """(part, parameter) -> its name without wrappers."""
    modules = {id(module): name for name, module in model.named_modules()}
    found = {}
    for part in ("embedding", "head", "norm"):
        module = getattr(anatomy, part)
        for name, _ in module.named_parameters():
            found[part, name] = _bare(f"{modules[id(module)]}.{name}")
    return found


def _bare(name: str) -> str:
    """A parameter's name without what wraps the text model."""
    parts = name.split(".")
    while parts[0] in _WRAPPERS:
        parts.pop(0)
    return ".".join(parts)


def _read(source: Source, wanted: dict[tuple[str, str], str]) -> dict[tuple[str, str], Tensor]:
    found: dict[tuple[str, str], Tensor] = {}
    directory = _directory(source)
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise CheckpointError(
            f"{source.name} has no *.safetensors, of which parts can be read; set features.source "
            "to hybrid, which loads the whole target."
        )
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                names: Iterable[str] = file.keys()
                by_name = {_bare(name): name for name in names}
                for part, name in wanted.items():
                    if name in by_name:
                        found[part] = file.get_tensor(by_name[name])
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} is damaged or cut short ({error}); fetch it again."
            ) from error
    return found


def _directory(source: Source) -> Path:
    if source.is_directory:
        return Path(source.name)
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors"]
    return Path(
        snapshot_download(source.name, local_files_only=source.offline, allow_patterns=patterns)
    )


def _fill(
    anatomy: Anatomy,
    stored: dict[tuple[str, str], Tensor],
    device: torch.device,
    dtype: torch.dtype | None,
    source: Source,
) -> None:
    """Give the modules their weights; a head without any is the embedding."""
    if ("head", "weight") not in stored and ("embedding", "weight") in stored:
        stored["head", "weight"] = stored["embedding", "weight"]
    placed: dict[int, nn.Parameter] = {}
    for part in ("embedding", "head", "norm"):
        module: nn.Module = getattr(anatomy, part)
        for name, _ in list(module.named_parameters()):
            tensor = stored.get((part, name))
            if tensor is None:
                raise CheckpointError(
                    f"{source.name} has no weights of the target's {part}; set features.source to "
                    "hybrid, which loads the whole target."
                )
            if id(tensor) not in placed:
                moved = tensor.to(device=device, dtype=dtype)
                placed[id(tensor)] = nn.Parameter(moved, requires_grad=False)
            setattr(module, name, placed[id(tensor)])
