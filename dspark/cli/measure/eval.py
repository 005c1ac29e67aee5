"""`dspark eval`: how much of a drafter is accepted, task by task, and a report of it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dspark.cli.groups import PROMPTS_HELP, Batch, Loading, Pair, Prompts, Sampling, Speculation
from dspark.cli.inputs import load_model
from dspark.cli.measure.report import rebuild
from dspark.cli.options import Command, comma_list, number, option, pick
from dspark.cli.screen import Screen, table
from dspark.engine.speculation.schedule import ScheduleName
from dspark.errors import CompatibilityError, DataError, UsageError
from dspark.request import SamplingParams, Verifier

if TYPE_CHECKING:
    from dspark.engine.model import Model
    from dspark.evaluation.records import Record, RunRecords, Settings
    from dspark.evaluation.tasks import Task

EXAMPLE = """\
  dspark eval bundled --prompts questions.jsonl --temperature 0,1 --out evaluation
  dspark eval ./target --draft DSpark=./dspark --draft DFlash=./dflash --tasks gsm8k,mt-bench \\
      --data ./tasks --limit 100 --out evaluation
  dspark eval ./target --draft ./drafter --tasks gsm8k --sweep threshold --out thresholds
  dspark eval --report evaluation"""


def _word(text: str) -> str:
    if not text:
        raise ValueError(text)
    return text


_words = comma_list(_word, "words like a,b")


@dataclass(frozen=True)
class _Tasks:
    TITLE: ClassVar = "prompts"

    tasks: tuple[str, ...] | None = option(
        None,
        "of gsm8k, math500, aime25, mbpp, humaneval, livecodebench, mt-bench, alpaca, "
        "arena-hard-v2 (default: all of them that --data has, or all)",
        read=_words,
        metavar="A,B",
        exclusive="tasks",
    )
    prompts: tuple[Path, ...] = option(
        (),
        f"{PROMPTS_HELP}; with `category`, as SPEED-Bench's, a task per category; repeatable",
        metavar="FILE",
        exclusive="tasks",
    )
    data: Path | None = option(
        None,
        "a folder with gsm8k.jsonl and so on (default: the hub, through the library datasets)",
        metavar="DIR",
    )
    limit: int | None = option(
        None, "prompts per task at most, chosen by the seed", metavar="N", least=1
    )
    turns: int | None = option(
        None,
        "turns of a conversation at most; the paper's figures are for 1 (default: all)",
        metavar="N",
        least=1,
    )
    raw: bool = pick(Prompts, "raw")
    thinking: Literal["on", "off"] = option(
        "off", "the chat template's thinking mode (default: {default})"
    )


@dataclass(frozen=True)
class _Decoding:
    TITLE: ClassVar = "decoding"

    max_new_tokens: int = pick(
        Sampling, "max_new_tokens", help="per turn (default: {default})", least=1
    )
    temperature: tuple[float, ...] | None = option(
        None,
        "one or several, each a run of its own (default: 0)",
        read=comma_list(number, "numbers like 0,1"),
        metavar="T,T",
    )
    top_p: float = pick(Sampling, "top_p")
    top_k: int = pick(Sampling, "top_k")
    verifier: Verifier = pick(Speculation, "verifier")
    schedule: ScheduleName = pick(
        Speculation,
        "schedule",
        "fixed",
        help="fixed (default) measures the drafter itself; prefix, lagged and lookahead depend on "
        "this machine's costs, and a seed does not repeat them",
    )
    threshold: float | None = pick(Speculation, "threshold")
    block_size: int | None = pick(Speculation, "block_size")
    batch_size: int = pick(Batch, "batch_size", 16)


@dataclass(frozen=True)
class _Sweep:
    TITLE: ClassVar = "sweep"

    sweep: Literal["threshold", "block", "verifier", "temperature", "top-p"] | None = option(
        None, "a run for each value of this setting; for a sweep over depth give several --draft"
    )
    values: tuple[str, ...] | None = option(
        None, "values of the sweep (default: its own)", read=_words, metavar="V,V"
    )


@dataclass(frozen=True)
class _Output:
    TITLE: ClassVar = "output"

    out: Path | None = option(
        None,
        "write a record for every finished prompt and the report into this folder; a run that was "
        "interrupted continues there, and the report holds every run of the folder",
        metavar="DIR",
    )
    report: tuple[Path, ...] = option(
        (),
        "decode nothing: write the report of the runs in this folder again (repeatable; as dspark "
        "report)",
        metavar="DIR",
    )


@dataclass(frozen=True)
class Options(_Tasks, _Decoding, _Sweep, _Output, Loading):
    """Options of `eval`."""

    target: str | None = pick(Pair, "target", None, nargs="?")
    draft: tuple[str, ...] = option(
        (),
        "a drafter's directory or hub id, `ngram`, or `none` for plain decoding; repeatable, and "
        "then compared on the same prompts; NAME is for the report (default: the drafter attached "
        "to TARGET)",
        metavar="[NAME=]D",
    )
    draft_top_k: int | None = pick(Pair, "draft_top_k")


def run(options: Options, screen: Screen) -> dict[str, Any]:
    """Run the command; its JSON object."""
    if options.report:
        if options.target is not None:
            raise UsageError("--report decodes nothing; leave TARGET out, or leave --report out.")
        return rebuild(options.report, options.out or options.report[0], screen)
    _check(options)
    tasks, missing = _read_tasks(options)
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

    drafts = _named_drafts(options)
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
    numbers = ("prompts", "skipped", "accepted length", "95 %", "kept first", "tokens/s")
    shown = table("run", "task", right=numbers)
    for label, row in zip(labels, runs, strict=True):
        for name, task in row["tasks"].items():
            shown.add_row(
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
            shown.add_row(label, "macro", "", "", _number(macro["accepted_length"]), ends, "", "")
    screen.out.print(shown)
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


def _check(options: Options) -> None:
    """Refuse what cannot be, or would do nothing.

    Raises:
        UsageError: names the option.
    """
    if options.target is None:
        raise UsageError("Name a TARGET, or the folder of an evaluation with --report DIR.")
    if options.values and not options.sweep:
        raise UsageError("--values belongs to a sweep; give --sweep, or leave --values out.")
    if options.sweep == "temperature" and options.temperature is not None:
        raise UsageError("--sweep temperature has its own temperatures; give them with --values.")
    if options.sweep == "block" and options.block_size is not None:
        raise UsageError("--sweep block has its own block sizes; give them with --values.")
    if options.sweep == "top-p" and options.top_p != 1:
        raise UsageError("--sweep top-p has its own values; give them with --values.")
    if options.sweep == "threshold" and options.schedule != "fixed":
        raise UsageError("--sweep threshold has its own schedule; leave --schedule out.")
    if (options.schedule == "threshold") != (options.threshold is not None):
        raise UsageError("Give --threshold with --schedule threshold, and only with it.")
    temperatures = options.temperature or (0.0,)
    for temperature in temperatures:
        SamplingParams(temperature=temperature, top_p=options.top_p, top_k=options.top_k)
    filtered = options.top_p != 1 or options.top_k != 0
    if filtered and options.sweep != "temperature" and max(temperatures) == 0:
        raise UsageError(
            "--top-p and --top-k do nothing at temperature 0; give a --temperature above 0."
        )
    if options.prompts and options.data is not None:
        raise UsageError("--data is for --tasks; leave it out with --prompts.")


def _named_drafts(options: Options) -> dict[str, str | None]:
    """Name in the report -> what to load; None for the drafter attached to the target.

    Raises:
        UsageError: two drafters have the same name.
    """
    if not options.draft:
        return {"attached": None}
    found: dict[str, str | None] = {}
    for word in options.draft:
        name, equals, draft = word.partition("=")
        if not equals:
            name, draft = Path(word).name or word, word
        if not name or not draft:
            raise UsageError(f"--draft is {word!r}, but must be a drafter, or NAME=DRAFTER.")
        if name in found:
            raise UsageError(f"Two drafters are named {name}; give NAME=DRAFTER with other names.")
        found[name] = draft
    return found


def _read_tasks(options: Options) -> tuple[list[Task], list[str]]:
    """The tasks that the options name, and those of the nine that `--data` lacks.

    Raises:
        DataError: one that was asked for is not there, or holds no prompt.
        UsageError: two tasks have the same name.
    """
    from dspark.evaluation.tasks import BENCHMARKS, load_benchmark, load_file, local_file

    seed, missing = options.seed or 0, list[str]()
    tasks: list[Task] = []
    for path in options.prompts:
        tasks += load_file(path, limit=options.limit, seed=seed)
    if not options.prompts:
        names: Sequence[str] = options.tasks or tuple(BENCHMARKS)
        if options.tasks is None and options.data is not None:
            missing = [name for name in BENCHMARKS if local_file(name, options.data) is None]
            names = [name for name in BENCHMARKS if name not in missing]
            if not names:
                raise DataError(f"{options.data} has none of the nine sets; name another --data.")
        tasks = [
            load_benchmark(
                name, options.data, limit=options.limit, seed=seed, offline=options.offline
            )
            for name in names
        ]
    names = [task.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"There are two tasks named {name}; rename a file or a category.")
    return [task.with_turns(options.turns) for task in tasks], missing


COMMAND = Command(
    "eval",
    "measure how much of a drafter is accepted, task by task, and write a report",
    EXAMPLE,
    Options,
    run,
)
