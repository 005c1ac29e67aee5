"""`dspark bench`: throughput and per-user speed under load, every schedule in one run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from rich.progress import Progress

from dspark.cli.groups import PROMPTS_HELP, Pair, Sampling, Speculation
from dspark.cli.inputs import load_pair
from dspark.cli.options import Command, comma_list, option, pick, picked, positive
from dspark.cli.screen import Screen, cell, interval, table, without_nan
from dspark.errors import UsageError
from dspark.request import Request, SamplingParams, Verifier

if TYPE_CHECKING:
    from dspark.engine.model import Model
    from dspark.evaluation.load.closed_loop import LoadRun
    from dspark.evaluation.load.report import LoadRow
    from dspark.evaluation.load.sweep import Contender, ContenderName, Runs, Workload

EXAMPLE = """\
  dspark bench bundled --threads 1 --out bench
  dspark bench ./target --draft ./drafter --mtp ./mtp --prompts questions.jsonl \\
      --concurrency 1,4,16,64 --floors 20,40 --json"""
SCHEDULES: tuple[ContenderName, ...] = ("off", "fixed", "mtp1", "prefix", "lagged")
ALL_SCHEDULES = (*SCHEDULES, "lookahead")
_SETTINGS = ("target", "draft", "mtp", "prompts", "max_new_tokens", "temperature", "verifier")
BUNDLED_MTP = "bundled-mtp"
NO_MTP = "mtp1 is left out: there is no MTP drafter; give one with --mtp."


def _user(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1 << 16:
        raise ValueError(text)
    return int(text)


def _users(text: str) -> tuple[int, ...]:
    return tuple(sorted(comma_list(_user, "positive integers like 1,2,4")(text)))


def _schedule(name: str) -> str:
    if name not in ALL_SCHEDULES:
        raise ValueError(name)
    return name


@dataclass(frozen=True)
class _Load:
    TITLE: ClassVar = "load"
    ABOUT: ClassVar = (
        "A closed loop: each user sends its next request the moment its answer ends, until the "
        "counted requests, the same for every schedule, are answered; all users are busy all the "
        "time."
    )

    concurrency: tuple[int, ...] = option(
        (1, 2, 4, 8), "numbers of users (default: 1,2,4,8)", read=_users, metavar="C,C"
    )
    schedule: Any = option(
        None,
        f"schedules, of {', '.join(ALL_SCHEDULES)} (default: {','.join(SCHEDULES)})",
        read=comma_list(_schedule, f"names among {', '.join(ALL_SCHEDULES)}"),
        metavar="S,S",
    )
    requests: int = option(
        16,
        "requests counted at each concurrency, at least twice the users (default: {default})",
        metavar="N",
        least=1,
    )
    repeats: int = option(
        3, "repetitions, whose median is reported (default: {default})", metavar="R", least=1
    )
    no_profile: bool = pick(Speculation, "no_profile")
    floors: tuple[float, ...] = option(
        (),
        "per-user tokens/s at which throughput is reported (default: five of the measured range)",
        read=comma_list(positive, "numbers like 20,40"),
        metavar="F,F",
    )


@dataclass(frozen=True)
class _Requests:
    TITLE: ClassVar = "requests"

    prompts: str | None = option(
        None, f"{PROMPTS_HELP}; by default a few built-in questions", metavar="FILE"
    )
    max_new_tokens: int = pick(
        Sampling, "max_new_tokens", 64, help="per request (default: {default})", least=1
    )
    temperature: float = pick(Sampling, "temperature")
    verifier: Verifier = pick(Speculation, "verifier")
    tree_nodes: int | None = pick(Speculation, "tree_nodes")


@dataclass(frozen=True)
class Options(_Load, _Requests, Pair):
    """Options of `bench`."""

    mtp: str | None = option(
        None,
        "the drafter of mtp1, one draft a round (default: the pair's own where it is an MTP "
        f"drafter; {BUNDLED_MTP} for bundled)",
        metavar="DRAFT",
    )
    out: Path | None = option(
        None,
        "write load.json, and a figure as load.png and load.svg, into this directory",
        metavar="DIR",
    )


def run(options: Options, screen: Screen) -> dict[str, Any]:
    """Run the command; its JSON object."""
    model = load_pair(options, screen)
    workload = _workload(options, model)
    ways = _contenders(options, model, screen)
    measured = _cover_costs(ways, max(options.concurrency), screen)
    from dspark.cli.measure.decoding import comparable
    from dspark.evaluation.load.report import load_report, load_rows

    runs = _sweep(options, ways, workload, screen)
    rows = load_rows(runs, compare=comparable(options.temperature, options.verifier))
    report = load_report(rows, options.floors)
    report |= {"costs_measured": measured, "settings": picked(options, *_SETTINGS)}
    _show(report, screen)
    report["out"] = _write(options, model, rows, report, screen)
    return report


def _workload(options: Options, model: Model) -> Workload:
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


def _contenders(options: Options, model: Model, screen: Screen) -> list[Contender]:
    """Every way that was asked for; of the default ones, those that are possible."""
    from dspark.evaluation.load.sweep import contenders

    names = options.schedule or SCHEDULES
    mtp = _mtp(options, model) if "mtp1" in names else None
    if options.schedule is None and mtp is None:
        screen.warn(NO_MTP)
        names = tuple(name for name in names if name != "mtp1")
    if options.no_profile:
        names = _without_unmeasured(model, names, options, screen)
    return contenders(model, names, mtp, options.tree_nodes)


def _without_unmeasured(
    model: Model, names: tuple[ContenderName, ...], options: Options, screen: Screen
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
    screen.warn(f"{sentence}: they are left out.")
    return tuple(name for name in names if name not in weighing)


def _mtp(options: Options, model: Model) -> Model | None:
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

    with screen.progress("measuring what steps cost") as tell:
        measured = cover_costs(weighing[0].model, most, progress=tell)
    what = "Measured" if measured else "Known already:"
    screen.remark(f"{what} what steps of up to {most} requests cost on this machine.")
    return measured


def _sweep(options: Options, ways: Sequence[Contender], workload: Workload, screen: Screen) -> Runs:
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


def _show(report: Mapping[str, Any], screen: Screen) -> None:
    numbers = ("tokens/s", "95 %", "per user", "TTFT ms", "accepted", "verified")
    rows = table("users", "schedule", right=numbers)
    for row in report["rows"]:
        rows.add_row(
            str(row["concurrency"]),
            row["schedule"],
            cell(row["tokens_per_s"]),
            interval(row["ci95"]),
            cell(row["tokens_per_s_per_user"]),
            cell(row["ttft_ms"]),
            f"{row['accepted_length']:.2f}",
            f"{row['verified_per_request']:.2f}",
        )
    screen.out.print(rows)
    names = list(dict.fromkeys(row["schedule"] for row in report["rows"]))
    floors = table("per user at least", *names)
    for floor in report["at_floor"]:
        speeds = (floor["tokens_per_s"].get(name) for name in names)
        floors.add_row(cell(floor["tokens_per_s_per_user"]), *map(cell, speeds))
    screen.out.print("\nThroughput, tokens/s, at floors of per-user speed:")
    screen.out.print(floors)
    gains = [gain for gain in report["over_mtp1"] if gain["gain"] is not None]
    if gains:
        screen.out.print("\nPer-user speed over MTP-1 at the same throughput:")
    for gain in gains:
        screen.out.print(
            f"  {gain['schedule']}, {gain['concurrency']} users: {100 * gain['gain']:+.0f} %"
        )


def _write(
    options: Options,
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
        screen.warn(MISSING)
    screen.say(f"\nWritten: {', '.join(map(str, paths))}.")
    return [str(path) for path in paths]


COMMAND = Command(
    "bench",
    "measure throughput and per-user speed under load, every schedule in turn",
    EXAMPLE,
    Options,
    run,
)
