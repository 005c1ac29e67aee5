"""Stages of a fit that train its drafter: the target's features, and the training."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rich.console import Console

from dspark.data.samples import SampleStream
from dspark.errors import DataError
from dspark.fitting.answers import Fit, answer_files, max_length, samples_of
from dspark.fitting.measure import write_recipe
from dspark.fitting.recipe import FEWEST_SUPERVISED, recipe_of
from dspark.training.checkpoints import read_position, saved_steps
from dspark.training.drafters.samples import build_features
from dspark.training.progress import Pace
from dspark.training.recipe import DrafterRecipe, load_recipe
from dspark.training.run import run_recipe

FEATURES, TRAINING = "features", "training"
CHECKPOINTS = 10
TOKENS_PER_FORWARD = 1024
"""Of the target for features; few, so that progress shows."""


def write_features(fit: Fit, answers: dict[str, Any]) -> dict[str, Any]:
    """Stage `features`: what the drafter reads of the target, once, if the plan says so."""
    if not fit.plan.cached or not answers["usable"]:
        return {"samples": 0, "bytes": 0}
    recipe = load_recipe(_written_recipe(fit, answers, fit.plan.steps))
    assert isinstance(recipe, DrafterRecipe)
    target = fit.model.target
    report = build_features(recipe, device=str(target.device), target=target, progress=fit.progress)
    return {"samples": report.records, "bytes": report.bytes}


def train(fit: Fit, answers: dict[str, Any]) -> dict[str, Any]:
    """Stage `training`: by a recipe that also works with `dspark train`, while time remains."""
    plan, output = fit.plan, fit.path(TRAINING)
    if not answers["usable"]:
        raise DataError(
            f"No answer of {fit.options.target} has {FEWEST_SUPERVISED} tokens, so there is "
            "nothing to train on; give other prompts."
        )
    rows = _rows(fit, answers)
    seconds = max(fit.left_s() - plan.after_training_s, 0.0)
    steps = max(int(seconds / plan.training_speeds.whole_step_s(rows, plan.anchors)), 1)
    if saved_steps(output):  # a resumed run keeps its last number of steps
        steps = int(read_position(output).fixed["run.steps"])
    result = run_recipe(
        _written_recipe(fit, answers, steps),
        resume=True,
        device=str(fit.model.target.device),
        console=Console(quiet=True),
        target=fit.model.target,
        pace=Pace(seconds, tell=fit.progress),
    )
    stream = SampleStream(samples_of(fit), rows, fit.options.seed)
    most = None if plan.shape.whole_answers else plan.anchors
    return {
        "steps": result.steps,
        "loss": result.loss,
        "anchors": _anchors(stream, result.steps, most),
        "accepted_length_train": result.metrics.get("accepted_length"),
    }


def _rows(fit: Fit, answers: dict[str, Any]) -> int:
    return min(fit.plan.rows, int(answers["usable"]))


def _written_recipe(fit: Fit, answers: dict[str, Any], steps: int) -> str:
    """The recipe's file in the run's folder."""
    features = None
    if fit.plan.cached:  # samples whose features are not finite are in no cache
        path = str(fit.path(FEATURES).resolve())
        features = {
            "source": "hybrid",
            "path": path,
            "add": False,
            "tokens_per_forward": TOKENS_PER_FORWARD,
        }
    recipe = recipe_of(
        fit.model.target,
        replace(fit.plan.shape, draft_vocabulary=answers["draft_vocabulary"]),
        paths=[str(path.resolve()) for path in answer_files(fit)],
        output=fit.path(TRAINING),
        steps=steps,
        rows=_rows(fit, answers),
        anchors=fit.plan.anchors,
        max_length=max_length(fit),
        save_every=max(steps // CHECKPOINTS, 1),
        seed=fit.options.seed,
        features=features,
    )
    return str(write_recipe(recipe, fit.options.folder))


def _anchors(stream: SampleStream, steps: int, most: int | None) -> int:
    """Total number of anchors in the steps, at most so many of a sample."""
    candidates = [
        sum(a and b for a, b in zip(s.loss_mask, s.loss_mask[1:], strict=False))
        for s in stream.samples
    ]
    counted = [count if most is None else min(count, most) for count in candidates]
    return sum(counted[i] for step in range(steps) for i in stream.indices(step))
