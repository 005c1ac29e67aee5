"""`dspark data`: prepares what a drafter is trained on."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from dspark.cli.common import (
    Commands,
    Screen,
    add_common_options,
    add_loading_options,
    load_model,
    new_parser,
)
from dspark.data.formats import FORMATS
from dspark.errors import UsageError
from dspark.request import SamplingParams

EXAMPLE = """\
  dspark data corpus gsm8k --path gsm8k_train.jsonl.gz --out questions.jsonl.gz
  dspark data regenerate bundled --prompts questions.jsonl.gz --out answers.jsonl.gz"""


def add_parser(commands: Commands) -> None:
    """Add `data` and its own subcommands."""
    parser = new_parser(commands, "data", "prepare what a drafter is trained on", EXAMPLE)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_corpus(commands)
    _add_regenerate(commands)


def _add_corpus(commands: Commands) -> None:
    parser = new_parser(
        commands, "corpus", "turn a corpus file into conversations, in a seeded order", EXAMPLE
    )
    parser.add_argument("format", choices=FORMATS, help="how its records become conversations")
    parser.add_argument("--path", metavar="FILE", help="JSON lines (python_stdlib takes none)")
    parser.add_argument("--out", required=True, metavar="FILE", help="JSON lines, .gz compresses")
    parser.add_argument("--limit", type=int, metavar="N", help="write at most so many")
    _add_drop_containing(parser, "conversations")
    add_common_options(parser)
    parser.set_defaults(run=run_corpus)


def run_corpus(options: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    """Run `data corpus`; its JSON object."""
    from dspark.data.corpus import write_source

    out = Path(options.out)
    path = Path(options.path) if options.path else None
    if options.limit is not None and options.limit < 1:
        raise UsageError(f"--limit is {options.limit}, but must be at least 1.")
    records = write_source(
        options.format,
        path,
        out,
        seed=options.seed or 0,
        without=tuple(options.drop_containing),
        limit=options.limit,
    )
    screen.out.print(Text(f"{records} conversations in {out}."), soft_wrap=True)
    return {"records": records, "failed": 0, "bytes": out.stat().st_size, "out": str(out)}


def _add_drop_containing(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--drop-containing",
        action="append",
        default=[],
        metavar="TEXT",
        help=f"drop {what} that contain TEXT; repeatable",
    )


def _add_regenerate(commands: Commands) -> None:
    parser = new_parser(
        commands, "regenerate", "answer the prompts of a file with the target itself", EXAMPLE
    )
    parser.add_argument("target", metavar="TARGET", help="a directory, a hub id, or bundled")
    parser.add_argument(
        "--prompts",
        required=True,
        metavar="FILE",
        help="JSON lines with `messages`, `turns` or `prompt`",
    )
    parser.add_argument(
        "--out", metavar="FILE", help="JSON lines, .gz compresses (default: regenerated.jsonl)"
    )
    parser.add_argument(
        "--draft", metavar="D", help="a drafter, which makes it faster (default: the attached one)"
    )
    parser.add_argument(
        "--temperature", type=float, default=1.0, metavar="T", help="default: %(default)s"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=256, metavar="N", help="per answer (default: 256)"
    )
    parser.add_argument(
        "--batch-size", type=int, default=16, metavar="R", help="requests at once (default: 16)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="read at most so many lines")
    parser.add_argument(
        "--only-finished", action="store_true", help="drop answers cut at --max-new-tokens"
    )
    for unit in ("tokens", "words"):
        parser.add_argument(
            f"--drop-repeated-{unit}",
            type=int,
            default=0,
            metavar="N",
            help=f"drop answers in which N neighbouring {unit} stand twice",
        )
    _add_drop_containing(parser, "answers")
    add_loading_options(parser)
    add_common_options(parser)
    parser.set_defaults(run=run_regenerate)


def run_regenerate(options: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    """Run `data regenerate`; its JSON object."""
    params = SamplingParams(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        seed=options.seed or 0,
    )
    for name, count, least in (
        ("--batch-size", options.batch_size, 1),
        ("--limit", options.limit, 1),
        ("--drop-repeated-tokens", options.drop_repeated_tokens, 0),
        ("--drop-repeated-words", options.drop_repeated_words, 0),
    ):
        if count is not None and count < least:
            raise UsageError(f"{name} is {count}, but must be at least {least}.")
    from dspark.data.regenerate import Wanted, regenerate

    wanted = Wanted(
        finished=options.only_finished,
        token_gram=options.drop_repeated_tokens,
        word_gram=options.drop_repeated_words,
        without=tuple(options.drop_containing),
    )
    out = Path(options.out or "regenerated.jsonl")
    model = load_model(options, options.draft, screen)

    columns = (TextColumn("answers"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=screen.log) as bar:
        task = bar.add_task("", total=None)
        report = regenerate(
            model,
            options.prompts,
            out,
            params=params,
            wanted=wanted,
            batch_size=options.batch_size,
            limit=options.limit,
            progress=lambda done, known: bar.update(task, completed=done, total=known),
        )
    others = "".join(
        f"; {count} {what}"
        for what, count in (("failed", report.failed), ("dropped", report.dropped))
        if count
    )
    screen.out.print(Text(f"{report.records} records in {out}{others}."), soft_wrap=True)
    return {
        "records": report.records,
        "failed": report.failed,
        "dropped": report.dropped,
        "bytes": report.bytes,
        "bytes_per_token": report.bytes / report.tokens if report.tokens else None,
        "out": str(out),
    }
