"""`dspark data prompts --self`: prompts that a model writes itself."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from dspark.cli.common import Screen, check_positive, use_threads
from dspark.errors import UsageError

COUNT, BATCH_SIZE = 1000, 16
_OF_SOURCES = ("heldout", "heldout_share", "against", "ngram", "split", "config", "limit", "strict")


def add_self_options(parser: argparse.ArgumentParser) -> None:
    """Add what `--self` takes."""
    group = parser.add_argument_group("prompts by the model itself, in place of sources")
    group.add_argument(
        "--self",
        dest="writer",
        metavar="MODEL",
        help="a directory, a hub id or bundled, which writes prompts behind the user header of its "
        "own chat template",
    )
    group.add_argument(
        "--count", type=int, metavar="N", help=f"prompts that are wanted (default: {COUNT})"
    )
    group.add_argument(
        "--batch-size", type=int, metavar="R", help=f"requests at once (default: {BATCH_SIZE})"
    )


def check_self_options(options: argparse.Namespace) -> None:
    """Refuse what belongs to the other way to get prompts.

    Raises:
        UsageError: names the option.
    """
    check_positive(options, "count", "batch_size")
    if options.writer is None:
        if not options.sources:
            raise UsageError("There is no SOURCE; name one, or a MODEL with --self.")
        for name in ("count", "batch_size"):
            if getattr(options, name) is not None:
                raise UsageError(f"--{name.replace('_', '-')} acts only together with --self.")
        return
    if options.sources:
        raise UsageError("--self writes prompts and reads none; leave SOURCE or --self out.")
    for name in _OF_SOURCES:
        if getattr(options, name):
            raise UsageError(f"--{name.replace('_', '-')} acts only without --self.")


def run_self(options: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    """Run the command; its JSON object."""
    from dspark.data.answers.regenerate import journal_path
    from dspark.data.prompts.self_prompting import SelfPrompts, write_self_prompts
    from dspark.engine.loading import load

    use_threads(options)
    with screen.log.status(f"Loading {options.writer} ..."):
        model = load(
            options.writer,
            "none",
            device=options.device,
            dtype=options.dtype,
            revision=options.revision,
            offline=options.offline,
        )
    out = Path(options.out)
    writer = SelfPrompts(model, options.seed or 0, options.batch_size or BATCH_SIZE)
    if journal_path(out).exists():
        screen.log.print(Text(f"Going on with {journal_path(out)}."), soft_wrap=True)
    columns = (TextColumn("prompts"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=screen.log) as bar:
        task = bar.add_task("", total=None)
        report = write_self_prompts(
            writer,
            out,
            count=options.count or COUNT,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    for sentence in report.sentences(options.writer):
        screen.out.print(Text(sentence), soft_wrap=True)
    return {
        "records": report.records,
        "failed": 0,
        "bytes": report.bytes,
        "bytes_per_token": None,
        "tries": report.tries,
        "dropped": dict(report.dropped),
        "cut": report.cut,
        "chat_template": report.is_chat,
        "out": str(out),
    }
