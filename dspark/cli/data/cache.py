"""`dspark data cache`: computes the target's features of a recipe's samples, once, to disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from dspark.cli.groups import Recipe
from dspark.cli.inputs import use_threads
from dspark.cli.options import Command, option, pick, picked
from dspark.cli.screen import Screen
from dspark.errors import UsageError

if TYPE_CHECKING:
    from dspark.data.features.build import BuildReport, Estimate

EXAMPLE = """\
  dspark data cache bundled_dspark --out runs/features
  dspark train bundled_dspark --set features.source=cache --set features.path=runs/features"""


@dataclass(frozen=True)
class Options(Recipe):
    """Options of `data cache`."""

    set_keys: tuple[str, ...] = pick(
        Recipe,
        "set_keys",
        help="change a key of the recipe, as in features.max_bytes=2000000000; repeatable",
    )
    out: str | None = option(None, "the cache (default: the recipe's features.path)", metavar="DIR")
    check: bool = option(
        False, "first check every sample in the cache, and compute damaged ones anew"
    )


def run(options: Options, screen: Screen) -> dict[str, Any]:
    """Run the command; its JSON object."""
    from dspark.training.drafters.samples import build_features, mend_features
    from dspark.training.recipe import DrafterRecipe, load_recipe

    use_threads(options)
    overrides = options.overrides
    if options.out is not None:
        recipe = load_recipe(options.recipe, overrides)
        if isinstance(recipe, DrafterRecipe) and recipe.features.source == "online":
            overrides.append("features.source=cache")
        overrides.append(f"features.path={options.out}")
    recipe = load_recipe(options.recipe, overrides)
    if not isinstance(recipe, DrafterRecipe) or recipe.features.path is None:
        raise UsageError(
            f"{options.recipe} names no feature cache; give --out DIR, with a drafter's recipe."
        )
    damaged = mend_features(recipe) if options.check else 0
    if options.check:
        screen.remark(f"{damaged} damaged samples.")
    columns = (TextColumn("tokens"), BarColumn(), TextColumn("{task.percentage:.0f} %"))
    with Progress(*columns, TimeRemainingColumn(), console=screen.log) as bar:
        task = bar.add_task("", total=None)
        report = build_features(
            recipe,
            device=options.device,
            announce=lambda estimate: bar.console.print(
                Text(_announcement(estimate)), soft_wrap=True
            ),
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    screen.say(_summary(report, recipe.features.path))
    return picked(report, "records", "failed", "left_out", "bytes", "tokens") | {
        "damaged": damaged,
        "bytes_per_token": report.bytes / report.tokens if report.tokens else None,
        "out": recipe.features.path,
    }


def _announcement(estimate: Estimate) -> str:
    """What is left to do, told before it is done."""
    limit = estimate.max_bytes
    kept = ""
    if limit is not None and limit < estimate.bytes:
        kept = f"; features.max_bytes leaves room for {_size(limit)} of that"
    return (
        f"{estimate.samples} samples, {estimate.tokens} tokens: about {_size(estimate.bytes)} "
        f"({estimate.bytes_per_token:.0f} bytes a token) and {_duration(estimate.seconds)} "
        f"({estimate.seconds_per_1000_tokens:.2g} s per 1,000 tokens); "
        f"{_size(estimate.free_bytes)} of the disk are free{kept}."
    )


def _summary(report: BuildReport, out: str) -> str:
    others = "".join(
        f"; {count} {what}"
        for what, count in (("failed", report.failed), ("left out", report.left_out))
        if count
    )
    return f"{report.records} samples in {out}, {_size(report.bytes)}{others}."


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


COMMAND = Command(
    "cache", "compute the target's features of a recipe's samples to disk", EXAMPLE, Options, run
)
