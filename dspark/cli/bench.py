"""`dspark bench`: throughput and per-user speed under load, every schedule in one run."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.progress import Progress
from rich.table import Table

from dspark.cli.bench_options import BUNDLED_MTP, SCHEDULES, bench_parser
from dspark.cli.common import Commands, Screen, check_positive, load_model, without_nan
from dspark.errors import UsageError
from dspark.request import Request, SamplingParams

if TYPE_CHECKING:
    from dspark.engine.model import Model
    from dspark.evaluation.load.closed_loop import LoadRun
    from dspark.evaluation.load.report import LoadRow
    from dspark.evaluation.load.sweep import Contender, ContenderName, Runs, Workload

NO_MTP = "mtp1 is left out: there is no MTP drafter; give one with --mtp."


def add_parser(commands: Commands) -> None:
    """Add `bench`."""
    bench_parser(commands).set_defaults(run=run)


def run(options: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    """Run the command; its JSON object."""
    check_positive(options, "requests", "repeats", "max_new_tokens")
    model = load_model(options, options.draft, screen)
    workload = _workload(options, model)
    ways = _contenders(options, model, screen)
    measured = _cover_costs(ways, max(options.concurrency), screen)
    from dspark.cli.comparison import comparable
    from dspark.evaluation.load.report import load_report, load_rows

    runs = _sweep(options, ways, workload, screen)
    rows = load_rows(runs, compare=comparable(options.temperature, options.verifier))
    report = load_report(rows, options.floors)
    report |= {"costs_measured": measured, "settings": _settings(options)}
    _show(report, screen)
    report["out"] = _write(options, model, rows, report, screen)
    return report


def _workload(options: argparse.Namespace, model: Model) -> Workload:
    from dspark.data.conversations import read_prompts
    from dspark.evaluation.check.check import PROMPTS
    from dspark.evaluation.check.live import render
    from dspark.evaluation.load.sweep import Workload

    params = SamplingParams(
        options.max_new_tokens, temperature=options.temperature, seed=options.seed or 0
    )
    prompts = read_prompts(options.prompts) if options.prompts else PROMPTS
    pool = tuple(
        Request(ids, params.with_seed(params.seed + i))
        for i, ids in enumerate(render(model, prompts))
    )
    return Workload(pool, options.requests)


def _contenders(options: argparse.Namespace, model: Model, screen: Screen) -> list[Contender]:
    """Every way that was asked for; of the default ones, those that are possible."""
    from dspark.evaluation.load.sweep import contenders

    names: tuple[ContenderName, ...] = options.schedule or SCHEDULES
    mtp = _mtp(options, model) if "mtp1" in names else None
    if options.schedule is None and mtp is None:
        screen.log.print(NO_MTP, style="yellow")
        names = tuple(name for name in names if name != "mtp1")
    if options.no_profile:
        names = _without_unmeasured(model, names, options, screen)
    return contenders(model, names, mtp)


def _without_unmeasured(
    model: Model,
    names: tuple[ContenderName, ...],
    options: argparse.Namespace,
    screen: Screen,
) -> tuple[ContenderName, ...]:
    """The contenders that can run without a cost table, where there is none."""
    from dspark.evaluation.load.sweep import has_costs

    weighing = [name for name in names if name in ("prefix", "lagged", "lookahead")]
    if not weighing or has_costs(model, max(options.concurrency)):
        return names
    sentence = (
        f"There is no cost table for {max(options.concurrency)} requests, which "
        f"{', '.join(weighing)} weigh, and --no-profile measures none"
    )
    if options.schedule is not None:
        raise UsageError(f"{sentence}; leave one of the two out.")
    screen.log.print(f"{sentence}: they are left out.", style="yellow", soft_wrap=True)
    return tuple(name for name in names if name not in weighing)


def _mtp(options: argparse.Namespace, model: Model) -> Model | None:
    from dspark.engine.loading import load_draft
    from dspark.evaluation.load.sweep import is_mtp

    if options.mtp is not None:
        return load_draft(model.target, options.mtp, offline=options.offline)
    if is_mtp(model):
        return model
    if options.target == "bundled":
        return load_draft(model.target, BUNDLED_MTP, offline=True)
    return None


def _cover_costs(ways: Sequence[Contender], most: int, screen: Screen) -> bool:
    """Measure the cost table before the sweep where it is missing or too small."""
    weighing = [way for way in ways if way.weighs_costs]
    if not weighing:
        return False
    from dspark.evaluation.load.sweep import cover_costs

    with Progress(console=screen.log, transient=True) as bar:
        task = bar.add_task("measuring what steps cost", total=None)
        measured = cover_costs(
            weighing[0].model,
            most,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    what = "Measured" if measured else "Known already:"
    screen.log.print(f"{what} what steps of up to {most} requests cost on this machine.")
    return measured


def _sweep(
    options: argparse.Namespace, ways: Sequence[Contender], workload: Workload, screen: Screen
) -> Runs:
    from dspark.evaluation.load.sweep import sweep

    with Progress(console=screen.log, transient=True) as bar:
        total = options.repeats * len(options.concurrency) * len(ways)
        task = bar.add_task("runs", total=total)

        def tell(repeat: int, users: int, name: str, done: LoadRun) -> None:
            said = f"{repeat + 1}: {users} users, {name}: {done.tokens_per_s:.1f} tokens/s"
            bar.update(task, advance=1, description=said)

        return sweep(
            ways,
            workload,
            options.concurrency,
            repeats=options.repeats,
            verifier=options.verifier,
            progress=tell,
        )


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    names = ("target", "draft", "mtp", "prompts", "max_new_tokens", "temperature", "verifier")
    return {name: getattr(options, name) for name in names}


def _show(report: Mapping[str, Any], screen: Screen) -> None:
    table = Table("users", "schedule", box=None, pad_edge=False)
    for name in ("tokens/s", "95 %", "per user", "TTFT ms", "accepted", "verified"):
        table.add_column(name, justify="right")
    for row in report["rows"]:
        table.add_row(
            str(row["concurrency"]),
            row["schedule"],
            _number(row["tokens_per_s"]),
            "-" if row["ci95"] is None else "-".join(map(_number, row["ci95"])),
            _number(row["tokens_per_s_per_user"]),
            _number(row["ttft_ms"]),
            f"{row['accepted_length']:.2f}",
            f"{row['verified_per_request']:.2f}",
        )
    screen.out.print(table)
    names = list(dict.fromkeys(row["schedule"] for row in report["rows"]))
    table = Table("per user at least", *names, box=None, pad_edge=False)
    for floor in report["at_floor"]:
        speeds = (floor["tokens_per_s"].get(name) for name in names)
        table.add_row(_number(floor["tokens_per_s_per_user"]), *map(_number, speeds))
    screen.out.print("\nThroughput, tokens/s, at floors of per-user speed:")
    screen.out.print(table)
    gains = [gain for gain in report["over_mtp1"] if gain["gain"] is not None]
    if gains:
        screen.out.print("\nPer-user speed over MTP-1 at the same throughput:")
    for gain in gains:
        screen.out.print(
            f"  {gain['schedule']}, {gain['concurrency']} users: {100 * gain['gain']:+.0f} %"
        )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _write(
    options: argparse.Namespace,
    model: Model,
    rows: Sequence[LoadRow],
    report: Mapping[str, Any],
    screen: Screen,
) -> list[str]:
    """Write what `--out` asks for; the paths."""
    from dspark.evaluation.load.report import MISSING, can_draw, save_figure

    if options.out is None:
        return []
    options.out.mkdir(parents=True, exist_ok=True)
    paths = [options.out / "load.json"]
    text = json.dumps(without_nan(report), indent=1, allow_nan=False)
    paths[0].write_text(text + "\n", encoding="utf-8")
    if can_draw():
        title = f"{options.target} on {model.machine.hardware}, {model.machine.dtype}"
        paths += save_figure(rows, title, options.out)
    else:
        screen.log.print(MISSING, style="yellow", soft_wrap=True, markup=False)
    written = f"\nWritten: {', '.join(map(str, paths))}."
    screen.out.print(written, soft_wrap=True, markup=False)
    return [str(path) for path in paths]
