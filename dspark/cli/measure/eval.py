"""`dspark eval`: how much of a drafter is accepted, task by task, and `dspark report` of it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dspark.cli.inputs import load_model
from dspark.cli.options import Command, option, picked
from dspark.cli.screen import Screen, interval, table
from dspark.errors import CompatibilityError, UsageError
from dspark.evaluation.report.document import gain, number

if TYPE_CHECKING:
    from dspark.engine.model import Model
    from dspark.evaluation.records import Record, RunRecords, Settings
    from dspark.evaluation.tasks import Task

from dspark.cli.groups import Json
from dspark.cli.measure.eval_options import Options, check_options, named_drafts, read_tasks

EXAMPLE = """\
  dspark eval bundled --prompts questions.jsonl --temperature 0,1 --out evaluation
  dspark eval ./target --draft DSpark=./dspark --draft DFlash=./dflash --tasks gsm8k,mt-bench \\
      --data ./tasks --limit 100 --out evaluation
  dspark eval ./target --draft ./drafter --tasks gsm8k --sweep threshold --out thresholds
  dspark eval --report evaluation"""
REPORT_EXAMPLE = """\
  dspark report evaluation
  dspark report today yesterday --out both"""


_PLAIN = {"schedule": "off", "threshold": None, "block_size": None, "tree_nodes": None}


@dataclass(frozen=True)
class ReportOptions(Json):
    """Options of `report`."""

    directories: tuple[Path, ...] = option(
        (), "a folder that dspark eval --out wrote", positional=True, nargs="+", metavar="DIR"
    )
    out: Path | None = option(None, "where to write it (default: the first DIR)", metavar="DIR")


def run(options: Options, screen: Screen) -> dict[str, Any]:
    """Run the command; its JSON object."""
    if options.report:
        if options.target is not None:
            raise UsageError("--report decodes nothing; leave TARGET out, or leave --report out.")
        return rebuild(options.report, options.out or options.report[0], screen)
    check_options(options)
    tasks, missing = read_tasks(options)
    if missing:
        screen.warn(f"Not in {options.data}, and left out: {', '.join(missing)}.")
    runs = _evaluate(options, tasks, screen)
    if options.out is not None:
        report = rebuild([options.out], options.out, screen)
    else:
        from dspark.evaluation.report.results import report_of

        report = report_of(runs) | {"out": []}
    by_settings = {json.dumps(row["settings"]): row for row in report["runs"]}
    mine = [by_settings[json.dumps(asdict(each.settings))] for each in runs]
    _show(mine, report["comparisons"], screen)
    return {"tasks": mine[0]["tasks"], "macro": mine[0]["macro"], **report}


def _evaluate(options: Options, tasks: Sequence[Task], screen: Screen) -> list[RunRecords]:
    """Every drafter at every setting."""
    from dspark.engine.loading import load_draft

    drafts = named_drafts(options)
    (first_name, first_draft), *others = drafts.items()
    assert options.target is not None  # checked above
    top_k = options.draft_top_k
    model = load_model(options.target, first_draft, options, screen, draft_top_k=top_k)
    runs: list[RunRecords] = []
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=screen.log,
        transient=True,
    ) as bar:
        runs += _runs(options, model, (first_name, first_draft), tasks, bar)
        for name, draft in others:
            assert draft is not None
            model = load_draft(model.target, draft, offline=options.offline, draft_top_k=top_k)
            runs += _runs(options, model, (name, draft), tasks, bar)
    return runs


def _runs(
    options: Options,
    model: Model,
    named: tuple[str, str | None],
    tasks: Sequence[Task],
    bar: Progress,
) -> list[RunRecords]:
    """One drafter at every setting."""
    from dspark.evaluation.evaluate import evaluate

    name, draft = named
    if model.drafter is None and draft != "none":
        raise CompatibilityError(
            f"{options.target} has no drafter attached; give one with --draft, or --draft none to "
            "measure plain decoding."
        )
    command = shlex.join(["dspark", *options.words])
    found = []
    for settings in _settings(options, model, name, draft):
        label = f"{name}, {_varied(settings, options.sweep)}"
        shown = bar.add_task(label, total=sum(len(task.questions) for task in tasks))

        def tell(task: Task, _record: Record, shown: Any = shown, label: str = label) -> None:
            bar.update(shown, advance=1, description=f"{label}, {task.name}")

        found.append(evaluate(model, settings, tasks, options.out, command, tell))
        bar.remove_task(shown)
    return found


def _settings(options: Options, model: Model, name: str, draft: str | None) -> list[Settings]:
    """The settings of all runs of a drafter."""
    from dspark.evaluation.evaluate import settings_of
    from dspark.evaluation.sweeps import sweep_values, varied

    plain = model.drafter is None
    base = settings_of(
        model,
        str(options.target),
        name,
        draft or "attached",
        seed=options.seed or 0,
        thinking=options.thinking == "on",
        **picked(options, "top_p", "top_k", "max_new_tokens", "verifier", "batch_size"),
        **picked(options, "raw", "turns"),
        **(_PLAIN if plain else picked(options, *_PLAIN)),
    )
    bases = [replace(base, temperature=t) for t in options.temperature or (0.0,)]
    about_drafts = options.sweep in ("threshold", "block", "verifier")
    if options.sweep is None or (plain and about_drafts):
        return bases
    values = sweep_values(options.sweep, options.values or ())
    own = model.drafter.block_size if model.drafter is not None else 0
    return [each for base in bases for each in varied(base, options.sweep, values, own)]


def _varied(settings: Settings, sweep: str | None) -> str:
    """What tells a run from its neighbours."""
    from dspark.evaluation.sweeps import SWEEPS

    said = f"temperature {settings.temperature:g}"
    if sweep is None or sweep == "temperature":
        return said
    return f"{said}, {SWEEPS[sweep].label} {getattr(settings, SWEEPS[sweep].field)}"


def _show(
    runs: Sequence[Mapping[str, Any]], comparisons: Sequence[Mapping[str, Any]], screen: Screen
) -> None:
    """Accepted lengths on the screen."""
    from dspark.evaluation.sweeps import run_labels

    labels = run_labels(runs)
    numbers = ("prompts", "skipped", "accepted length", "95 %", "kept first", "tokens/s")
    shown = table("run", "task", right=numbers)
    for label, row in zip(labels, runs, strict=True):
        for name, task in row["tasks"].items():
            shown.add_row(
                label,
                name,
                str(task["prompts"]),
                str(task["skipped"]),
                number(task["accepted_length"]),
                interval(task["ci95"], ".2f"),
                number(next(iter(task["conditional_acceptance"]), None)),
                number(task["timings"]["tokens_per_s"]),
            )
        macro = row["macro"]
        if len(row["tasks"]) > 1:
            ends = interval(macro["ci95"], ".2f")
            shown.add_row(label, "macro", "", "", number(macro["accepted_length"]), ends, "", "")
    screen.out.print(shown)
    for pair in comparisons:
        if pair["macro"] is not None:
            screen.out.print(
                f"{pair['a']} over {pair['b']}, temperature {pair['setting']['temperature']:g}: "
                f"{gain(pair['macro'])}",
                markup=False,
            )


def run_report(options: ReportOptions, screen: Screen) -> dict[str, Any]:
    """Run the command; its JSON object."""
    return rebuild(options.directories, options.out or options.directories[0], screen)


def rebuild(directories: Sequence[Path], out: Path, screen: Screen) -> dict[str, Any]:
    """Write the report of all runs of some folders.

    Raises:
        DataError: a folder has no run, or a file is damaged.
    """
    from dspark.evaluation.records import load_runs
    from dspark.evaluation.report.results import report_of
    from dspark.evaluation.report.write import write_report

    report = report_of(load_runs(directories))
    written = write_report(report, out, screen.warn)
    screen.say(f"Written to {out / 'report.html'}.")
    return report | {"out": [str(path) for path in written]}


COMMAND = Command(
    "eval",
    "measure how much of a drafter is accepted, task by task, and write a report",
    EXAMPLE,
    Options,
    run,
)
REPORT = Command(
    "report",
    "write the report of evaluations from their records, side by side",
    REPORT_EXAMPLE,
    ReportOptions,
    run_report,
)
