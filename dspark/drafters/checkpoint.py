"""Drafter checkpoints: the published layout and the attached one; read, write, refuse aloud.

Published (FORMAT_FACTS.md A): a directory with config.json and model.safetensors (or shards with
an index), embedding and head included. Attached: the target's directory, with the drafter's two
files in `dspark/` and without embedding and head. Either may be read without them; the target's
are borrowed at bind.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dspark.drafters.config import DSparkConfig
from dspark.drafters.dspark import DSparkDrafter
from dspark.drafters.eagle3 import Eagle3Drafter
from dspark.drafters.published import config_from_json, config_to_json
from dspark.drafters.published_eagle3 import eagle3_from_json, eagle3_to_json, is_eagle3
from dspark.errors import CheckpointError, CompatibilityError

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
ATTACHED = "dspark"
MASK_EMBEDDING = "mask_embedding.weight"
_TABLES = ("embed_tokens.weight", "lm_head.weight")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def load_drafter(
    source: str | Path, *, revision: str | None = None, offline: bool = False
) -> DSparkDrafter | Eagle3Drafter:
    """Load a drafter, in the checkpoint's dtype, on the CPU, in evaluation mode, unbound.

    Args:
        source: a directory of either layout, or a hub id.
        revision: branch, tag or commit on the hub.
        offline: use the local hub cache only.

    Raises:
        CheckpointError: files are missing, damaged, pickled, or do not agree with config.json.
        CompatibilityError: the architecture or an option of it is not supported.
    """
    directory = _resolve(source, revision, offline)
    data, where = _read_json(directory / CONFIG), str(directory / CONFIG)
    if is_eagle3(data):
        config = eagle3_from_json(data, where)
        with torch.device("meta"):
            drafter = Eagle3Drafter(config)
        return _fill(drafter, _read_weights(directory), directory)
    return _dspark(config_from_json(data, where), _read_weights(directory), directory)


def save_published(
    drafter: DSparkDrafter | Eagle3Drafter,
    directory: str | Path,
    *,
    dtype: torch.dtype | None = torch.bfloat16,
) -> None:
    """Write the published layout, embedding and head included.

    Each file is written beside its place and renamed into it, the weights first.

    Args:
        drafter: bound, or loaded with its own embedding and head.
        directory: made if absent.
        dtype: of every weight; None keeps the parameters' own.

    Raises:
        CompatibilityError: the drafter has a learned mask embedding, for which this layout has no
            place, or has no embedding and head.
    """
    if isinstance(drafter, DSparkDrafter) and drafter.mask_embedding is not None:
        raise CompatibilityError(
            f"The drafter has a learned {MASK_EMBEDDING}, for which the published layout has no "
            "place; save it attached to its target."
        )
    embedding, head = drafter.own_embedding_VH, drafter.own_head_VH
    tables = {
        _TABLES[0]: drafter.borrowed.embedding_VH if embedding is None else embedding,
        _TABLES[1]: drafter.borrowed.head_VH if head is None else head,
    }
    _save(drafter, Path(directory), tables, dtype)


def save_attached(
    drafter: DSparkDrafter | Eagle3Drafter,
    target_directory: str | Path,
    *,
    dtype: torch.dtype | None = torch.bfloat16,
) -> None:
    """Write the attached layout: `dspark/` inside the target's directory.

    Embedding or head are written only where the drafter has its own.

    Raises:
        CheckpointError: the target's directory does not exist.
    """
    target = Path(target_directory)
    if not target.is_dir():
        raise CheckpointError(f"{target} is no directory; save the target there first.")
    own = zip(_TABLES, (drafter.own_embedding_VH, drafter.own_head_VH), strict=True)
    tables = {name: table for name, table in own if table is not None}
    _save(drafter, target / ATTACHED, tables, dtype)


def has_attached_drafter(
    source: str | Path, *, revision: str | None = None, offline: bool = False
) -> bool:
    """Whether a target, a directory or a hub id, carries a drafter in `dspark/`.

    Raises:
        CheckpointError: the hub id cannot be looked up.
    """
    directory = Path(source)
    if not directory.exists():
        directory = _fetch(str(source), revision, offline, (f"{ATTACHED}/{CONFIG}",))
    return (directory / ATTACHED / CONFIG).is_file()


def _resolve(source: str | Path, revision: str | None, offline: bool) -> Path:
    """The directory that holds the drafter's two files."""
    directory = Path(source)
    if not directory.exists():
        if isinstance(source, Path) or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source):
            raise CheckpointError(
                f"{source} does not exist; give a drafter's directory or a hub id (owner/name)."
            )
        directory = _download(source, revision, offline)
    if not directory.is_dir():
        raise CheckpointError(f"{source} is a file; give the directory that holds {CONFIG}.")
    if (directory / ATTACHED / CONFIG).is_file():
        directory = directory / ATTACHED
    if not (directory / CONFIG).is_file():
        raise CheckpointError(f"{directory} has no {CONFIG}; it holds no drafter.")
    return directory


def _download(name: str, revision: str | None, offline: bool) -> Path:
    attached = (CONFIG, f"{ATTACHED}/*.json", f"{ATTACHED}/*.safetensors")
    directory = _fetch(name, revision, offline, attached)
    if not (directory / ATTACHED / CONFIG).is_file():
        directory = _fetch(name, revision, offline, (CONFIG, "*.safetensors", INDEX))
    return directory


