"""`dspark fit`: from a model to a served drafter, in one command."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from dspark.cli.groups import Loading, Pair
from dspark.cli.inputs import load_model
from dspark.cli.options import Command, option, pick
from dspark.cli.screen import Screen, cell, interval, table
from dspark.errors import UsageError
from dspark.fitting.progress import duration, parse_budget

if TYPE_CHECKING:
    from dspark.fitting.plan import Plan

EXAMPLE = """\
  dspark fit ./model --budget 30m
  dspark fit ./model --prompts questions.jsonl --budget 8h --out runs/fit
  dspark fit ./model --budget 8h --dry-run"""


@dataclass(frozen=True)
class Options(Loading):
    """Options of `fit`."""

    target: str = pick(
        Pair,
        "target",
        help="a directory, a hub id, or bundled: the model that gets a drafter",
        metavar="MODEL",
    )
    prompts: tuple[str, ...] = option(
        (),
        "a JSON-lines file, a folder of them, or a data set; repeatable (default: the model writes "
        "its prompts itself)",
        metavar="F",
    )
    budget: str = option("30m", "total time, as 30m or 8h (default: {default})", metavar="T")
    out: Path | None = option(
        None,
        "folder of the run, where the drafter then stays; the same command continues there "
        "(default: fit-NAME, and the drafter is attached to a MODEL that is a directory without "
        "one)",
        metavar="DIR",
    )
    dry_run: bool = option(
        False, "say what would be done, with its times, memory and disk, and stop"
    )


def run(options: Options, screen: Screen) -> dict[str, Any]:
    """Run the command; its JSON object."""
    started = time.perf_counter()
    from dspark.fitting.answers import FitOptions
    from dspark.fitting.run import dry_run, fit

    if options.dtype == "float16":
        raise UsageError("--dtype is float16, in which nothing is trained; give bfloat16.")
    wish = FitOptions(
        options.target,
        parse_budget(options.budget),
        options.prompts,
        options.out,
        options.seed or 0,
        options.offline,
        time.perf_counter() - started,
    )

    def load() -> Any:
        return load_model(options.target, "none", options, screen)

    if options.dry_run:
        plan = dry_run(wish, load, screen.remark)
        _show_plan(plan, wish.folder, screen)
        return _planned(plan)
    with _Display(screen, wish.budget_s) as display:
        result = fit(wish, load, display)
    _show(result, screen)
    return result


class _Display:
    """One display over all stages: the running one, and the time that is left of the budget."""

    def __init__(self, screen: Screen, budget_s: float) -> None:
        self.say = screen.remark
        self._budget_s = budget_s
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[note]}"),
            console=screen.log,
        )
        self._whole = self._bar.add_task("all", total=budget_s, note="")
        self._task: TaskID | None = None

    def __enter__(self) -> _Display:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def begin(self, stage: str, planned_s: float | None) -> None:
        """Show a stage's bar."""
        note = "" if planned_s is None else f"planned: {duration(planned_s)}"
        self._task = self._bar.add_task(stage, total=1.0, note=note)

    def advance(self, done: float, total: float, left_s: float) -> None:
        """Move the bars on."""
        if self._task is not None:
            self._bar.update(self._task, completed=done, total=max(total, 1e-9))
        left = f"{duration(left_s)} left"
        self._bar.update(self._whole, completed=self._budget_s - left_s, note=left)

    def end(self, stage: str, seconds: float, *, skipped: bool) -> None:
        """Leave a line in the place of the bar."""
        if self._task is not None:
            self._bar.remove_task(self._task)
            self._task = None
        done = "done before" if skipped else duration(seconds)
        self._bar.console.print(Text(f"{stage:<12}{done}"))


def _planned(plan: Plan) -> dict[str, Any]:
    """The JSON object of a run that did not start."""
    return {
        "stages": [
            {"name": name, "seconds": seconds, "skipped": True}
            for name, seconds in plan.seconds.items()
        ],
        "prompts": plan.prompts,
        "answers": plan.answers,
        "anchors": plan.steps * plan.rows * plan.anchors,
        "accepted_length": {"t0": None, "t1": None},
        "speedup": {"t0": None, "t1": None},
        "ece": None,
        "output_dir": None,
        "plan": asdict(plan),
    }


def _show_plan(plan: Plan, folder: Path, screen: Screen) -> None:
    from dspark.fitting.plan import plan_rows

    shown = table("stage", "what")
    shown.add_column("time", justify="right", no_wrap=True)
    for name, what, took in plan_rows(plan):
        shown.add_row(name, escape(what), took)
    screen.out.print(shown)
    screen.say(
        f"In all {duration(plan.budget_s)}, {plan.memory_bytes / 1e9:.2g} GB of memory and "
        f"{plan.disk_bytes / 1e9:.2g} GB of disk in {folder}. Nothing was started."
    )


def _show(result: Mapping[str, Any], screen: Screen) -> None:
    numbers = ("accepted length", "95 %", "speed-up", "95 %")
    shown = table("domain", "temperature", right=numbers)
    for domain, rows in result["domains"].items():
        for key, temperature in (("t0", "0"), ("t1", "1")):
            row = rows[key]
            shown.add_row(
                escape(domain),
                temperature,
                cell(row["accepted_length"], ".2f"),
                interval(row["accepted_length_ci95"], ".2f"),
                cell(row["speedup"], ".2f"),
                interval(row["speedup_ci95"], ".2f"),
            )
    screen.out.print(shown)
    if result["ece"] is not None:
        screen.say(f"Calibration error on held-out prompts: {100 * result['ece']:.1f} %.")
    for limit in result["limits"].values():
        screen.say(limit["sentence"])
    place = result["attached"] or f"{result['output_dir']}/dspark"
    screen.say(f"The drafter is in {place}. To serve it:")
    for engine, command in result["commands"].items():
        screen.say(f"  {engine:<11}{command}")


COMMAND = Command(
    "fit",
    "make a drafter for a model: prompts, answers, training, calibration, evaluation",
    EXAMPLE,
    Options,
    run,
)
