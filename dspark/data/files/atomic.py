"""Files that a crash or a full disk leaves whole."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dspark.errors import DataError, UsageError

LOCK = ".lock"
"""The file in an output folder that the run which writes there holds locked."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say which file cannot be written, and that what was there before is still good.

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


def append_line(descriptor: int, path: Path, line: str) -> None:
    """Add a line at the end of a file, all of it or nothing.

    Args:
        descriptor: of the file, opened to append.
        path: of the file, for errors.
        line: the text, without its end.

    Raises:
        DataError: it cannot be written; the file is what it was.
    """
    data, end = line.encode() + b"\n", os.fstat(descriptor).st_size
    try:
        with writing(path):
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
    except DataError:
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, end)
        raise


def sync_directory(directory: Path) -> None:
    """Make new names in a directory safe from a crash."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock_file(descriptor: int, path: Path, remedy: str) -> None:
    """Lock an open file for this process until the file is closed; a kill frees it too.

    Raises:
        UsageError: another run holds it.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise UsageError(f"{path} is in use by another run; {remedy}.") from error


@contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Hold an output folder, made if absent, against every other run meanwhile.

    Raises:
        UsageError: another run holds it.
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
