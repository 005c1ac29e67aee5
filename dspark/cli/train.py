"""`dspark train`: runs a training recipe."""

from __future__ import annotations

import argparse
from typing import Any

from rich.text import Text

from dspark.cli.common import Commands, Screen, add_common_options, new_parser, use_threads

EXAMPLE = """\
  dspark train bundled_dspark --set run.output_dir=runs/drafter --set run.steps=2000
  dspark train bundled_dspark --set run.output_dir=runs/drafter --set run.steps=2000 --resume"""


def add_parser(commands: Commands) -> None:
    """Add `train`."""
    parser = new_parser(commands, "train", "train a drafter by a recipe", EXAMPLE)
    parser.add_argument(
        "recipe", metavar="RECIPE", help="a YAML file, or the name of one in recipes/"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="KEY=VALUE",
        help="change a key of the recipe, as in run.steps=100; repeatable",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint of output_dir"
    )
    add_common_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    """Run the command; its JSON object."""
    from dspark.training.run import run_recipe

    use_threads(options)
    result = run_recipe(
        options.recipe,
        recipe_overrides(options),
        resume=options.resume,
        device=options.device,
        console=screen.log,
    )
    done = f"Done: step {result.steps}, loss {result.loss:.4f}; the weights are in "
    screen.out.print(Text(f"{done}{result.output_dir}."), soft_wrap=True)
    return {
        "steps": result.steps,
        "loss": result.loss,
        "accepted_length_train": result.metrics.get("accepted_length"),
        "output_dir": str(result.output_dir),
        "tokens_per_s": result.tokens_per_s,
        "peak_memory_bytes": result.peak_memory_bytes,
    }


def recipe_overrides(options: argparse.Namespace) -> list[str]:
    """`--seed` and `--dtype` stand for keys of the recipe, which rules where they are not given."""
    overrides = list(options.overrides)
    if options.seed is not None:
        overrides.append(f"run.seed={options.seed}")
    if options.dtype != "auto":
        overrides.append(f"run.dtype={options.dtype}")
    return overrides
