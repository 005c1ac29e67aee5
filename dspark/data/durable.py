"""Files that a crash or a full disk leaves whole."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dspark.errors import DataError


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
