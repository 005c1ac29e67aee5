"""Atomic file operations and locks that survive crashes and full disks."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dspark.errors import DataError, UsageError

LOCK = ".lock"
"""Name of the lock file in an output folder, held by the run that writes there."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn write errors into one that names the file and says that older content is intact.

    Raises:
        DataError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(
            f"{path} cannot be written ({reason}); what was written before is whole, so make room "
            "or name another place and run the same command again."
        ) from error


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of the data, however few bytes one call takes."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def append_line(descriptor: int, path: Path, line: str) -> None:
    """Append a line to a file, all of it or nothing.

    Args:
        descriptor: of the file, opened for appending.
        path: of the file, for errors.
        line: the text without its newline.

    Raises:
        DataError: it cannot be written; the file is unchanged.
    """
    data, end = line.encode() + b"\n", os.fstat(descriptor).st_size
    try:
        with writing(path):
            write_all(descriptor, data)
    except DataError:
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, end)
        raise


def replace_file(path: Path, content: str | bytes) -> None:
    """Write a file and atomically put it in the place of an older one, synced to disk.

    Raises:
        OSError: it cannot be written; an older file stays as it was.
    """
    fresh = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with fresh.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Sync a directory, so that new names in it survive a crash."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock_file(descriptor: int, path: Path, remedy: str) -> None:
    """Lock an open file until it is closed or the process ends.

    Raises:
        UsageError: another run holds the lock.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise UsageError(f"{path} is in use by another run; {remedy}.") from error


@contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Lock an output folder, created if absent, against other runs.

    Raises:
        UsageError: another run holds the lock.
        DataError: the folder cannot be written.
    """
    path = folder / LOCK
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        lock_file(descriptor, folder, "wait for its end, or name another output folder")
        yield
    finally:
        os.close(descriptor)