def _fetch(name: str, revision: str | None, offline: bool, patterns: Sequence[str]) -> Path:
    # Here, since only hub ids need it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        path = snapshot_download(
            name, revision=revision, local_files_only=offline, allow_patterns=list(patterns)
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        at = f" at revision {revision}" if revision else ""
        reason = "is not in the local hub cache" if offline else "cannot be fetched from the hub"
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{name}{at} is no directory here and {reason} ({first}); check name and network."
        ) from error
    return Path(path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({error}).") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds {type(data).__name__}, not a JSON object.")
    return data


def _read_weights(directory: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for path in _weight_files(directory):
        try:
            with safe_open(path, framework="pt") as file:
                state.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} is damaged or cut short ({error}); fetch or save it again."
            ) from error
    return state


def _weight_files(directory: Path) -> list[Path]:
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    if (directory / INDEX).is_file():
        shards = _read_json(directory / INDEX).get("weight_map")
        if not isinstance(shards, Mapping) or not shards:
            raise CheckpointError(f"{directory / INDEX} has no weight_map.")
        paths = [directory / Path(str(name)).name for name in sorted(set(shards.values()))]
        for path in paths:
            if not path.is_file():
                raise CheckpointError(f"{path} is missing, though {INDEX} names it; fetch it.")
        return paths
    pickles = sorted(p.name for pattern in _PICKLES for p in directory.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{directory} has only pickled weights ({', '.join(pickles)}), which can run code when "
            f"loaded and are refused; convert them to {WEIGHTS}."
        )
    raise CheckpointError(f"{directory} has no {WEIGHTS}; the checkpoint is incomplete.")


def _dspark(config: DSparkConfig, state: dict[str, Tensor], directory: Path) -> DSparkDrafter:
    """A drafter around the tensors of a file, after checking names, shapes and dtypes."""
    learned_mask = MASK_EMBEDDING in state
    if config.mask_token_id is None and not learned_mask:
        raise CheckpointError(
            f"{directory / CONFIG} has no mask_token_id and the weights no {MASK_EMBEDDING}; "
            "one of them must say what fills a block."
        )
    with torch.device("meta"):
        drafter = DSparkDrafter(config)
        if learned_mask and drafter.mask_embedding is None:
            drafter.mask_embedding = torch.nn.Embedding(1, config.backbone.hidden_size)
    return _fill(drafter, state, directory)


DrafterT = TypeVar("DrafterT", DSparkDrafter, Eagle3Drafter)


def _fill(drafter: DrafterT, state: dict[str, Tensor], directory: Path) -> DrafterT:
    """A drafter made on no device, with the tensors of a file in it, after checking them."""
    config = drafter.config
    shapes = {name: tuple(tensor.shape) for name, tensor in drafter.state_dict().items()}
    table_shape = (config.vocab_size, config.backbone.hidden_size)
    allowed = shapes | dict.fromkeys(_TABLES, table_shape)
    _compare_names(set(shapes) - set(state), set(state) - set(allowed), directory)
    wrong = [
        f"{name} {list(tensor.shape)} instead of {list(allowed[name])}"
        for name, tensor in sorted(state.items())
        if tuple(tensor.shape) != allowed[name]
    ]
    if wrong:
        raise CheckpointError(f"{directory} has tensors of a wrong shape: {_few(wrong)}.")
    if not all(tensor.is_floating_point() for tensor in state.values()):
        whole = [name for name, tensor in state.items() if not tensor.is_floating_point()]
        raise CheckpointError(f"{directory} has tensors that are no floats: {_few(whole)}.")
    dtype = torch.bfloat16 if not state else next(iter(state.values())).dtype
    for tensor in state.values():
        dtype = torch.promote_types(dtype, tensor.dtype)
    tables = [state.pop(name, None) for name in _TABLES]
    drafter.load_state_dict({k: v.to(dtype) for k, v in state.items()}, assign=True)
    drafter.own_embedding_VH, drafter.own_head_VH = tables
    drafter.eval()
    return drafter


def _compare_names(missing: set[str], extra: set[str], directory: Path) -> None:
    if missing:
        raise CheckpointError(
            f"{directory} lacks the tensors {_few(sorted(missing))}; the checkpoint is incomplete "
            f"or does not belong to its {CONFIG}."
        )
    if extra:
        raise CheckpointError(
            f"{directory} has tensors that its {CONFIG} does not explain: {_few(sorted(extra))}."
        )


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _save(
    drafter: DSparkDrafter | Eagle3Drafter,
    directory: Path,
    tables: Mapping[str, Tensor],
    dtype: torch.dtype | None,
) -> None:
    kept = drafter.fc.weight.dtype if dtype is None else dtype
    stored = str(kept).removeprefix("torch.")
    data = (
        eagle3_to_json(drafter.config, stored)
        if isinstance(drafter, Eagle3Drafter)
        else config_to_json(drafter.config, stored)
    )
    named = {**drafter.state_dict(), **tables}
    # A tied embedding and head share memory, which safetensors refuses: each gets its own.
    state = {
        name: tensor.detach().to(device="cpu", dtype=kept, copy=True).contiguous()
        for name, tensor in named.items()
    }
    directory.mkdir(parents=True, exist_ok=True)
    weights = directory / f".{WEIGHTS}.{os.getpid()}.tmp"
    config = directory / f".{CONFIG}.{os.getpid()}.tmp"
    try:
        save_file(state, weights, metadata={"format": "pt"})
        config.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        for path in (weights, config):
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        weights.replace(directory / WEIGHTS)
        config.replace(directory / CONFIG)
    finally:
        weights.unlink(missing_ok=True)
        config.unlink(missing_ok=True)
