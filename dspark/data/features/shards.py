"""The index of a cache: a fixed-size record per sample, and what is whole of a file of them."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from dspark.data.features.identity import KEY_BYTES

_LAYOUT = struct.Struct(f"<{KEY_BYTES}sIIIIQQI")
RECORD_BYTES = _LAYOUT.size + 4  # its own checksum follows
_SHARD_NAME = re.compile(r"shard-(\d{3})-(\d{5})\.bin")


@dataclass(frozen=True)
class Record:
    """Where a sample's rows lie.

    Attributes:
        key: who the sample is.
        shard: number of the shard among its writer's.
        num_tokens: of the sample.
        num_context: stored feature rows, the first ones.
        num_teacher: stored teacher rows.
        offset: of the payload in the shard, bytes.
        size: of the payload, bytes.
        checksum: CRC-32 of the payload.
        writer: who wrote it: the number in the file's name.
    """

    key: bytes
    shard: int
    num_tokens: int
    num_context: int
    num_teacher: int
    offset: int
    size: int
    checksum: int
    writer: int = 0

    @property
    def end(self) -> int:
        """Where the payload ends."""
        return self.offset + self.size

    def pack(self) -> bytes:
        """The record as it is written."""
        data = _LAYOUT.pack(
            self.key,
            self.shard,
            self.num_tokens,
            self.num_context,
            self.num_teacher,
            self.offset,
            self.size,
            self.checksum,
        )
        return data + zlib.crc32(data).to_bytes(4, "little")


def index_path(directory: Path, writer: int) -> Path:
    """A writer's index."""
    return directory / f"index-{writer:03d}.bin"


def shard_path(directory: Path, writer: int, shard: int) -> Path:
    """A writer's shard."""
    return directory / f"shard-{writer:03d}-{shard:05d}.bin"


def shards_of(directory: Path, writer: int) -> list[tuple[int, Path]]:
    """A writer's shards by number, ascending."""
    found = []
    for path in directory.glob(f"shard-{writer:03d}-*.bin"):
        match = _SHARD_NAME.fullmatch(path.name)
        if match:
            found.append((int(match[2]), path))
    return sorted(found)


def writers_of(directory: Path) -> list[int]:
    """The numbers of those who have written to a cache, ascending."""
    names = (re.fullmatch(r"index-(\d{3})\.bin", p.name) for p in directory.iterdir())
    return sorted(int(match[1]) for match in names if match)


def parse_records(data: bytes, writer: int) -> list[Record]:
    """The records of a stretch of an index that are whole; a torn or damaged one is left out."""
    found = []
    for start in range(0, len(data) - RECORD_BYTES + 1, RECORD_BYTES):
        body, checksum = (
            data[start : start + _LAYOUT.size],
            data[start + _LAYOUT.size : start + RECORD_BYTES],
        )
        if zlib.crc32(body).to_bytes(4, "little") == checksum:
            found.append(replace(Record(*_LAYOUT.unpack(body)), writer=writer))
    return found


def backed(directory: Path, records: Iterable[Record]) -> list[Record]:
    """The records whose payload lies whole in its shard."""
    sizes: dict[tuple[int, int], int] = {}
    found = []
    for record in records:
        place = (record.writer, record.shard)
        if place not in sizes:
            path = shard_path(directory, *place)
            sizes[place] = path.stat().st_size if path.is_file() else 0
        if record.end <= sizes[place]:
            found.append(record)
    return found
