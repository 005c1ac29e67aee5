"""How many anchors a training step takes in a second, recipe by recipe, and where its time goes.

Each way is a recipe with overrides; the ways take turns, step by step, in one process. A step is
divided into the target's forward pass, the drafter's, the losses with their gradients (which meet
the vocabulary), and the backward pass with the optimiser's step.

    python -m benchmarks.training_speed RECIPE --way before:samples.num_anchors=32 --way after:
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.common import DTYPES, add_machine_options, emit, environment, say
from dspark.training.drafters import objectives as drafter_training
from dspark.training.drafters.new_drafter import load_frozen_target
from dspark.training.drafters.objectives import DrafterObjective
from dspark.training.drafters.warm_start import start_from
from dspark.training.optim import MasterOptimiser
from dspark.training.recipe import BlockRecipe, load_recipe


@dataclass
class Way:
    """One recipe at work.

    Attributes:
        objective, optimiser: as training has them.
        seconds: of each step, by part.
        anchors: of each step.
    """

    objective: DrafterObjective
    optimiser: MasterOptimiser
    seconds: list[dict[str, float]] = field(default_factory=list)
    anchors: list[int] = field(default_factory=list)

    def step(self, number: int) -> None:
        """Take one step and time its parts."""
        times = {"target": 0.0, "losses": 0.0}
        blocks: list[int] = []
        started = time.perf_counter()
        with (
            _timed(self.objective.samples.source, "features", times, "target"),
            _timed(drafter_training, "block_loss", times, "losses", blocks),
        ):
            loss, _ = self.objective.loss(number, 0, 1)
        forward = time.perf_counter()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimiser.collect()
        self.optimiser.clip(1.0)
        self.optimiser.step(number)
        ended = time.perf_counter()
        times["drafter"] = forward - started - sum(times.values())
        times["backward and optimiser"] = ended - forward
        self.seconds.append(times)
        self.anchors += blocks

    def report(self) -> dict[str, Any]:
        """Medians over the steps, the first one left out."""
        parts = {
            name: statistics.median(step[name] for step in self.seconds[1:])
            for name in self.seconds[0]
        }
        rates = [
            anchors / sum(step.values())
            for anchors, step in zip(self.anchors[1:], self.seconds[1:], strict=True)
        ]
        return {"anchors_per_s": statistics.median(rates), "seconds": parts}


@contextmanager
def _timed(
    owner: Any, name: str, times: dict[str, float], part: str, blocks: list[int] | None = None
) -> Iterator[None]:
    """Add what a function takes to a part; of a loss, note the number of blocks."""
    wrapped = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        found = wrapped(*args, **kwargs)
        times[part] += time.perf_counter() - started
        if blocks is not None:
            blocks.append(args[3].tokens_M.numel())
        return found

    with patch.object(owner, name, call):
        yield


def build(name: str, overrides: Sequence[str], folder: str) -> Way:
    """The objective and optimiser of a recipe."""
    recipe = load_recipe(name, [*overrides, f"run.output_dir={folder}"])
    if not isinstance(recipe, BlockRecipe):
        raise SystemExit(f"{name} trains no block drafter; give a recipe of dspark or dflash.")
    target = load_frozen_target(recipe, "cpu", recipe.run.dtype)
    objective = DrafterObjective(recipe, target)
    if recipe.initial is not None:
        start_from(objective.drafter, recipe.initial)
    named = objective.module.named_parameters()
    return Way(objective, MasterOptimiser(named, recipe.optimiser, 1000))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", help="of a block drafter")
    parser.add_argument(
        "--way", action="append", required=True, help="NAME:key=value;key=value over the recipe"
    )
    parser.add_argument("--steps", type=int, default=4, help="of each way; the first is left out")
    add_machine_options(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ways: dict[str, Way] = {}
    with tempfile.TemporaryDirectory() as folder:
        for text in args.way:
            name, _, rest = text.partition(":")
            overrides = [part for part in rest.split(";") if part]
            if args.dtype:
                overrides.append(f"run.dtype={args.dtype}")
            ways[name] = build(args.recipe, overrides, folder)
        for number in range(args.steps):
            for name, way in ways.items():
                way.step(number)
                say(f"{name}: {way.anchors[-1]} anchors, {way.seconds[-1]}")
    found = {name: way.report() for name, way in ways.items()}
    first = next(iter(found.values()))["anchors_per_s"]
    for report in found.values():
        report["over_first"] = report["anchors_per_s"] / first
    dtype = DTYPES[args.dtype] if args.dtype else torch.float32
    emit("training_speed", environment(dtype), found)


if __name__ == "__main__":
    main()
