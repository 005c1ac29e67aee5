"""Append-only journal of a long run, valid whenever the run is interrupted."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dspark.data.files.atomic import append_line, lock_file, writing
from dspark.errors import DataError, UsageError

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
