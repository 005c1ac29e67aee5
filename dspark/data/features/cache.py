"""Readers of feature caches: our own, and the published training code's (version 2).

Of our own, shards are memory-mapped once and every payload is checked by its CRC. Of version 2, all
is little endian: `samples.idx` holds 56-byte records; a shard holds per sample, unpadded, input_ids
int32 [S], attention_mask u8 [S], loss_mask u8 [S], the taps' states bf16 [S, P H] and the states
after the final norm bf16 [S, H].
"""

from __future__ import annotations

import mmap
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dspark.data.features.manifest import FORMAT, MANIFEST, Manifest, read_manifest, sample_key
from dspark.data.features.shards import (
    RECORD_BYTES,
    Record,
    StoredRows,
    backed,
    index_path,
    num_context_rows,
    parse_records,
    read_sample,
    shard_path,
    split,
    teacher_rows,
    writers_of,
)
from dspark.data.samples import Sample
from dspark.errors import DataError

VERSION = 2
INDEX = "samples.idx"
_RECORD = struct.Struct("<QIIQQQQQ")
_DTYPES = {"hidden_dtype": "bfloat16", "token_dtype": "int32", "mask_dtype": "uint8"}


@dataclass(frozen=True)
class _Place:
    """A sample's shard, its tokens, and where its arrays begin."""

    shard: int
    num_tokens: int
    ids: int
    mask: int
    features: int
    teacher: int


