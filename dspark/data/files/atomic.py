"""Atomic file operations, locks and resumable journals, which survive crashes and full disks."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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


_KEY = "dspark_journal"


class Journal:
    """Entries of a run, one JSON object per line, each written at once; a context manager.

    The first line holds the run's settings; a run with other settings cannot continue it. A line
    truncated by a crash is removed.

    Args:
        path: created if absent.
        settings: of the run, as JSON values.

    Attributes:
        resumed: whether entries existed already.

    Raises:
        DataError: the file belongs to a run with other settings, or cannot be written.
        UsageError: another run is writing it.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self._fd = self._open()
        try:
            self._begin(settings)
        except BaseException:  # else the lock would outlast the run
            self.close()
            raise

    def _begin(self, settings: Mapping[str, Any]) -> None:
        self._end = 0
        for number, raw in enumerate(self._whole_lines()):
            if number == 0:
                self._check(json.loads(raw), settings)
            self._end += len(raw)
        self.resumed = self._end > 0
        with writing(self.path):
            os.ftruncate(self._fd, self._end)
        if not self.resumed:
            self.append({_KEY: 1, "settings": dict(settings)})

    def _open(self) -> int:
        """Open and lock the file; again if the run that held it has just removed it."""
        while True:
            with writing(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                lock_file(descriptor, self.path, "wait for its end, or name another --out")
                if os.path.samestat(os.fstat(descriptor), os.stat(self.path)):
                    return descriptor
            except UsageError:
                os.close(descriptor)
                raise
            except FileNotFoundError:
                pass
            os.close(descriptor)

    def _check(self, head: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        earlier = head.get("settings")
        if _KEY not in head or not isinstance(earlier, dict):
            raise DataError(f"{self.path} is no journal of a run; name another --out, or move it.")
        now = json.loads(json.dumps(dict(settings)))
        for name in sorted({*earlier, *now}):
            if earlier.get(name) != now.get(name):
                raise DataError(
                    f"{self.path} belongs to a run with {name} {earlier.get(name)!r}, but this one "
                    f"has {now.get(name)!r}; ask the same again to go on, or delete the file."
                )

    def _whole_lines(self) -> Iterator[bytes]:
        """Every line before the first that is truncated or not a JSON object."""
        with open(self.path, "rb") as file:
            for raw in file:
                if not raw.endswith(b"\n"):
                    return
                try:
                    whole = isinstance(json.loads(raw), dict)
                except ValueError:
                    whole = False
                if not whole:
                    return
                yield raw

    def append(self, entry: Mapping[str, Any]) -> None:
        """Add an entry.

        Raises:
            DataError: it cannot be written; the entries before it stay.
        """
        append_line(self._fd, self.path, json.dumps(dict(entry)))

    def entries(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (file offset, entry) of all entries; `read` takes the offsets."""
        place = 0
        for number, raw in enumerate(self._whole_lines()):
            if number:
                yield place, json.loads(raw)
            place += len(raw)

    def read(self, places: Iterable[int]) -> Iterator[dict[str, Any]]:
        """Yield the entries at file offsets from `entries`."""
        with open(self.path, "rb") as file:
            for place in places:
                file.seek(place)
                yield json.loads(file.readline())

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Sync and close the file, which releases its lock."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.fsync(self._fd)
            os.close(self._fd)
        self._fd = -1

    def remove(self) -> None:
        """Delete the file, once its content is in the output."""
        self.close()
        self.path.unlink(missing_ok=True)
