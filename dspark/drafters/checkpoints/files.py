"""The files of a checkpoint: found, fetched, read and replaced, whatever they mean."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dspark.errors import CheckpointError, first_line
from dspark.sources.cache import use_cache_only
from dspark.sources.names import drafter_source

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
ATTACHED_FOLDER = "dspark"
INSIDE = "mtp."
"""Begins the names of a drafter's tensors among those of its target."""
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True)
class Written:
    """A checkpoint that has been written.

    Attributes:
        directory: where.
        tensors: how many it holds.
        bytes: size of its files.
    """

    directory: Path
    tensors: int
    bytes: int


def resolve(source: str | Path, revision: str | None, offline: bool) -> Path:
    """The directory that holds the drafter's two files.

    Raises:
        CheckpointError: there is none.
    """
    source = drafter_source(source)
    directory = Path(source)
    if not directory.exists():
        if isinstance(source, Path) or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source):
            raise CheckpointError(
                f"{source} does not exist; give a drafter's directory or a hub id (owner/name)."
            )
        directory = _download(source, revision, offline)
    if not directory.is_dir():
        raise CheckpointError(f"{source} is a file; give the directory that holds {CONFIG}.")
    if (directory / ATTACHED_FOLDER / CONFIG).is_file():
        directory = directory / ATTACHED_FOLDER
    if not (directory / CONFIG).is_file():
        raise CheckpointError(f"{directory} has no {CONFIG}; give the directory of a drafter.")
    return directory


def _download(name: str, revision: str | None, offline: bool) -> Path:
    attached = (CONFIG, INDEX, f"{ATTACHED_FOLDER}/*.json", f"{ATTACHED_FOLDER}/*.safetensors")
    directory = fetch(name, revision, offline, attached)
    if not (directory / ATTACHED_FOLDER / CONFIG).is_file():
        shards = _shards(directory) if (directory / INDEX).is_file() else {}
        # A target may weigh a hundred times what its drafter does.
        inside = [path.name for path, names in shards.items() if _begin(names, INSIDE)]
        directory = fetch(name, revision, offline, (CONFIG, INDEX, *(inside or ["*.safetensors"])))
    return directory


def _begin(names: Sequence[str], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in names)


