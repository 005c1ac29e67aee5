"""A row: one record of a source, be it a line of a file or a row of a data set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dspark.errors import DataError


@dataclass(frozen=True)
class Row:
    """One record of a source, or what stands in its place.

    Attributes:
        where: file and line, or data set, split and row.
        record: what it holds; None where it cannot be read.
        fault: why not, a sentence; empty where nothing is wrong.
        number: counted from 1; of a file, blank lines included.
        raw: the bytes of a line; empty of a data set's row, or where a file cannot be read on.
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
