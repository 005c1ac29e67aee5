"""Training a serving drafter on the samples of its own traffic, and judging it on others."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dspark.data.features.cache import FeatureCache
from dspark.data.samples import SampleStream, usable
from dspark.drafters.checkpoints.checkpoint import load_drafter, save
from dspark.drafters.checkpoints.registry import ATTACHED
from dspark.drafters.dspark import DSparkDrafter
from dspark.drafters.eagle3 import Eagle3Drafter
from dspark.errors import TrainingError, UsageError
from dspark.scheduling.calibration_file import FILE_NAME, Calibration
from dspark.serving.learning.directory import Plan
from dspark.targets.layerless import load_without_layers
from dspark.training.drafters.objectives import DrafterObjective
from dspark.training.loop import Training
from dspark.training.objective import DataOrder
from dspark.training.parallel import World
from dspark.training.recipe import BlockRecipe, DFlashRecipe, DSparkRecipe

MOST_JUDGED = 48
_HEADS = ("markov_rank", "markov_head_type", "confidence_head", "confidence_head_with_markov")
_SEED = 1


def check_learnable(drafter: object) -> None:
    """Refuse a drafter that is not trained while serving.

    Raises:
        UsageError: it is none of those whose recipe follows from its configuration.
    """
    if type(drafter) is not DSparkDrafter:
        raise UsageError(
            "--learn drafter trains DSpark and DFlash drafters, and this is neither; use --learn "
            "calibration."
        )


def recipe_of(drafter: DSparkDrafter, plan: Plan, cache: Path, rows: int) -> BlockRecipe:
    """The recipe of training this very drafter on a cache's samples."""
    config = drafter.config
    shape: dict[str, Any] = {
        "num_layers": config.backbone.num_layers,
        "block_size": config.block_size,
        "sample_from_anchor": config.sample_from_anchor,
        "target_layer_ids": list(config.target_layer_ids),
    }
    heads = {name: getattr(config, name) for name in _HEADS}
    plain = not (config.markov_rank or config.confidence_head)
    record = {
        "kind": "drafter",
        "algorithm": "dflash" if plain else "dspark",
        "target": plan.target,
        "drafter": shape if plain else shape | heads,
        "features": {"source": "cache", "path": str(cache)},
        "samples": {
            "paths": [],
            "max_length": plan.max_length,
            "min_supervised": 2,
            "num_anchors": plan.anchors,
        },
        "optimiser": {
            "name": "muon",
            "learning_rate": plan.learning_rate,
            "matrix_learning_rate": plan.matrix_learning_rate,
            "betas": [0.9, 0.98],
        },
        "run": {
            "output_dir": str(cache),
            "steps": plan.steps,
            "rows": rows,
            "seed": _SEED,
            "device": "cpu",
        },
    }
    return (DFlashRecipe if plain else DSparkRecipe).model_validate(record)


class DrafterTraining:
    """A drafter in training, without its target's layers.

    Args:
        plan: sizes and rates.
        train: cache of the samples to learn from.
        held_out: cache of those to judge by.
        pulse: called after every step; it may raise to end the process.
    """

    def __init__(
        self, plan: Plan, train: Path, held_out: Path, pulse: Callable[[], None] = lambda: None
    ) -> None:
        self.plan = plan
        self._train, self._held_out, self._pulse = train, held_out, pulse
        self._target = load_without_layers(plan.target, device="cpu", dtype="float32")

    def load(self, directory: Path) -> DSparkDrafter:
        """A drafter of a directory, in fp32, bound."""
        drafter = load_drafter(directory)
        check_learnable(drafter)
        assert isinstance(drafter, DSparkDrafter)
        drafter.float()
        drafter.bind(self._target.parts())
        return drafter

    def train(self, drafter: DSparkDrafter, seed: int) -> DSparkDrafter:
        """A copy of a drafter, trained for so many steps as the plan says.

        Args:
            drafter: stays as it is.
            seed: of the order of samples and of their anchors.

        Raises:
            DataError: there are too few samples, or one has just been dropped.
            TrainingError: the loss is not finite.
        """
        parts = self._target.parts()
        lent = (parts.embedding_VH, parts.head_VH, parts.head_bias_V)
        trained = copy.deepcopy(drafter, {id(tensor): tensor for tensor in lent})
        trained.bind(self._target.parts())
        recipe = recipe_of(trained, self.plan, self._train, self.plan.rows)
        recipe = recipe.model_copy(update={"run": recipe.run.model_copy(update={"seed": seed})})
        objective = DrafterObjective(recipe, self._target, trained)
        trained.train()
        stream = objective.samples.stream
        order = DataOrder(stream.batches_per_epoch, 0.0, lambda *_: "traffic")
        training = Training(objective, recipe.run, recipe.optimiser, order, World())
        for step in range(self.plan.steps):
            means, _ = training.gradients(step)
            norm = training.optimiser.clip(1.0)
            if not (math.isfinite(means["loss"]) and math.isfinite(norm)):
                raise TrainingError(f"Step {step} gave a loss of {means['loss']}.")
            training.optimiser.step(step)
            self._pulse()
        trained.eval()
        return trained

    @torch.no_grad()
    def length(self, drafter: DSparkDrafter) -> float:
        """Accepted length on the newest held-out samples, by both laws along the target's text.

        Raises:
            DataError: there are too few, or one has just been dropped.
        """
        cache = FeatureCache(self._held_out)
        newest = usable(cache.samples(self.plan.max_length), self.plan.max_length, 2)[-MOST_JUDGED:]
        rows = max(min(self.plan.rows, len(newest)), 1)
        recipe = recipe_of(drafter, self.plan, self._held_out, rows)
        objective = DrafterObjective(recipe, self._target, drafter)
        stream = objective.samples.stream = SampleStream(newest, rows, _SEED)
        drafter.eval()
        found = []
        for step in range(stream.batches_per_epoch):
            found.append(objective.loss(step, 0, 1)[1]["accepted_length"])
            self._pulse()
        return sum(found) / len(found)


def write_drafter(
    drafter: DSparkDrafter | Eagle3Drafter, calibration: Calibration | None, directory: Path
) -> None:
    """Write a drafter and its calibration to a directory of their own, whole or not at all."""
    fresh = directory.with_name(f".{directory.name}.part")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    save(drafter, fresh, ATTACHED)
    if calibration is not None:
        calibration.save(fresh / FILE_NAME)
    shutil.rmtree(directory, ignore_errors=True)
    fresh.replace(directory)
