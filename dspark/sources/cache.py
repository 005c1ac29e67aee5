"""The user's cache directory: where it is, and entries that are whole or absent."""

from __future__ import annotations

import os
import shutil
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
