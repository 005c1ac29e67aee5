"""Where rows come from: JSON-lines files, folders of them, and data sets of a folder or the hub.

What prompts are collected from and what a drafter is evaluated on are read here alike.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from dspark.data.hub import DataSet, data_set_rows
from dspark.data.json_lines import JSON_LINES, json_lines_files, scan_json_lines
from dspark.data.rows import Row
from dspark.errors import DataError

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def read_rows(
    source: DataSet,
    columns: Sequence[str] = (),
    *,
    offline: bool = False,
    stream: bool = False,
) -> Iterator[Row]:
    """Yield the rows of a source, those that are damaged included.

    Args:
        source: its name is that of a JSON-lines file, of a folder of them (for which nothing else
            of it counts), of any other folder that holds a data set, or of one on the hub.
        columns: a data set must have one of these; JSON lines are for the reader to judge.
        offline: read what is on this machine alone.
        stream: fetch the rows of a data set as they are read, not all of it first.

    Raises:
        DataError: there is no such source, it holds nothing, or `data_set_rows` says why it cannot
            be read.
    """
    path = Path(source.name).expanduser()
    if (path.exists() and not path.is_dir()) or (
        path.is_dir() and any(map(_is_json_lines, path.rglob("*")))
    ):
        for file in json_lines_files(path):
            yield from scan_json_lines(file)
        return
    if not path.is_dir() and (_is_json_lines(path) or not _HUB_ID.fullmatch(source.name)):
        raise DataError(
            f"{source.name} does not exist; give a JSON-lines file, a folder, or a data set's name "
            "on the hub (owner/name)."
        )
    yield from data_set_rows(source, columns, offline=offline, stream=stream)


def _is_json_lines(path: Path) -> bool:
    return path.name.endswith(JSON_LINES)
