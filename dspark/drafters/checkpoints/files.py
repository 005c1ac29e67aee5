"""The files of a checkpoint: found, fetched, read and replaced, whatever they mean."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dspark.errors import CheckpointError, first_line
from dspark.sources.hub import use_cache_only
from dspark.sources.names import drafter_source

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
ATTACHED_FOLDER = "dspark"
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
    attached = (CONFIG, f"{ATTACHED_FOLDER}/*.json", f"{ATTACHED_FOLDER}/*.safetensors")
    directory = fetch(name, revision, offline, attached)
    if not (directory / ATTACHED_FOLDER / CONFIG).is_file():
        directory = fetch(name, revision, offline, (CONFIG, "*.safetensors", INDEX))
    return directory


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


def read_weights(directory: Path) -> dict[str, Tensor]:
    """All tensors of a directory, on the CPU.

    Raises:
        CheckpointError: files are missing, damaged or pickled.
    """
    return read_named(directory, lambda _: True)


def read_named(directory: Path, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """The tensors of a directory whose names are wanted, on the CPU.

    Raises:
        CheckpointError: as `read_weights`.
    """
    state: dict[str, Tensor] = {}
    for path in weight_files(directory):
        try:
            with safe_open(path, framework="pt") as file:
                names = filter(wanted, file.keys())
                state.update({name: file.get_tensor(name) for name in names})
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} is damaged or cut short ({error}); fetch or save it again."
            ) from error
    return state


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a directory: one, or the shards that an index names.

    Raises:
        CheckpointError: there are none, one is missing, or all are pickled.
    """
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    if (directory / INDEX).is_file():
        shards = read_json(directory / INDEX).get("weight_map")
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
    raise CheckpointError(f"{directory} has no {WEIGHTS}; fetch or save it again.")


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