class ReferenceCache:
    """A version-2 cache; read only.

    Args:
        directory: with manifest.json, samples.idx and the shards.

    Raises:
        DataError: it is of another version, or a file is missing, short or malformed.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        manifest = read_manifest(directory)
        wanted = {"version": VERSION, "index_record_size": _RECORD.size, **_DTYPES}
        for name, value in wanted.items():
            if manifest.get(name) != value:
                raise DataError(
                    f"{directory / MANIFEST} has {name} {manifest.get(name)!r}, but a feature "
                    f"cache that can be read has {value!r}; build one with `dspark data cache`."
                )
        try:
            self.taps = tuple(int(i) for i in manifest["target_layer_ids"])
            self.hidden_size = int(manifest["hidden_size"])
            files = {int(s["shard_id"]): str(s["file_name"]) for s in manifest["shards"]}
            count = int(manifest["num_samples"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{directory / MANIFEST} lacks what a version-2 cache says ({error!r}); copy it "
                "again."
            ) from error
        self.target_fingerprint = None
        self._shards = {number: _map(directory / name) for number, name in files.items()}
        self._places = self._read_index(count)
        self._known: dict[bytes, _Place] = {}

    def __contains__(self, sample: Sample) -> bool:
        return sample_key(sample) in self._known

    def samples(self, max_length: int) -> Iterator[Sample]:
        """All samples, by id; longer ones are cut. Only what was given here can be read."""
        for place in self._places:
            length = min(place.num_tokens, max_length)
            shard = self._shards[place.shard]
            ids = np.frombuffer(shard, dtype="<i4", count=length, offset=place.ids)
            mask = np.frombuffer(shard, dtype=np.uint8, count=length, offset=place.mask)
            sample = Sample(tuple(ids.tolist()), tuple((mask != 0).tolist()))
            self._known[sample_key(sample)] = place
            yield sample

    def rows(self, sample: Sample, device: torch.device) -> StoredRows:
        """A sample's rows in bf16, on a device: all of them.

        Raises:
            DataError: the cache does not hold it.
        """
        place = self._known.get(sample_key(sample))
        if place is None:
            raise DataError(
                f"The cache {self.directory} does not hold one of the samples; a reference cache "
                "is trained on with its own: set samples.paths to []."
            )
        length, width = len(sample.input_ids), self.hidden_size
        planes = len(self.taps)
        shard = self._shards[place.shard]

        def states(offset: int, numbers: int) -> torch.Tensor:
            raw = np.frombuffer(shard, dtype="<i2", count=numbers, offset=offset)
            return torch.from_numpy(raw.astype(np.int16)).to(device).view(torch.bfloat16)

        features = states(place.features, length * planes * width)
        teacher = states(place.teacher, length * width)
        return StoredRows(
            features.view(length, planes, width), teacher.view(length, width), list(range(length))
        )

    def _read_index(self, count: int) -> list[_Place]:
        path = self.directory / INDEX
        data = path.read_bytes() if path.is_file() else b""
        if len(data) != count * _RECORD.size:
            raise DataError(
                f"{path} holds {len(data)} bytes, but {count} samples take "
                f"{count * _RECORD.size}; copy the cache again."
            )
        return [self._place(fields) for fields in _RECORD.iter_unpack(data)]

    def _place(self, fields: tuple[int, ...]) -> _Place:
        sample_id, shard, length, ids, _, mask, features, teacher = fields
        mapped = self._shards.get(shard)
        if mapped is None or teacher + 2 * length * self.hidden_size > len(mapped):
            raise DataError(
                f"{self.directory} is cut short: sample {sample_id} lies beyond the end of shard "
                f"{shard}; copy the cache again."
            )
        return _Place(shard, length, ids, mask, features, teacher)


def _map(path: Path) -> mmap.mmap | bytes:
    """A shard, mapped into memory; no file may be empty to be mapped."""
    if not path.is_file():
        raise DataError(f"{path} is missing, though {MANIFEST} names it; copy the cache again.")
    if not path.stat().st_size:
        return b""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


class FeatureCache:
    """A cache written by `CacheWriter`; writers may be active.

    Args:
        directory: of the cache.

    Raises:
        DataError: there is no cache, or its manifest is damaged.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.manifest = Manifest.read(directory)
        origin = self.manifest.origin
        self.taps, self.hidden_size = origin.taps, origin.hidden_size
        self.target_fingerprint = origin.target_fingerprint
        self._features, self._teacher = self.manifest.codecs()
        self._records: dict[bytes, Record] = {}
        self._read_bytes: dict[tuple[int, int], int] = {}  # of each writer's index, by its inode
        self._maps: dict[tuple[int, int], mmap.mmap] = {}
        self.refresh()

    @property
    def records(self) -> list[Record]:
        """One per sample."""
        return list(self._records.values())

    @property
    def bytes(self) -> int:
        """Size of all payloads and records."""
        return sum(record.size + RECORD_BYTES for record in self._records.values())

    @property
    def tokens(self) -> int:
        """Tokens of all samples."""
        return sum(record.num_tokens for record in self._records.values())

    def part_bytes(self) -> tuple[int, int, int]:
        """Bytes of tokens and loss masks, of features, and of teacher states, over all payloads."""
        parts = [split(self._bytes_of(record)) for record in self._records.values()]
        return (
            sum(len(p.sample) for p in parts),
            sum(len(p.features) for p in parts),
            sum(len(p.teacher) for p in parts),
        )

    def refresh(self) -> None:
        """Read records committed since the cache was opened."""
        for writer in writers_of(self.directory):
            with index_path(self.directory, writer).open("rb") as file:
                # A writer that finds damage replaces the index file.
                index = (writer, os.fstat(file.fileno()).st_ino)
                start = file.seek(self._read_bytes.get(index, 0))
                data = file.read()
            whole = len(data) - len(data) % RECORD_BYTES
            self._read_bytes[index] = start + whole
            for record in backed(self.directory, parse_records(data[:whole], writer)):
                self._records.setdefault(record.key, record)

    def __contains__(self, sample: Sample) -> bool:
        return sample_key(sample) in self._records

    def rows(self, sample: Sample, device: torch.device) -> StoredRows:
        """A sample's rows, on a device: fp32, or bf16 where they are stored so.

        Raises:
            DataError: the cache does not hold it, or holds it damaged.
        """
        record = self._records.get(sample_key(sample))
        if record is None:
            raise DataError(
                f"The cache {self.directory} does not hold one of the samples; build it with "
                "`dspark data cache`, or set features.source to hybrid."
            )
        return self.decode(self._payload(record), sample, device)

    def decode(self, payload: memoryview, sample: Sample, device: torch.device) -> StoredRows:
        """The rows of a payload, which need not be in the cache."""
        parts = split(payload)
        rows = teacher_rows(sample)
        features_RPH = self._features.unpack(parts.features, num_context_rows(sample), device)
        teacher_M1H = self._teacher.unpack(parts.teacher, len(rows), device)
        return StoredRows(features_RPH, teacher_M1H.squeeze(1), rows)

    def samples(self, max_length: int) -> Iterator[Sample]:
        """All samples in writing order.

        Raises:
            DataError: one is longer than `max_length`, or damaged.
        """
        for record in self._records.values():
            if record.num_tokens > max_length:
                raise DataError(
                    f"The cache {self.directory} holds a sample of {record.num_tokens} tokens, but "
                    f"samples.max_length is {max_length}; set that to "
                    f"{self.manifest.samples.max_length}."
                )
            yield read_sample(split(self._payload(record)).sample, record.num_tokens)

    def is_whole(self, record: Record) -> bool:
        """Whether a payload matches its checksum."""
        return zlib.crc32(self._bytes_of(record)) == record.checksum

    def _payload(self, record: Record) -> memoryview:
        payload = self._bytes_of(record)
        if zlib.crc32(payload) != record.checksum:
            path = shard_path(self.directory, record.writer, record.shard)
            raise DataError(
                f"{path} is damaged at byte {record.offset} (its checksum differs); mend the cache "
                "with `dspark data cache RECIPE --check`."
            )
        return payload

    def _bytes_of(self, record: Record) -> memoryview:
        place = (record.writer, record.shard)
        mapped = self._maps.get(place)
        if mapped is None or len(mapped) < record.end:
            with shard_path(self.directory, *place).open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._maps[place] = mapped
        return memoryview(mapped)[record.offset : record.end]


FeatureStore = FeatureCache | ReferenceCache
"""A feature cache of either format."""


def open_cache(directory: Path) -> FeatureStore:
    """Open a cache of either format, according to its manifest.

    Raises:
        DataError: there is none, or its manifest is damaged or of an unknown format.
    """
    if read_manifest(directory).get("format") == FORMAT:
        return FeatureCache(directory)
    return ReferenceCache(directory)
