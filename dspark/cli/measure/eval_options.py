"""Options of `dspark eval`: tasks, decoding, sweep and output, and what of them excludes what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from dspark.cli.groups import PROMPTS_HELP, Batch, Loading, Pair, Prompts, Sampling, Speculation
from dspark.cli.options import comma_list, number, option, pick
from dspark.engine.speculation.schedule import ScheduleName
from dspark.errors import DataError, UsageError
from dspark.request import SamplingParams, Verifier

if TYPE_CHECKING:
    from dspark.evaluation.tasks import Task


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
    tree_nodes: int | None = pick(
        Speculation,
        "tree_nodes",
        help="draft trees of so many nodes at most, and record which of them stay (default: "
        "chains)",
    )
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


def check_options(options: Options) -> None:
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


def named_drafts(options: Options) -> dict[str, str | None]:
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


def read_tasks(options: Options) -> tuple[list[Task], list[str]]:
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
