"""Feature sources: the target online, a cache on disk, or both; opened as the recipe says."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from dspark.data.features.build import start_cache, wanted_manifest
from dspark.data.features.cache import FeatureCache, FeatureStore, open_cache
from dspark.data.features.encoder import Encoder, target_features
from dspark.data.features.manifest import (
    MANIFEST,
    SampleRecipe,
    sample_key,
    samples_fingerprint,
    target_fingerprint,
)
from dspark.data.features.shards import StoredRows
from dspark.data.features.writer import CacheWriter, DiskFullError, Entry
from dspark.data.samples import Sample
from dspark.errors import DataError, RecipeError
from dspark.targets.target import Target
from dspark.training.parallel import barrier
from dspark.training.recipe import BlockRecipe, ChainRecipe, DrafterRecipe, Eagle3Recipe, MTPRecipe

_THREADS = 8
logger = logging.getLogger(__name__)


class OnlineFeatures:
    """Computes features with the target.

    Args:
        target: frozen.
    """

    def __init__(self, target: Target) -> None:
        self.target = target

    def features(self, samples: Sequence[Sample], taps: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Run the target over the samples."""
        return target_features(self.target, samples, taps)


class CachedFeatures:
    """Reads features from a cache.

    Args:
        store: the cache.
        device: of the rows.
        dtype: of the rows.
    """

    def __init__(self, store: FeatureStore, device: torch.device, dtype: torch.dtype) -> None:
        self.store = store
        self.device = device
        self.dtype = dtype
        self._pool = ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1))  # for Huffman decoding

    def features(self, samples: Sequence[Sample], taps: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Read the samples' rows; rows that are not stored are 0.

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
        """A sample's stored rows at their positions."""
        length, width = len(sample.input_ids), self.store.hidden_size
        planes = [self.store.taps.index(tap) for tap in taps]
        features_LPH = torch.zeros(length, len(planes), width, device=self.device, dtype=self.dtype)
        features_LPH[: len(stored.features_RPH)] = stored.features_RPH[:, planes].to(self.dtype)
        hidden_LH = features_LPH.new_zeros(length, width)
        rows_M = torch.tensor(stored.teacher_rows, dtype=torch.int64, device=self.device)
        hidden_LH[rows_M] = stored.teacher_MH.to(self.dtype)
        return features_LPH.flatten(1), hidden_LH


class HybridFeatures:
    """Reads cached samples and runs the target over the others.

    Args:
        store: the cache.
        target: frozen.
    """

    def __init__(self, store: FeatureStore, target: Target) -> None:
        self.cached = CachedFeatures(store, target.device, target.dtype)
        self.target = target

    def features(self, samples: Sequence[Sample], taps: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Read or compute the samples' rows; damaged samples are computed."""
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
    """Adds computed features to the cache.

    Computed features are encoded and decoded before use, like cached ones, so that a step does not
    depend on the cache's content and a resumed run repeats the uninterrupted one.

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
        # Sources have no close().
        weakref.finalize(self, writer.close)
        weakref.finalize(self, encoder.close)

    def features(self, samples: Sequence[Sample], taps: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Read or compute the samples' rows, including those added by other ranks."""
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
        """Add samples; a full disk ends the adding, not the training."""
        try:
            for entry in entries:
                if entry.sample not in self.cache:  # a damaged one is, until repaired
                    writer.add(entry)
            writer.commit()
        except DiskFullError as error:
            logger.warning("%s Until then training computes the rest.", error)
            writer.close()
            self.writer = None
        self.cache.refresh()


FeatureSource = OnlineFeatures | CachedFeatures | HybridFeatures
"""Gives features [T, F] of chosen taps and states after the final norm [T, H] of samples."""


def _apart(
    samples: Sequence[Sample], features_TF: Tensor, hidden_TH: Tensor
) -> dict[bytes, tuple[Tensor, Tensor]]:
    """The packed rows by sample."""
    lengths = [len(s.input_ids) for s in samples]
    rows = zip(*(torch.split(x, lengths) for x in (features_TF, hidden_TH)), strict=True)
    return {sample_key(s): row for s, row in zip(samples, rows, strict=True)}


def recipe_taps(recipe: DrafterRecipe, num_layers: int) -> tuple[int, ...]:
    """The layers that a recipe's drafter reads."""
    if isinstance(recipe, MTPRecipe):
        return (num_layers - 1,)
    assert isinstance(recipe, BlockRecipe | Eagle3Recipe)
    return recipe.drafter.taps(num_layers)


def sample_recipe(recipe: DrafterRecipe, samples: Sequence[Sample]) -> SampleRecipe:
    """The manifest entry of a recipe's samples."""
    assert isinstance(recipe, BlockRecipe | ChainRecipe)
    return SampleRecipe(
        fingerprint=samples_fingerprint(sample_key(s) for s in samples),
        paths=recipe.samples.paths,
        max_length=recipe.samples.max_length,
        min_supervised=recipe.samples.min_supervised,
        count=len(samples),
        tokens=sum(len(s.input_ids) for s in samples),
    )


def open_store(recipe: DrafterRecipe) -> FeatureStore | None:
    """The recipe's cache, if there is one.

    Raises:
        DataError: it is damaged, or required but missing.
    """
    s = recipe.features
    if s.path is None or (s.source == "hybrid" and not (Path(s.path) / MANIFEST).is_file()):
        return None
    return open_cache(Path(s.path))


def open_features(
    recipe: DrafterRecipe, target: Target, samples: Sequence[Sample], store: FeatureStore | None
) -> FeatureSource:
    """The feature source of a recipe.

    Args:
        recipe: with its `features`.
        target: frozen; without layers if all features are read.
        samples: of the run.
        store: from `open_store`.

    Raises:
        DataError: the cache is another target's, of other taps, or lacks samples.
        RecipeError: the cache cannot be added to.
    """
    s = recipe.features
    if s.source == "online":
        return OnlineFeatures(target)
    assert s.path is not None
    if s.source == "hybrid" and s.add:
        if store is not None and not isinstance(store, FeatureCache):
            raise RecipeError(
                f"features.add is true, but {s.path} is a reference cache, which is only read; set "
                "features.add to false."
            )
        return _filling(recipe, target, samples, Path(s.path))
    if store is None:
        store = open_cache(Path(s.path))
    _check_store(store, recipe, target)
    if s.source == "hybrid":
        return HybridFeatures(store, target)
    lacking = sum(sample not in store for sample in samples)
    if lacking:
        raise DataError(
            f"The cache {s.path} lacks {lacking} of the {len(samples)} samples; build it with "
            "`dspark data cache`, or set features.source to hybrid."
        )
    return CachedFeatures(store, target.device, target.dtype)


def _filling(
    recipe: DrafterRecipe, target: Target, samples: Sequence[Sample], directory: Path
) -> FillingFeatures:
    """Each rank has its own writer and an equal share of `max_bytes`."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if rank == 0:
        taps = recipe_taps(recipe, target.num_layers)
        of = sample_recipe(recipe, samples)
        wanted = wanted_manifest(target, recipe.target, taps, of, recipe.features.coding)
        start_cache(directory, wanted, target, samples)
    barrier()
    most = recipe.features.max_bytes
    share = None if most is None else most // ranks
    writer = CacheWriter(directory, writer=rank, max_bytes=share)
    cache = FeatureCache(directory)
    return FillingFeatures(cache, target, writer, Encoder(cache.manifest))


def _check_store(store: FeatureStore, recipe: DrafterRecipe, target: Target) -> None:
    made_by = store.target_fingerprint
    if made_by is not None:
        ours = target_fingerprint(recipe.target)
        if made_by != ours:
            raise DataError(
                f"The cache {store.directory} was made by a target with the fingerprint {made_by}, "
                f"but {recipe.target} has {ours}; build another with `dspark data cache`."
            )
    if store.hidden_size != target.hidden_size:
        raise DataError(
            f"The cache {store.directory} holds states of width {store.hidden_size}, but "
            f"{recipe.target} has {target.hidden_size}; build another with `dspark data cache`."
        )
    lacking = sorted(set(recipe_taps(recipe, target.num_layers)) - set(store.taps))
    if lacking:
        raise DataError(
            f"The cache {store.directory} holds the layers {list(store.taps)}, but the drafter "
            f"reads {lacking} too; build another with `dspark data cache`."
        )
