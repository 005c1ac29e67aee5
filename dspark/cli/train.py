"""`dspark train`: runs a training recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dspark.cli.groups import Recipe
from dspark.cli.inputs import use_threads
from dspark.cli.options import Command, option
from dspark.cli.screen import Screen

if TYPE_CHECKING:
    from dspark.training.budget import Budget
    from dspark.training.run import Judge

EXAMPLE = """\
  dspark train bundled_dspark --set run.output_dir=runs/drafter --set run.steps=2000
  dspark train bundled_dspark --set run.output_dir=runs/drafter --set run.steps=2000 --resume
  torchrun --nproc-per-node 8 -m dspark train dspark_qwen3_8b --set samples.root=answers"""


@dataclass(frozen=True)
class Options(Recipe):
    """Options of `train`."""

    resume: bool = option(False, "continue from the last checkpoint of output_dir")
    dry_run: bool = option(False, "say what the run will cost in time, memory and disk, and stop")


def run(options: Options, screen: Screen) -> dict[str, Any]:
    """Run the command; its JSON object."""
    from dspark.training.run import plan_recipe, run_recipe

    use_threads(options)
    overrides, judge = options.overrides, _judge()
    if options.dry_run:
        budget = plan_recipe(
            options.recipe, overrides, device=options.device, console=screen.log, judge=judge
        )
        return _planned(budget)
    result = run_recipe(
        options.recipe,
        overrides,
        resume=options.resume,
        device=options.device,
        console=screen.log,
        judge=judge,
    )
    done = f"Done: step {result.steps}, loss {result.loss:.4f}; the weights are in "
    screen.say(f"{done}{result.output_dir}.")
    return {
        "steps": result.steps,
        "loss": result.loss,
        "accepted_length_train": result.metrics.get("accepted_length"),
        "accepted_length_real": result.metrics.get("real_accepted_length"),
        "output_dir": str(result.output_dir),
        "tokens_per_s": result.tokens_per_s,
        "peak_memory_bytes": result.peak_memory_bytes,
    }


def _planned(budget: Budget) -> dict[str, Any]:
    """The JSON object of a run that did not start."""
    speed = None
    if budget.seconds_per_step is not None:
        speed = budget.tokens_per_step / budget.seconds_per_step
    return {
        "steps": 0,
        "loss": None,
        "accepted_length_train": None,
        "accepted_length_real": None,
        "output_dir": None,
        "tokens_per_s": speed,
        "peak_memory_bytes": budget.memory_bytes.get("measured"),
        "budget": budget.as_dict(),
    }


def _judge() -> Judge:
    """How the engine measures a drafter in training: training does not know of evaluation."""
    from dspark.engine.model import Model
    from dspark.evaluation.check.live import accepted, render
    from dspark.training.run import Judge

    return Judge(
        decode=lambda target, drafter, requests: accepted(Model(target), drafter, requests),
        encode=lambda target, prompts: render(Model(target), prompts),
    )


COMMAND = Command("train", "train a drafter by a recipe", EXAMPLE, Options, run)
