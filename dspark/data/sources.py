"""Where prompts are collected from: JSON-lines files, folders of them, and data sets of the hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspark.data.json_lines import json_lines_files, scan_json_lines
from dspark.errors import DataError


@dataclass(frozen=True)
class Row:
    """One record of a source.

    Attributes:
        where: file and line, or data set, split and row.
        record: what it holds; None where it cannot be read.
        fault: why not, a sentence.
    """

    where: str
    record: Mapping[str, Any] | None
    fault: str = ""


def read_rows(
    source: str,
    *,
    split: str = "train",
    config: str | None = None,
    revision: str | None = None,
) -> Iterator[Row]:
    """Yield the records of a source, those that are damaged included.

    Args:
        source: a JSON-lines file; a folder of them; or, read by the library `datasets`, any other
            folder that holds a data set, or the name of one on the Hugging Face hub.
        split: of a data set.
        config: of a data set that has several.
        revision: branch, tag or commit on the hub.

    Raises:
        DataError: there is no such source, it holds nothing, or `datasets` is not installed.
    """
    path = Path(source).expanduser()
    if path.is_file() or (path.is_dir() and _holds_json_lines(path)):
        for file in json_lines_files(path):
            for line in scan_json_lines(file):
                where = f"{file}, line {line.number}"
                yield Row(
                    where, line.record, (line.record is None and f"{where} {line.fault}.") or ""
                )
        return
    looks_local = source[:1] in {"/", ".", "~", ""} or source.count("/") != 1
    if not path.is_dir() and looks_local:
        raise DataError(
            f"{source} does not exist; give a JSON-lines file, a folder, or a data set's name on "
            "the hub (owner/name)."
        )
    for number, record in enumerate(_data_set(source, split, config, revision), 1):
        yield Row(f"{source}, {split}, row {number}", _with_lists_of_objects(record))


def _holds_json_lines(folder: Path) -> bool:
    return any(p.name.endswith((".jsonl", ".jsonl.gz")) for p in folder.rglob("*"))


def _data_set(
    source: str, split: str, config: str | None, revision: str | None
) -> Iterator[Mapping[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{source} is a data set, which the library `datasets` reads, and that is not "
            "installed; install dspark[data]."
        ) from error
    try:
        found = datasets.load_dataset(source, config, split=split, revision=revision)
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"The data set {source} cannot be read, split {split!r}: {reason.rstrip('.')}."
        ) from error
    yield from found


def _with_lists_of_objects(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Older data sets hold a list of objects as an object of lists."""
    return {key: _as_list_of_objects(value) for key, value in record.items()}


def _as_list_of_objects(value: object) -> object:
    if not isinstance(value, dict) or not value:
        return value
    if not all(isinstance(column, list) for column in value.values()):
        return value
    return [dict(zip(value, row, strict=False)) for row in zip(*value.values(), strict=False)]
