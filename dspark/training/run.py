"""From a recipe's name to a finished run."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from dspark.errors import RecipeError
from dspark.training.drafter import DrafterObjective
from dspark.training.eagle_drafter import Eagle3Objective
from dspark.training.language_model import LanguageModelObjective, prepare_tokenizer
from dspark.training.loop import Objective, TrainingResult, train
from dspark.training.online import load_frozen_target
from dspark.training.parallel import barrier, pick_device, start_parallel
from dspark.training.recipe import (
    Eagle3Recipe,
    MTPRecipe,
    Recipe,
    TargetRecipe,
    load_recipe,
)


def run_recipe(
    name: str,
    overrides: Sequence[str] = (),
    *,
    resume: bool = False,
    device: str = "auto",
    console: Console | None = None,
) -> TrainingResult:
    """Train what a recipe describes.

    Under torchrun the rows of a step are shared between its processes.

    Args:
        name: a YAML file or the name of a bundled recipe.
        overrides: `key.subkey=value` strings.
        resume: go on from the last checkpoint in the output directory, if there is one.
        device: overrides the recipe's device unless `auto`.
        console: where the progress bar goes; standard error by default.

    Raises:
        RecipeError: the recipe cannot be used.
        DataError, CheckpointError, CompatibilityError: as its parts raise.
        TrainingError: the run cannot go on.
    """
    recipe = load_recipe(name, overrides)
    place = pick_device(recipe.run.device if device == "auto" else device)
    rank, ranks = start_parallel(place)
    parts = ranks * recipe.run.accumulate
    if recipe.run.rows % parts:
        raise RecipeError(
            f"run.rows is {recipe.run.rows}, but must be a multiple of the {parts} parts that a "
            f"step has ({ranks} processes, run.accumulate {recipe.run.accumulate})."
        )
    if isinstance(recipe, TargetRecipe) and rank == 0:
        prepare_tokenizer(recipe)  # the other ranks read what this one writes
    barrier()
    return train(
        _objective(recipe, place),
        recipe.run,
        recipe.optimiser,
        rank=rank,
        ranks=ranks,
        resume=resume,
        console=console,
    )


def _objective(recipe: Recipe, device: str) -> Objective:
    if isinstance(recipe, TargetRecipe):
        return LanguageModelObjective(recipe, device)
    target = load_frozen_target(recipe, device, recipe.run.dtype)
    if isinstance(recipe, Eagle3Recipe | MTPRecipe):
        return Eagle3Objective(recipe, target)
    return DrafterObjective(recipe, target)
