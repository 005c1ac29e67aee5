"""File layout of a feature cache: which rows are stored, index records, and the payloads of shards.

A context row is seen by anchors behind it, and the last anchor is the token before the last
supervised one. A teacher row precedes a supervised token and gives its distribution. Both hold for
block drafters as for chains (docs/method.md), whose row i predicts token i + 2; no other row is
stored.

A payload holds a sample's tokens and loss mask, its feature rows and its teacher rows. Index
records carry their own checksums, so that a torn index is readable up to the damage.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterable
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from dspark.data.features.manifest import KEY_BYTES
from dspark.data.samples import Sample


def num_context_rows(sample: Sample) -> int:
    """Number of leading rows that a drafter may see: those before the last anchor."""
    supervised = [i for i, counts in enumerate(sample.loss_mask) if counts]
    return max(supervised[-1] - 1, 0) if supervised else 0


def teacher_rows(sample: Sample) -> list[int]:
    """The rows whose next token is supervised, ascending."""
    return [i - 1 for i, counts in enumerate(sample.loss_mask) if counts and i > 0]


@dataclass(frozen=True)
class StoredRows:
    """The rows of a sample in a cache.

    Attributes:
        features_RPH: the first R rows of every tap.
        teacher_MH: states after the final norm.
        teacher_rows: indices of these rows, ascending.
    """

    features_RPH: Tensor
    teacher_MH: Tensor
    teacher_rows: list[int]


_LAYOUT = struct.Struct(f"<{KEY_BYTES}sIIIIQQI")
RECORD_BYTES = _LAYOUT.size + 4  # followed by its own checksum
_SHARD_NAME = re.compile(r"shard-(\d{3})-(\d{5})\.bin")


@dataclass(frozen=True)
class Record:
    """Index record of a sample.

    Attributes:
        key: hash of the sample.
        shard: number among its writer's shards.
        num_tokens: of the sample.
        num_context: stored feature rows, the leading ones.
        num_teacher: stored teacher rows.
        offset: of the payload in the shard, bytes.
        size: of the payload, bytes.
        checksum: CRC-32 of the payload.
        writer: number of the writer, part of the file name.
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
        """End offset of the payload."""
        return self.offset + self.size

    def pack(self) -> bytes:
        """The encoded record with its checksum."""
        data = _LAYOUT.pack(*astuple(self)[:-1])  # the writer is known by the file
        return data + zlib.crc32(data).to_bytes(4, "little")


def index_path(directory: Path, writer: int) -> Path:
    """Path of a writer's index."""
    return directory / f"index-{writer:03d}.bin"


def shard_path(directory: Path, writer: int, shard: int) -> Path:
    """Path of a writer's shard."""
    return directory / f"shard-{writer:03d}-{shard:05d}.bin"


def shards_of(directory: Path, writer: int) -> list[tuple[int, Path]]:
    """Numbers and paths of a writer's shards, ascending."""
    found = []
    for path in directory.glob(f"shard-{writer:03d}-*.bin"):
        match = _SHARD_NAME.fullmatch(path.name)
        if match:
            found.append((int(match[2]), path))
    return sorted(found)


def writers_of(directory: Path) -> list[int]:
    """Numbers of a cache's writers, ascending."""
    names = (re.fullmatch(r"index-(\d{3})\.bin", p.name) for p in directory.iterdir())
    return sorted(int(match[1]) for match in names if match)


def parse_records(data: bytes, writer: int) -> list[Record]:
    """The intact records in part of an index; truncated or damaged ones are skipped."""
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
    """The records whose payload lies within its shard."""
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


_SIZES = struct.Struct("<III")  # bytes of the three parts, which follow


@dataclass(frozen=True)
class Parts:
    """The three parts of a payload, undecoded."""

    sample: memoryview
    features: memoryview
    teacher: memoryview


def join(sample: Sample, features: bytes, teacher: bytes) -> bytes:
    """A payload of its parts."""
    ids = np.asarray(sample.input_ids, dtype="<u4")
    # Byte planes compress better, because the upper bytes of ids are mostly 0.
    planes = ids.view(np.uint8).reshape(-1, 4).T.tobytes()
    mask = np.packbits(np.asarray(sample.loss_mask, dtype=bool)).tobytes()
    head = zlib.compress(planes + mask, 6)
    sizes = _SIZES.pack(len(head), len(features), len(teacher))
    return b"".join([sizes, head, features, teacher])


def split(payload: memoryview) -> Parts:
    """The parts of a payload."""
    first, second, _ = _SIZES.unpack(payload[: _SIZES.size])
    rest = payload[_SIZES.size :]
    return Parts(rest[:first], rest[first : first + second], rest[first + second :])


def read_sample(part: memoryview, num_tokens: int) -> Sample:
    """The sample of a payload's first part."""
    raw = np.frombuffer(zlib.decompress(part), dtype=np.uint8)
    ids = np.ascontiguousarray(raw[: 4 * num_tokens].reshape(4, num_tokens).T).view("<u4")
    mask = np.unpackbits(raw[4 * num_tokens :])[:num_tokens].astype(bool)
    return Sample(tuple(ids.ravel().tolist()), tuple(mask.tolist()))
