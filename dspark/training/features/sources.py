"""Where a step's features come from: the target in the step, a cache on disk, or both."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

from dspark.data.features.cache import FeatureCache
from dspark.data.features.encoder import Encoder, target_features
from dspark.data.features.manifest import sample_key
from dspark.data.features.rows import FeatureStore, StoredRows
from dspark.data.features.writer import CacheWriter, DiskFullError, Entry
from dspark.data.samples import Sample
from dspark.errors import DataError
from dspark.targets.target import Target

_THREADS = 8
logger = logging.getLogger(__name__)


class FeatureSource(Protocol):
    """Gives the features of samples."""

    def features(self, samples: Sequence[Sample], taps: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Features [T, F] of the taps, and states after the target's final norm [T, H].

        T is the sum of the samples' lengths. Rows that training cannot use (`data/features/
        needed.py`) may be 0.
        """
        ...


class OnlineFeatures:
    """Runs the target: nothing on disk.

    Args:
        target: frozen.
    """

    def __init__(self, target: Target) -> None:
        self.target = target

    def features(self, samples: Sequence[Sample], taps: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Run it over the samples."""
        return target_features(self.target, samples, taps)


class CachedFeatures:
    """Reads a cache.

    Args:
        store: the cache.
        device: where rows go.
        dtype: of the rows.
    """

    def __init__(self, store: FeatureStore, device: torch.device, dtype: torch.dtype) -> None:
        self.store = store
        self.device = device
        self.dtype = dtype
        self._pool = ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1))  # to undo Huffman codes

    def features(self, samples: Sequence[Sample], taps: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Read the samples' rows; those that are not stored are 0.

        Raises:
            DataError: the cache does not hold a sample, or holds it damaged.
        """
        found = list(self._pool.map(lambda s: self._sample(s, taps), samples))
        return torch.cat([row[0] for row in found]), torch.cat([row[1] for row in found])

    def _sample(self, sample: Sample, taps: Sequence[int]) -> tuple[Tensor, Tensor]:
        return self.placed(sample, self.store.rows(sample, self.device), taps)

    def placed(
        self, sample: Sample, stored: StoredRows, taps: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """A sample's stored rows in their places."""
        length, width = len(sample.input_ids), self.store.hidden_size
        planes = [self.store.taps.index(tap) for tap in taps]
        features_LPH = torch.zeros(length, len(planes), width, device=self.device, dtype=self.dtype)
        features_LPH[: len(stored.features_RPH)] = stored.features_RPH[:, planes].to(self.dtype)
        hidden_LH = features_LPH.new_zeros(length, width)
        rows_M = torch.tensor(stored.teacher_rows, dtype=torch.int64, device=self.device)
        hidden_LH[rows_M] = stored.teacher_MH.to(self.dtype)
        return features_LPH.flatten(1), hidden_LH


class HybridFeatures:
    """Reads what a cache holds, and runs the target over the rest.

    Args:
        store: the cache.
        target: frozen.
    """

    def __init__(self, store: FeatureStore, target: Target) -> None:
        self.cached = CachedFeatures(store, target.device, target.dtype)
        self.target = target

    def features(self, samples: Sequence[Sample], taps: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Read or compute the samples' rows; a damaged sample is computed."""
        found: dict[bytes, tuple[Tensor, Tensor]] = {}
        for sample in samples:
            if sample in self.cached.store:
                try:
                    found[sample_key(sample)] = self.cached.features([sample], taps)
                except DataError as error:
                    logger.warning("%s Until then its features are computed.", error)
        missing = [s for s in samples if sample_key(s) not in found]
        if missing:
            found |= self._computed(missing, taps)
        both = [found[sample_key(s)] for s in samples]
        return torch.cat([row[0] for row in both]), torch.cat([row[1] for row in both])

    def _computed(
        self, samples: Sequence[Sample], taps: Sequence[int]
    ) -> dict[bytes, tuple[Tensor, Tensor]]:
        return _apart(samples, *target_features(self.target, samples, taps))


class FillingFeatures(HybridFeatures):
    """Adds what it computes to the cache.

    What it computes is coded and decoded before it is used, as what it reads was: so a step does
    not depend on what the cache held, and a run that is resumed repeats the uncut one.

    Args:
        cache: to read and to fill.
        target: frozen.
        writer: to the same cache.
        encoder: of the cache's manifest.
    """

    def __init__(
        self, cache: FeatureCache, target: Target, writer: CacheWriter, encoder: Encoder
    ) -> None:
        super().__init__(cache, target)
        self.cache = cache
        self.writer: CacheWriter | None = writer
        self.encoder = encoder
        # Nobody tells a source that the run is over.
        weakref.finalize(self, writer.close)
        weakref.finalize(self, encoder.close)

    def features(self, samples: Sequence[Sample], taps: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Read or compute the samples' rows; those of other ranks are found too."""
        if any(sample not in self.cache for sample in samples):
            self.cache.refresh()
        return super().features(samples, taps)

    def _computed(
        self, samples: Sequence[Sample], taps: Sequence[int]
    ) -> dict[bytes, tuple[Tensor, Tensor]]:
        features_TF, hidden_TH = target_features(self.target, samples, taps)
        found = _apart(samples, features_TF, hidden_TH)
        encoded = self.encoder.encode(samples, features_TF, hidden_TH)
        entries = [future.result() for future in encoded.entries]
        for entry in entries:
            stored = self.cache.decode(memoryview(entry.payload), entry.sample, self.target.device)
            found[sample_key(entry.sample)] = self.cached.placed(entry.sample, stored, taps)
        if self.writer is not None:
            self._add(self.writer, entries)
        return found

    def _add(self, writer: CacheWriter, entries: Sequence[Entry]) -> None:
        """Add samples; a disk that is full ends the adding, not the training."""
        try:
            for entry in entries:
                if entry.sample not in self.cache:  # a damaged one is, until it is mended
                    writer.add(entry)
            writer.commit()
        except DiskFullError as error:
            logger.warning("%s Until then training computes the rest.", error)
            writer.close()
            self.writer = None
        self.cache.refresh()


def _apart(
    samples: Sequence[Sample], features_TF: Tensor, hidden_TH: Tensor
) -> dict[bytes, tuple[Tensor, Tensor]]:
    """Each sample's own of the packed rows."""
    lengths = [len(s.input_ids) for s in samples]
    rows = zip(*(torch.split(x, lengths) for x in (features_TF, hidden_TH)), strict=True)
    return {sample_key(s): row for s, row in zip(samples, rows, strict=True)}
