"""Blocks of options that several subcommands share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from dspark.engine.schedule import SCHEDULES
from dspark.request import VERIFIERS, Verifier


def add_drafting_options(
    parser: argparse.ArgumentParser, *, verifier: Verifier | None, verifier_help: str
) -> argparse._ArgumentGroup:
    """Add how a drafter is used: block, verifier, schedule; the group, for what else belongs."""
    group = parser.add_argument_group("speculation")
    group.add_argument(
        "--block-size", type=int, metavar="K", help="drafts per round (default: the drafter's)"
    )
    group.add_argument("--verifier", choices=VERIFIERS, default=verifier, help=verifier_help)
    group.add_argument(
        "--schedule",
        choices=SCHEDULES,
        help="which drafts are verified (default: auto, which is lagged where the drafter is "
        "calibrated and costs are known, else every draft while that is faster than none)",
    )
    group.add_argument(
        "--threshold", type=float, metavar="C", help="least confidence for --schedule threshold"
    )
    group.add_argument(
        "--cost", metavar="FILE", help="a cost table in place of the one in the user's cache"
    )
    add_no_profile(group)
    return group


def add_no_profile(group: argparse._ActionsContainer) -> None:
    """Add `--no-profile`."""
    group.add_argument(
        "--no-profile",
        action="store_true",
        help="do not measure at start what steps cost on this machine, where that is not known",
    )


def add_recipe_options(parser: argparse.ArgumentParser, example: str) -> None:
    """Add what names a recipe and changes keys of it, `example` being one such change."""
    parser.add_argument(
        "recipe", metavar="RECIPE", help="a YAML file, or the name of a bundled recipe"
    )
    parser.add_argument(
        "--list", action=_ListRecipes, help="print the names of the bundled recipes and stop"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="KEY=VALUE",
        help=f"change a key of the recipe, as in {example}; repeatable",
    )


class _ListRecipes(argparse.Action):
    """Like --help: prints, stops, and needs no RECIPE beside it."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from dspark.training.recipe import load_recipe, recipe_names

        for name in recipe_names():
            recipe = load_recipe(name)
            if recipe.kind == "drafter":
                what = f"{recipe.algorithm} for {recipe.target}"
            elif recipe.initial is None:
                what = "a target from scratch"
            else:
                what = f"a target that goes on from {recipe.initial}"
            print(f"{name:<24}{what}")
        parser.exit()


def recipe_overrides(options: argparse.Namespace) -> list[str]:
    """`--seed` and `--dtype` stand for keys of the recipe, which rules where they are not given."""
    overrides = list(options.overrides)
    if options.seed is not None:
        overrides.append(f"run.seed={options.seed}")
    if options.dtype != "auto":
        overrides.append(f"run.dtype={options.dtype}")
    return overrides
