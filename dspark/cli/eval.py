"""`dspark eval`: how much of a drafter is accepted, task by task, and a report of it."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from dspark.cli.common import Commands, Screen, load_model
from dspark.cli.eval_options import check_options, eval_parser, named_drafts, read_tasks
from dspark.cli.report import rebuild, warn
from dspark.errors import CompatibilityError, UsageError

if TYPE_CHECKING:
    from dspark.engine.model import Model
    from dspark.evaluation.records import Record, RunRecords, Settings
    from dspark.evaluation.tasks import Task


def add_parser(commands: Commands) -> None:
    """Add `eval`."""
    eval_parser(commands).set_defaults(run=run)


def run(options: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    """Run the command; its JSON object."""
    if options.report is not None:
        if options.target is not None:
            raise UsageError("--report decodes nothing; leave TARGET out, or leave --report out.")
        return rebuild(options.report, options.out or options.report[0], screen)
    check_options(options)
    tasks, missing = read_tasks(options)
    if missing:
        warn(screen, f"Not in {options.data}, and left out: {', '.join(missing)}.")
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


def _evaluate(
    options: argparse.Namespace, tasks: Sequence[Task], screen: Screen
) -> list[RunRecords]:
    """Every drafter at every setting."""
    from dspark.engine.loading import load_draft

    drafts = named_drafts(options)
    (first_name, first_draft), *others = drafts.items()
    model = load_model(options, first_draft, screen)
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
            model = load_draft(
                model.target, draft, offline=options.offline, draft_top_k=options.draft_top_k
            )
            runs += _runs(options, model, (name, draft), tasks, bar)
    return runs


def _runs(
    options: argparse.Namespace,
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


def _settings(
    options: argparse.Namespace, model: Model, name: str, draft: str | None
) -> list[Settings]:
    """The settings of all runs of a drafter."""
    from dspark.evaluation.evaluate import settings_of
    from dspark.evaluation.sweeps import sweep_values, varied

    plain = model.drafter is None
    base = settings_of(
        model,
        options.target,
        name,
        draft or "attached",
        top_p=options.top_p,
        top_k=options.top_k,
        max_new_tokens=options.max_new_tokens,
        seed=options.seed or 0,
        verifier=options.verifier,
        schedule="off" if plain else options.schedule,
        threshold=None if plain else options.threshold,
        block_size=None if plain else options.block_size,
        batch_size=options.batch_size,
        thinking=options.thinking == "on",
        raw=options.raw,
        turns=options.turns,
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
    from dspark.evaluation.report.selection import run_labels

    labels = run_labels(runs)
    table = Table("run", "task", box=None, pad_edge=False)
    for name in ("prompts", "skipped", "accepted length", "95 %", "kept first", "tokens/s"):
        table.add_column(name, justify="right")
    for label, row in zip(labels, runs, strict=True):
        for name, task in row["tasks"].items():
            table.add_row(
                label,
                name,
                str(task["prompts"]),
                str(task["skipped"]),
                _number(task["accepted_length"]),
                "-" if task["ci95"] is None else "-".join(map(_number, task["ci95"])),
                _number(next(iter(task["conditional_acceptance"]), None)),
                _number(task["timings"]["tokens_per_s"]),
            )
        macro = row["macro"]
        if len(row["tasks"]) > 1:
            ends = "-" if macro["ci95"] is None else "-".join(map(_number, macro["ci95"]))
            table.add_row(label, "macro", "", "", _number(macro["accepted_length"]), ends, "", "")
    screen.out.print(table)
    for pair in comparisons:
        macro = pair["macro"]
        if macro is not None:
            ends = "" if macro["ci95"] is None else f" ({_gain(macro['ci95'])})"
            screen.out.print(
                f"{pair['a']} over {pair['b']}, temperature {pair['setting']['temperature']:g}: "
                f"{100 * (macro['ratio'] - 1):+.1f} %{ends}",
                markup=False,
            )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def _gain(ends: Sequence[float]) -> str:
    return " to ".join(f"{100 * (end - 1):+.1f}" for end in ends)
