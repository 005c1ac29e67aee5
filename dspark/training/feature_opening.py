"""From a recipe's `features` to the source that they name, or one clear sentence why not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from dspark.data.features.build import start_cache, wanted_manifest
from dspark.data.features.cache import FeatureCache, open_cache
from dspark.data.features.encoder import Encoder
from dspark.data.features.manifest import (
    MANIFEST,
    SampleRecipe,
    sample_key,
    samples_fingerprint,
    target_fingerprint,
)
from dspark.data.features.rows import FeatureStore
from dspark.data.features.writer import CacheWriter
from dspark.data.samples import Sample
from dspark.errors import DataError, RecipeError
from dspark.targets.target import Target
from dspark.training.features.sources import (
    CachedFeatures,
    FeatureSource,
    FillingFeatures,
    HybridFeatures,
    OnlineFeatures,
)
from dspark.training.parallel import barrier
from dspark.training.recipe import BlockRecipe, ChainRecipe, DrafterRecipe, Eagle3Recipe, MTPRecipe


def recipe_taps(recipe: DrafterRecipe, num_layers: int) -> tuple[int, ...]:
    """The layers that a recipe's drafter reads."""
    if isinstance(recipe, MTPRecipe):
        return (num_layers - 1,)
    assert isinstance(recipe, BlockRecipe | Eagle3Recipe)
    return recipe.drafter.taps(num_layers)


def sample_recipe(recipe: DrafterRecipe, samples: Sequence[Sample]) -> SampleRecipe:
    """What a cache notes of a recipe's samples."""
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
    """The cache that a recipe names, if there is one.

    Raises:
        DataError: it is damaged, or needed and not there.
    """
    s = recipe.features
    if s.path is None or (s.source == "hybrid" and not (Path(s.path) / MANIFEST).is_file()):
        return None
    return open_cache(Path(s.path))


def open_features(
    recipe: DrafterRecipe, target: Target, samples: Sequence[Sample], store: FeatureStore | None
) -> FeatureSource:
    """What a recipe says that features come from.

    Args:
        recipe: with its `features`.
        target: frozen; without layers where everything is read.
        samples: of the run.
        store: what `open_store` gave.

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
    """Every rank has a writer of its own, and an equal share of `max_bytes`."""
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
