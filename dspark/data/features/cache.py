"""Reader of a feature cache: shards are memory-mapped once, every payload is checked by its CRC."""

from __future__ import annotations

import mmap
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch

from dspark.data.features.manifest import FORMAT, Manifest, read_manifest, sample_key
from dspark.data.features.reference import ReferenceCache
from dspark.data.features.shards import (
    RECORD_BYTES,
    FeatureStore,
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
        self._features, self._teacher = self.manifest.codecs()
        self._records: dict[bytes, Record] = {}
        self._read_bytes: dict[tuple[int, int], int] = {}  # of each writer's index, by its inode
        self._maps: dict[tuple[int, int], mmap.mmap] = {}
        self.refresh()

    @property
    def taps(self) -> tuple[int, ...]:
        """Captured layers."""
        return self.manifest.origin.taps

    @property
    def hidden_size(self) -> int:
        """H."""
        return self.manifest.origin.hidden_size

    @property
    def target_fingerprint(self) -> str:
        """Fingerprint of the target that made it."""
        return self.manifest.origin.target_fingerprint

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


def open_cache(directory: Path) -> FeatureStore:
    """Open a cache of either format, according to its manifest.

    Raises:
        DataError: there is none, or its manifest is damaged or of an unknown format.
    """
    if read_manifest(directory).get("format") == FORMAT:
        return FeatureCache(directory)
    return ReferenceCache(directory)