def fetch(name: str, revision: str | None, offline: bool, patterns: Sequence[str]) -> Path:
    """A local directory with the files of a hub repository that match patterns.

    Raises:
        CheckpointError: it cannot be fetched, or is not in the local cache when `offline`.
    """
    # Here, since only hub ids need it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    offline = use_cache_only(name, revision, offline)
    try:
        path = snapshot_download(
            name, revision=revision, local_files_only=offline, allow_patterns=list(patterns)
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        at = f" at revision {revision}" if revision else ""
        reason = "is not in the local hub cache" if offline else "cannot be fetched from the hub"
        raise CheckpointError(
            f"{name}{at} is no directory here and {reason} ({first_line(error)}); check name and "
            "network."
        ) from error
    return Path(path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: the file is unreadable, or holds something else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({error}).") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds {type(data).__name__}, not a JSON object.")
    return data


def read_weights(
    directory: Path, prefix: str = "", *, headers_only: bool = False
) -> dict[str, Tensor]:
    """The tensors of a directory, on the CPU.

    Args:
        directory: holds one safetensors file, or shards and their index.
        prefix: begins the names of those that are read, where any begin so; else all are.
        headers_only: give shapes and dtypes only, on the meta device.

    Raises:
        CheckpointError: files are missing, damaged or pickled.
    """
    shards = weight_files(directory)
    beginning = prefix if any(_begin(names, prefix) for names in shards.values()) else ""
    return _read(shards, lambda name: name.startswith(beginning), headers_only=headers_only)


def holds_inside(directory: Path) -> bool:
    """Whether a target's own files name a drafter's tensors; only index or header are read."""
    if not any((directory / name).is_file() for name in (WEIGHTS, INDEX)):
        return False
    return any(_begin(names, INSIDE) for names in weight_files(directory).values())


def read_named(directory: Path, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """The tensors of a directory whose names are wanted, on the CPU.

    Raises:
        CheckpointError: as `read_weights`.
    """
    return _read(weight_files(directory), wanted, headers_only=False)


def _read(
    shards: Mapping[Path, Sequence[str]], wanted: Callable[[str], bool], *, headers_only: bool
) -> dict[str, Tensor]:
    """Tensors by name; a shard of which nothing is wanted is not opened."""
    state: dict[str, Tensor] = {}
    for path, held in shards.items():
        names = [name for name in held if wanted(name)]
        if not names:
            continue
        if not path.is_file():
            raise CheckpointError(f"{path} is missing, though {INDEX} names it; fetch it.")
        with _opened(path) as file:
            lacking = sorted(set(names) - set(file.keys()))
            if lacking:
                raise CheckpointError(
                    f"{path} lacks {lacking[0]}, though {INDEX} says that it is there; fetch both "
                    "again."
                )
            read = partial(_header, file, path) if headers_only else file.get_tensor
            state.update({name: read(name) for name in names})
    return state


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged or cut short ({error}); fetch or save it again."
        ) from error


def _header(file: Any, path: Path, name: str) -> Tensor:
    """A tensor's shape and dtype."""
    kept = file.get_slice(name)
    dtype = _DTYPES.get(kept.get_dtype())
    if dtype is None:
        raise CheckpointError(f"{path} has {name} as {kept.get_dtype()}, which is not known here.")
    return torch.empty(kept.get_shape(), dtype=dtype, device="meta")


def weight_files(directory: Path) -> dict[Path, list[str]]:
    """The safetensors files of a directory, one or the shards of an index, and what they hold.

    Raises:
        CheckpointError: there are none, the one is damaged, or all are pickled.
    """
    if (directory / WEIGHTS).is_file():
        with _opened(directory / WEIGHTS) as file:
            return {directory / WEIGHTS: list(file.keys())}
    if (directory / INDEX).is_file():
        return _shards(directory)
    pickles = sorted(p.name for pattern in _PICKLES for p in directory.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{directory} has only pickled weights ({', '.join(pickles)}), which can run code when "
            f"loaded and are refused; convert them to {WEIGHTS}."
        )
    raise CheckpointError(f"{directory} has no {WEIGHTS}; fetch or save it again.")


def _shards(directory: Path) -> dict[Path, list[str]]:
    """The shards of an index, and what it says that they hold."""
    index = read_json(directory / INDEX).get("weight_map")
    if not isinstance(index, Mapping) or not index:
        raise CheckpointError(f"{directory / INDEX} has no weight_map.")
    found: dict[Path, list[str]] = {}
    for name, shard in sorted(index.items(), key=lambda item: (str(item[1]), item[0])):
        found.setdefault(directory / Path(str(shard)).name, []).append(name)
    return found


def write(directory: Path, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Written:
    """Write a checkpoint's two files.

    Both are written whole beside their places before either takes its place, so that an
    interrupted write leaves what was there.

    Args:
        directory: made if absent.
        state: tensors on the CPU that share no memory.
        config: content of config.json.

    Raises:
        CheckpointError: it cannot be written, as on a full disk.
    """
    try:
        return _write(directory, state, config)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise CheckpointError(
            f"{directory} cannot be written ({reason}); what was there before is whole, so make "
            "room or name another place and run the same command again."
        ) from error


def _write(directory: Path, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Written:
    directory.mkdir(parents=True, exist_ok=True)
    names = {WEIGHTS: directory / WEIGHTS, CONFIG: directory / CONFIG}
    beside = {name: directory / f".{name}.{os.getpid()}.tmp" for name in names}
    try:
        save_file(dict(state), beside[WEIGHTS], metadata={"format": "pt"})
        beside[CONFIG].write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for path in beside.values():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        for name, path in beside.items():
            path.replace(names[name])
    finally:
        for path in beside.values():
            path.unlink(missing_ok=True)
    return Written(directory, len(state), sum(path.stat().st_size for path in names.values()))
