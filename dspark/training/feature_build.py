"""Builds and mends the feature cache that a recipe names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dspark.data.features.build import (
    BuildReport,
    Estimate,
    build_cache,
    mend,
    wanted_manifest,
)
from dspark.data.features.manifest import MANIFEST
from dspark.errors import RecipeError
from dspark.targets.target import Target
from dspark.training.feature_opening import recipe_taps, sample_recipe
from dspark.training.features.samples import load_samples
from dspark.training.parallel import pick_device
from dspark.training.recipe import BlockRecipe, ChainRecipe, DrafterRecipe


def build_features(
    recipe: DrafterRecipe,
    *,
    device: str = "auto",
    announce: Callable[[Estimate], None] = lambda _: None,
    progress: Callable[[int, int], None] = lambda _, __: None,
) -> BuildReport:
    """Compute what the recipe's cache lacks of its samples.

    Args:
        recipe: with `features.path`.
        device: overrides the recipe's device unless `auto`.
        announce: told the estimate before the work starts.
        progress: told (tokens done, tokens in all).

    Raises:
        CheckpointError, CompatibilityError: the target cannot be loaded.
        DataError: as `data.features.build.build_cache`.
        RecipeError: the recipe names no samples.
    """
    assert isinstance(recipe, BlockRecipe | ChainRecipe)
    assert recipe.features.path is not None
    if not recipe.samples.paths:
        raise RecipeError("samples.paths is empty, but a cache is built of samples; name files.")
    place = pick_device(recipe.run.device if device == "auto" else device)
    target = Target.load(recipe.target, device=place, dtype=recipe.run.dtype, weights="plain")
    samples = load_samples(recipe, target)
    if not samples:
        raise RecipeError(
            f"samples.paths holds no sample with {recipe.samples.min_supervised} answer tokens; "
            "lower samples.min_supervised or name other files."
        )
    wanted = wanted_manifest(
        target,
        recipe.target,
        recipe_taps(recipe, target.num_layers),
        sample_recipe(recipe, samples),
        recipe.features.coding,
    )
    return build_cache(
        Path(recipe.features.path),
        wanted,
        target,
        samples,
        tokens_per_forward=recipe.features.tokens_per_forward,
        max_bytes=recipe.features.max_bytes,
        announce=announce,
        progress=progress,
    )


def mend_features(recipe: DrafterRecipe) -> int:
    """Drop the damaged samples of the recipe's cache, if there is one; how many they were.

    Raises:
        DataError: the cache's manifest is damaged.
    """
    assert recipe.features.path is not None
    directory = Path(recipe.features.path)
    return mend(directory) if (directory / MANIFEST).is_file() else 0
