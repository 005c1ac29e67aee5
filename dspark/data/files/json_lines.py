"""JSON-lines files, plain or gzipped: tolerant reading, atomic writing."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from dspark.data.files.atomic import writing
from dspark.errors import DataError


@dataclass(frozen=True)
class Row:
    """One record of a source: a line of a file or a row of a data set.

    Attributes:
        where: file and line, or data set, split and row.
        record: its content; None if it cannot be read.
        fault: why it cannot be read, a sentence; otherwise empty.
        number: from 1; in a file, blank lines count.
        raw: the bytes of a line; empty for a data set's row or at a read error.
    """

    where: str
    record: dict[str, Any] | None
    fault: str = ""
    number: int = 0
    raw: bytes = b""

    def whole(self) -> dict[str, Any]:
        """The record.

        Raises:
            DataError: it cannot be read.
        """
        if self.record is None:
            raise DataError(self.fault)
        return self.record


JSON_LINES = (".jsonl", ".jsonl.gz")
"""File name extensions of JSON-lines files."""
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def scan_json_lines(path: str | Path) -> Iterator[Row]:
    """Yield every non-blank line of a .jsonl or .jsonl.gz file, including damaged ones.

    An unreadable end, as of a truncated gzip file, is one last row with a fault.

    Raises:
        DataError: the file is missing.
    """
    path = Path(path)
    if not path.exists():  # a device or a pipe is as good as a file
        raise DataError(f"The file {path} does not exist.")
    if path.is_dir():
        raise DataError(f"{path} is a folder; give one of its files.")
    number = 0
    with _open(path, "rb") as file:
        try:
            for number, raw in enumerate(file, 1):
                if raw.strip():
                    record, fault = _record(number, raw)
                    yield _row(path, number, raw, record, fault)
        except (OSError, EOFError, zlib.error) as error:
            yield _row(path, number + 1, b"", None, f"cannot be read to its end: {error}")


def _row(path: Path, number: int, raw: bytes, record: dict[str, Any] | None, fault: str) -> Row:
    where = f"{path}, line {number}"
    return Row(where, record, f"{where} {fault}." if fault else "", number, raw)


def _record(number: int, raw: bytes) -> tuple[dict[str, Any] | None, str]:
    """The object of a line, or None and the fault."""
    text = raw.removeprefix(_BYTE_ORDER_MARK) if number == 1 else raw
    try:
        record = json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        return None, f"is not UTF-8: {error.reason} at byte {error.start}"
    except json.JSONDecodeError as error:
        return None, f"is not valid JSON: {error.msg}"
    except (ValueError, RecursionError) as error:  # numbers too long, brackets too deep
        return None, f"is not valid JSON: {error}"
    if not isinstance(record, dict):
        return None, "is not a JSON object"
    return record, ""


def read_json_lines(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (file and line, object) of a .jsonl or .jsonl.gz file.

    Raises:
        DataError: the file is missing, or a line is not a JSON object.
    """
    for row in scan_json_lines(path):
        yield row.where, row.whole()


def json_lines_files(path: Path) -> list[Path]:
    """The JSON-lines files of a path: the file itself, or all in the folder.

    Raises:
        DataError: there are none.
    """
    if not path.is_dir():
        if not path.exists():
            raise DataError(f"{path} does not exist; give a JSON-lines file or a folder of them.")
        return [path]
    found = sorted(p for p in path.rglob("*") if p.name.endswith(JSON_LINES))
    if not found:
        raise DataError(f"The folder {path} holds no .jsonl and no .jsonl.gz file.")
    return found


def stem(path: Path) -> str:
    """The name of a JSON-lines file without its endings: a.jsonl.gz -> a."""
    return path.name.removesuffix(".gz").removesuffix(".jsonl")


def beside(path: Path, what: str) -> Path:
    """The path of a side file of an output: a.jsonl.gz -> a_what.jsonl."""
    return path.with_name(f"{stem(path)}_{what}.jsonl")


def write_list(path: Path, records: Sequence[object]) -> None:
    """Write a list of records; if it is empty, remove an earlier run's file.

    Raises:
        DataError: it cannot be written.
    """
    if not records:
        path.unlink(missing_ok=True)
        return
    with write_json_lines(path) as write:
        for record in records:
            write(record)


@contextmanager
def write_json_lines(path: str | Path) -> Iterator[Callable[[object], None]]:
    """Open a JSON-lines file (`.gz` compresses) and yield the function that writes a line.

    The complete file atomically replaces an older one.

    Raises:
        DataError: it cannot be written, as on a full disk; no partial file remains.
    """
    path = Path(path)
    fresh = path.with_name(path.name + ".new")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _open(path, "wb", fresh)

    def write(record: object) -> None:
        with writing(path):
            file.write(json.dumps(record).encode() + b"\n")

    try:
        yield write
        with writing(path):
            file.close()
            with fresh.open("rb+") as whole:
                os.fsync(whole.fileno())
            os.replace(fresh, path)
    except BaseException:
        with contextlib.suppress(OSError):
            file.close()
        fresh.unlink(missing_ok=True)
        raise


def _open(path: Path, mode: str, at: Path | None = None) -> IO[bytes]:
    """Open `at` or the path, gzipped if the path's name says so."""
    opener: Any = gzip.open if path.suffix == ".gz" else open
    file: IO[bytes] = opener(at or path, mode)
    return file
