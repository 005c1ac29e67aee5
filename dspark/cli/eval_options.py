"""What `dspark eval` is told: its options, and what they stand for."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dspark.cli.common import (
    TARGET_HELP,
    Commands,
    add_common_options,
    add_draft_top_k,
    add_loading_options,
    check_positive,
    new_parser,
)
from dspark.engine.schedule import SCHEDULES
from dspark.errors import DataError, UsageError
from dspark.request import VERIFIERS, SamplingParams

if TYPE_CHECKING:
    from dspark.evaluation.tasks import Task

EXAMPLE = """\
  dspark eval bundled --prompts questions.jsonl --temperature 0,1 --out evaluation
  dspark eval ./target --draft DSpark=./dspark --draft DFlash=./dflash --tasks gsm8k,mt-bench \\
      --data ../shared/data/eval --limit 100 --out evaluation
  dspark eval ./target --draft ./drafter --tasks gsm8k --sweep threshold --out thresholds
  dspark eval --report evaluation"""
SWEEPS = ("threshold", "block", "verifier", "temperature", "top-p")


def eval_parser(commands: Commands) -> argparse.ArgumentParser:
    """The parser of `eval`."""
    summary = "measure how much of a drafter is accepted, task by task, and write a report"
    parser = new_parser(commands, "eval", summary, EXAMPLE)
    parser.add_argument("target", metavar="TARGET", nargs="?", help=TARGET_HELP)
    parser.add_argument(
        "--draft",
        metavar="[NAME=]D",
        action="append",
        help="a drafter's directory or hub id, `ngram`, or `none` for plain decoding; repeatable, "
        "and then compared on the same prompts; NAME is for the report (default: the drafter "
        "attached to TARGET)",
    )
    add_draft_top_k(parser)
    _add_task_options(parser)
    _add_decoding_options(parser)
    _add_sweep_options(parser)
    group = parser.add_argument_group("output")
    group.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="write a record for every finished prompt and the report into this folder; a run that "
        "was interrupted goes on there, and the report holds every run of the folder",
    )
    group.add_argument(
        "--report",
        type=Path,
        metavar="DIR",
        action="append",
        help="decode nothing: write the report of the runs in this folder again (repeatable; as "
        "dspark report)",
    )
    add_loading_options(parser)
    add_common_options(parser)
    return parser


def _add_task_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("prompts")
    source = group.add_mutually_exclusive_group()
    source.add_argument(
        "--tasks",
        type=_words,
        metavar="A,B",
        help="of gsm8k, math500, aime25, mbpp, humaneval, livecodebench, mt-bench, alpaca, "
        "arena-hard-v2 (default: all of them that --data has, or all)",
    )
    source.add_argument(
        "--prompts",
        type=Path,
        action="append",
        metavar="FILE",
        help="JSON lines with `turns`, `messages` or `prompt`; with `category`, as SPEED-Bench's, "
        "a task per category; repeatable",
    )
    group.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="a folder with gsm8k.jsonl and so on (default: the hub, through the library datasets)",
    )
    group.add_argument(
        "--limit", type=int, metavar="N", help="prompts per task at most, chosen by the seed"
    )
    group.add_argument(
        "--turns",
        type=int,
        metavar="N",
        help="turns of a conversation at most; 1 is what the paper's figures are of (default: all)",
    )
    group.add_argument(
        "--raw", action="store_true", help="take texts as they are, without the chat template"
    )
    group.add_argument(
        "--thinking",
        choices=("on", "off"),
        default="off",
        help="the chat template's thinking mode (default: off)",
    )


def _add_decoding_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("decoding")
    group.add_argument(
        "--max-new-tokens", type=int, default=256, metavar="N", help="per turn (default: 256)"
    )
    group.add_argument(
        "--temperature",
        type=_temperatures,
        metavar="T,T",
        help="one or several, each a run of its own (default: 0)",
    )
    group.add_argument("--top-p", type=float, default=1.0, metavar="P", help="default: 1")
    group.add_argument("--top-k", type=int, default=0, metavar="K", help="default: 0, all")
    group.add_argument(
        "--verifier", choices=VERIFIERS, default="block", help="default: %(default)s"
    )
    group.add_argument(
        "--schedule",
        choices=SCHEDULES,
        default="fixed",
        help="fixed (default) measures the drafter itself; prefix, lagged and lookahead depend on "
        "this machine's costs, and a seed does not repeat them",
    )
    group.add_argument("--threshold", type=float, metavar="C", help="of the schedule threshold")
    group.add_argument(
        "--block-size", type=int, metavar="K", help="drafts per round (default: the drafter's)"
    )
    group.add_argument(
        "--batch-size", type=int, default=16, metavar="R", help="requests at once (default: 16)"
    )


def _add_sweep_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sweep")
    group.add_argument(
        "--sweep",
        choices=SWEEPS,
        help="a run for each value of this setting; for a sweep over depth give several --draft",
    )
    group.add_argument(
        "--values", type=_words, metavar="V,V", help="of the sweep, in place of its own"
    )


def check_options(options: argparse.Namespace) -> None:
    """Refuse what cannot be, or would do nothing.

    Raises:
        UsageError: names the option.
    """
    if options.target is None:
        raise UsageError("Name a TARGET, or the folder of an evaluation with --report DIR.")
    check_positive(options, "limit", "turns", "max_new_tokens", "batch_size")
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
    if options.prompts is not None and options.data is not None:
        raise UsageError("--data is for --tasks; leave it out with --prompts.")


def named_drafts(options: argparse.Namespace) -> dict[str, str | None]:
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


def read_tasks(options: argparse.Namespace) -> tuple[list[Task], list[str]]:
    """The tasks that the options name, and those of the nine that `--data` lacks.

    Raises:
        DataError: one that was asked for is not there, or holds no prompt.
        UsageError: two tasks have the same name.
    """
    from dspark.evaluation.tasks import BENCHMARKS, load_benchmark, load_file, local_file

    seed, missing = options.seed or 0, list[str]()
    tasks: list[Task] = []
    for path in options.prompts or ():
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


def _words(text: str) -> tuple[str, ...]:
    """Parse words between commas, each once."""
    words = tuple(dict.fromkeys(word.strip() for word in text.split(",")))
    if not all(words):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of words like a,b")
    return words


def _temperatures(text: str) -> tuple[float, ...]:
    """Parse temperatures, each once."""
    try:
        numbers = tuple(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers like 0,1") from error
    if not all(math.isfinite(number) and number >= 0 for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} holds a temperature that is not 0 or above")
    return numbers
