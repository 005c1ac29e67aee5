"""Ring of samples on disk: a feature cache whose oldest segment gives way to the newest.

A segment is one writer of the cache (`data.features`), so that readers need not know of the ring.
"""

from __future__ import annotations

import itertools
from pathlib import Path

from torch import Tensor

from dspark.data.features.encoder import Encoder
from dspark.data.features.manifest import MANIFEST, Coding, Manifest, Origin, SampleRecipe
from dspark.data.features.shards import index_path, shards_of, writers_of
from dspark.data.features.writer import CacheWriter
from dspark.data.samples import Sample

SEGMENTS = 8
_MOST_WRITERS = 1000


class SampleRing:
    """Writes samples and their features, and keeps the latest ones.

    Args:
        directory: of the cache; created if absent.
        origin: of the rows.
        max_length: tokens of a sample at most.
        max_bytes: size of the ring at most.

    Raises:
        DataError: the directory holds another cache, or another process writes to it.
    """

    def __init__(self, directory: Path, origin: Origin, max_length: int, max_bytes: int) -> None:
        nothing = SampleRecipe("", ("traffic",), max_length, 1, 0, 0)
        manifest = Manifest(origin, nothing, Coding("bfloat16", 0.0, 0.0), None)
        if (directory / MANIFEST).is_file():
            Manifest.read(directory).refuse_other(manifest, directory)
        else:
            manifest.write(directory)
        self._directory = directory
        self._segment_bytes = max(max_bytes // SEGMENTS, 1)
        self._encoder = Encoder(manifest)
        self._drop_oldest()
        self._writer = self._open(self._by_age()[-1] if self._by_age() else 0)

    def add(self, sample: Sample, features_LF: Tensor, hidden_LH: Tensor) -> bool:
        """Append a sample; `commit` makes it durable.

        Returns:
            False if its rows are not finite, or it is too large for a segment.

        Raises:
            DataError: it cannot be written.
        """
        encoded = self._encoder.encode([sample], features_LF, hidden_LH)
        if not encoded.entries:
            return False
        entry = encoded.entries[0].result()
        if self._writer.add(entry):
            return True
        self._next()
        return self._writer.add(entry)

    def commit(self) -> None:
        """Make added samples durable.

        Raises:
            DataError: they cannot be written.
        """
        self._writer.commit()

    def close(self) -> None:
        """Commit and release the lock."""
        self._writer.close()
        self._encoder.close()

    @property
    def bytes(self) -> int:
        """Size of all segments."""
        paths = [
            path
            for writer in writers_of(self._directory)
            for path in (index_path(self._directory, writer), *self._shards(writer))
        ]
        return sum(path.stat().st_size for path in paths)

    def _open(self, writer: int) -> CacheWriter:
        return CacheWriter(self._directory, writer=writer, max_bytes=self._segment_bytes)

    def _next(self) -> None:
        """Begin a segment, in the place of the oldest one."""
        newest = self._writer.writer
        self._writer.close()
        self._writer = self._open((newest + 1) % _MOST_WRITERS)
        self._drop_oldest()

    def _drop_oldest(self) -> None:
        for writer in self._by_age()[:-SEGMENTS]:
            for path in (index_path(self._directory, writer), *self._shards(writer)):
                path.unlink(missing_ok=True)

    def _by_age(self) -> list[int]:
        """Numbers of the segments, the oldest first: numbers begin again at 0."""
        found = writers_of(self._directory)
        pairs = enumerate(itertools.pairwise(found), start=1)
        gap = next((place for place, (a, b) in pairs if b - a > SEGMENTS), 0)
        return [*found[gap:], *found[:gap]]

    def _shards(self, writer: int) -> list[Path]:
        return [path for _, path in shards_of(self._directory, writer)]
