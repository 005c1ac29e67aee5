"""JSON-lines files, plain or gzipped: read whatever has become of them, written to stay valid."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from dspark.data.durable import writing
from dspark.data.rows import Row
from dspark.errors import DataError

JSON_LINES = (".jsonl", ".jsonl.gz")
"""How the names of JSON-lines files end."""
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def scan_json_lines(path: str | Path) -> Iterator[Row]:
    """Yield every line of a .jsonl or .jsonl.gz file that is not blank, the damaged ones included.

    What cannot be read at its end, such as a gzip file that was cut, is one last row with a fault.

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
    """The object of a line, or None and what is wrong with it."""
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
    """The JSON-lines files that a path stands for: itself, or those in the folder.

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
    """The JSON-lines file for what a run lists beside its result: a.jsonl.gz -> a_what.jsonl."""
    return path.with_name(f"{stem(path)}_{what}.jsonl")


def write_list(path: Path, records: Sequence[object]) -> None:
    """Write a list of records; where there are none, take away what an earlier run left.

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
    """Open a JSON-lines file (`.gz` compresses) and yield the function that adds a line.

    The file takes its place once it is complete; until then an older one stays as it was.

    Raises:
        DataError: it cannot be written, as on a full disk; nothing is left of it then.
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
    """Open `at`, or the path itself, as the path's name says."""
    opener: Any = gzip.open if path.suffix == ".gz" else open
    file: IO[bytes] = opener(at or path, mode)
    return file
