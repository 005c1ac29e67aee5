"""Crash-safe writer of a feature cache: whatever interrupts it, committed samples stay whole.

Payloads are synced to a shard before the index records that name them are written and synced. After
a crash a shard may therefore have a tail that no record names, and an index half a record at its
end; the next writer truncates both. Every writer has its own index and shards, and several may
write to one cache concurrently.
"""

from __future__ import annotations

import errno
import fcntl
import os
import zlib
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from dspark.data.features.manifest import sample_key
from dspark.data.features.shards import (
    RECORD_BYTES,
    Record,
    backed,
    index_path,
    parse_records,
    shard_path,
    shards_of,
)
from dspark.data.files.atomic import replace_file, sync_directory, write_all
from dspark.data.samples import Sample
from dspark.errors import DataError

SHARD_BYTES = 16 << 30
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class DiskFullError(DataError):
    """The disk of a cache is full; committed samples are whole."""


@dataclass(frozen=True)
class Entry:
    """An encoded sample."""

    sample: Sample
    num_context: int
    num_teacher: int
    payload: bytes


class CacheWriter:
    """Writes one writer's index and shards.

    Args:
        directory: of a cache with a manifest.
        writer: number of this writer, 0 to 999; the rank, if several write.
        max_bytes: size limit of this writer's files; further samples are left out.
        shard_bytes: size at which a new shard begins; a sample is never split.

    Raises:
        DataError: another process writes under this number.
    """

    def __init__(
        self,
        directory: Path,
        *,
        writer: int = 0,
        max_bytes: int | None = None,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        self.directory = directory
        self.writer = writer
        self.max_bytes = max_bytes
        self.shard_bytes = shard_bytes
        self._pending: list[Record] = []
        self._index = index_path(directory, writer).open("ab", buffering=0)
        try:
            _lock(self._index, directory)
            records = self._recover()
        except BaseException:
            self._index.close()
            raise
        self._shard_number = max((r.shard for r in records), default=0)
        self._shard, self._end = self._open_shard(self._shard_number)
        self.bytes = sum(p.stat().st_size for _, p in shards_of(directory, writer))
        self.bytes += len(records) * RECORD_BYTES

    def add(self, entry: Entry) -> bool:
        """Append a sample; `commit` makes it durable.

        Returns:
            False if it exceeds `max_bytes`.

        Raises:
            DiskFullError: it could not be written; earlier samples are committed.
        """
        size = len(entry.payload)
        grown = self.bytes + size + RECORD_BYTES
        if self.max_bytes is not None and grown > self.max_bytes:
            return False
        if self._end and self._end + size > self.shard_bytes:
            self._next_shard()
        try:
            write_all(self._shard.fileno(), entry.payload)
        except OSError as error:
            self._shard.truncate(self._end)
            self.commit()
            raise self._sentence(error) from error
        self._pending.append(
            Record(
                key=sample_key(entry.sample),
                shard=self._shard_number,
                num_tokens=len(entry.sample.input_ids),
                num_context=entry.num_context,
                num_teacher=entry.num_teacher,
                offset=self._end,
                size=size,
                checksum=zlib.crc32(entry.payload),
                writer=self.writer,
            )
        )
        self._end += size
        self.bytes = grown
        return True

    def commit(self) -> None:
        """Make added samples durable: payloads first, then the records that name them.

        Raises:
            DiskFullError: they could not be written; earlier commits are whole.
        """
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        start = os.fstat(self._index.fileno()).st_size
        try:
            os.fsync(self._shard.fileno())
            write_all(self._index.fileno(), b"".join(record.pack() for record in pending))
            os.fsync(self._index.fileno())
        except OSError as error:
            self._index.truncate(start)
            self._end = min(record.offset for record in pending)
            self._shard.truncate(self._end)
            self.bytes -= sum(record.size + RECORD_BYTES for record in pending)
            raise self._sentence(error) from error

    def close(self) -> None:
        """Commit and release the lock."""
        try:
            self.commit()
        finally:
            self._shard.close()
            self._index.close()

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _recover(self) -> list[Record]:
        """Truncate uncommitted data; returns the committed records."""
        path = index_path(self.directory, self.writer)
        data = path.read_bytes()
        records = backed(self.directory, parse_records(data, self.writer))
        if len(records) * RECORD_BYTES != len(data):
            rewrite_index(path, records)
            self._index.close()
            self._index = path.open("ab", buffering=0)
            _lock(self._index, self.directory)
        ends: dict[int, int] = {}
        for record in records:
            ends[record.shard] = max(ends.get(record.shard, 0), record.end)
        for number, shard in shards_of(self.directory, self.writer):
            if number not in ends:
                shard.unlink()
            elif shard.stat().st_size > ends[number]:
                os.truncate(shard, ends[number])
        return records

    def _open_shard(self, number: int) -> tuple[FileIO, int]:
        path = shard_path(self.directory, self.writer, number)
        file = path.open("ab", buffering=0)
        sync_directory(self.directory)
        return file, path.stat().st_size

    def _next_shard(self) -> None:
        self.commit()
        self._shard.close()
        self._shard_number += 1
        self._shard, self._end = self._open_shard(self._shard_number)

    def _sentence(self, error: OSError) -> DataError:
        held = f"the {self._committed()} samples that the cache holds are whole"
        if error.errno not in _FULL:
            return DataError(
                f"The cache {self.directory} cannot be written ({error.strerror}); {held}: run "
                "again to go on."
            )
        return DiskFullError(
            f"The disk of {self.directory} is full; {held}: free space, or set features.max_bytes, "
            "and run again to go on."
        )

    def _committed(self) -> int:
        return index_path(self.directory, self.writer).stat().st_size // RECORD_BYTES


def rewrite_index(path: Path, records: list[Record]) -> None:
    """Atomically replace an index by one of these records."""
    replace_file(path, b"".join(record.pack() for record in records))


def _lock(file: FileIO, directory: Path) -> None:
    """Lock an index against other writers."""
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise DataError(
            f"Another process is writing to the cache {directory}; wait for it, or give "
            "features.path another directory."
        ) from error
