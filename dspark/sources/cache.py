"""The cache directory of the user, whose entries are whole or absent, and whether there is a hub.

`huggingface_hub` tries five times with growing pauses, for every file. Whoever is about to fetch
asks here first, so that a machine without the hub waits once, and briefly.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock
from safetensors import SafetensorError

from dspark.errors import CheckpointError, first_line


def cache_directory(kind: str) -> Path:
    """The folder of one kind of entry: $XDG_CACHE_HOME/dspark/KIND, by default in ~/.cache."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "dspark" / kind


@contextmanager
def new_entry(place: Path) -> Iterator[Path | None]:
    """Make a directory that takes its place once it is complete.

    Processes that want the same entry wait for one another. One that is killed leaves the place
    empty and its lock open; the next removes what it had begun.

    Args:
        place: where the entry belongs.

    Yields:
        An empty directory to fill, or None where another process has made the entry meanwhile.

    Raises:
        CheckpointError: the cache cannot be written.
    """
    fresh = place.with_name(f".{place.name}.part")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(place.with_name(f".{place.name}.lock")):
            if place.is_dir():
                yield None
                return
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir()
            try:
                yield fresh
                for path in filter(Path.is_file, fresh.rglob("*")):
                    _sync(path)
                fresh.replace(place)
            finally:
                shutil.rmtree(fresh, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{place} cannot be written ({first_line(error)}); make room, or set XDG_CACHE_HOME to "
            "another place."
        ) from error


def _sync(path: Path) -> None:
    """Make a file safe from a power cut, before its name says that it is whole."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


_TIMEOUT_S = 5.0
_REMEMBERED_S = 60.0
_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_logger = logging.getLogger(__name__)
_unreachable: dict[str, tuple[float, str]] = {}
"""Endpoint -> when it could not be reached, and why."""


def why_unreachable() -> str | None:
    """Why the hub cannot be reached, after one try; None where it answers.

    A failure holds for a minute, so that one command does not wait several times.
    """
    from huggingface_hub import constants, get_session
    from huggingface_hub.errors import OfflineModeIsEnabled

    endpoint = constants.ENDPOINT
    when, why = _unreachable.get(endpoint, (-_REMEMBERED_S, ""))
    if time.monotonic() - when < _REMEMBERED_S:
        return why
    try:
        get_session().head(endpoint, timeout=_TIMEOUT_S)
    except OfflineModeIsEnabled:
        return "HF_HUB_OFFLINE is set"
    except Exception as error:  # of whichever HTTP library the hub's own uses
        _unreachable[endpoint] = time.monotonic(), first_line(error)
        return first_line(error)
    return None


def is_cached(name: str, revision: str | None = None) -> bool:
    """Whether the hub's cache on this machine holds a model, at least its configuration."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str)
    except HFValidationError:
        return False


def use_cache_only(name: str, revision: str | None, offline: bool) -> bool:
    """Whether a model is to be taken from the hub's cache without asking the hub.

    Args:
        name: a hub id.
        revision: branch, tag or commit.
        offline: the user says so.

    Raises:
        CheckpointError: the hub cannot be reached, and the cache does not hold the model.
    """
    if offline:
        return True
    if not _ID.fullmatch(name):
        raise CheckpointError(
            f"{name!r} is neither a directory nor a hub id (owner/name); check the name."
        )
    why = why_unreachable()
    if why is None:
        return False
    if not is_cached(name, revision):
        raise CheckpointError(
            f"{name} is no directory, the hub cannot be reached ({why}), and its cache on this "
            "machine does not hold it; check name and network (--offline does not try the hub)."
        )
    _logger.info("The hub cannot be reached (%s): %s is the copy on this machine.", why, name)
    return True
