"""`dspark data prompts`: collects prompts."""

from __future__ import annotations

import argparse
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from dspark.cli.common import (
    Commands,
    Screen,
    add_common_options,
    check_positive,
    new_parser,
)
from dspark.cli.self_prompts import add_self_options, check_self_options, run_self
from dspark.errors import UsageError

if TYPE_CHECKING:
    from dspark.data.prompts.collect import CollectReport

EXAMPLE = """\
  dspark data prompts mlabonne/open-perfectblend --against eval/ --out prompts.jsonl \\
    --heldout heldout.jsonl
  dspark data prompts --self bundled --count 200 --out prompts.jsonl"""


def add_parser(commands: Commands) -> None:
    """Add `data prompts`."""
    parser = new_parser(
        commands,
        "prompts",
        "collect prompts, without duplicates and without those of evaluation sets",
        EXAMPLE,
    )
    parser.add_argument(
        "sources",
        nargs="*",
        metavar="SOURCE",
        help="a JSON-lines file, a folder of them, or a data set: a folder, or its name on the hub",
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="JSON lines, .gz compresses")
    parser.add_argument("--heldout", metavar="FILE", help="where held-out prompts go")
    parser.add_argument(
        "--heldout-share", type=float, metavar="S", help="of the prompts (default: 0.05)"
    )
    parser.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="PATH",
        help="an evaluation set that prompts must not stand in, or a folder of them; repeatable",
    )
    parser.add_argument(
        "--ngram",
        type=int,
        metavar="N",
        help="so many neighbouring words in common with --against are too many (default: 13)",
    )
    parser.add_argument("--split", help="of data sets (default: train)")
    parser.add_argument("--config", metavar="NAME", help="of data sets that have several")
    parser.add_argument("--revision", help="branch, tag or commit of a data set, or of MODEL")
    parser.add_argument(
        "--offline", action="store_true", help="of the hub read what is on this machine only"
    )
    parser.add_argument(
        "--limit",
        type=int,
        metavar="N",
        help="read at most so many lines; of data sets no more is fetched than that needs",
    )
    parser.add_argument("--strict", action="store_true", help="stop at the first malformed line")
    add_self_options(parser)
    add_common_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    """Run the command; its JSON object."""
    _check(options)
    if options.writer is not None:
        return run_self(options, screen)
    from dspark.data.conversations import RECORD_KEYS
    from dspark.data.prompts.collect import Split, collect_prompts
    from dspark.data.prompts.dedup import evaluation_texts
    from dspark.data.prompts.sources import DataSet, read_rows

    share = 0.05 if options.heldout_share is None else options.heldout_share
    rows = chain.from_iterable(
        read_rows(
            DataSet(source, options.config, options.split or "train", options.revision),
            RECORD_KEYS,
            offline=options.offline,
            stream=options.limit is not None,
        )
        for source in options.sources
    )
    out = Path(options.out)
    with screen.log.status("Reading ...") as status:
        report = collect_prompts(
            islice(rows, options.limit),
            out,
            split=Split(Path(options.heldout), share, options.seed or 0)
            if options.heldout
            else None,
            against=evaluation_texts(options.against, options.ngram or 13)
            if options.against
            else None,
            strict=options.strict,
            progress=lambda so_far: status.update(f"{so_far.input:,} lines ..."),
        )
    screen.out.print(Text(_sentence(report, out, options.heldout)), soft_wrap=True)
    return {
        "records": report.records,
        "failed": report.malformed,
        "bytes": report.bytes,
        "bytes_per_token": None,
        "input": report.input,
        "heldout": report.heldout,
        "duplicates": report.duplicates,
        "near_duplicates": report.near_duplicates,
        "contaminated": report.contaminated,
        "malformed": report.malformed,
        "dropped_turns": dict(report.dropped_turns),
        "out": str(out),
    }


def _check(options: argparse.Namespace) -> None:
    check_positive(options, "limit", "ngram")
    check_self_options(options)
    share = options.heldout_share
    if share is not None and not 0 < share < 1:
        raise UsageError(f"--heldout-share is {share}, but must be between 0 and 1.")
    if share is not None and not options.heldout:
        raise UsageError("--heldout-share needs --heldout FILE, where held-out prompts go.")
    if options.ngram is not None and not options.against:
        raise UsageError("--ngram needs --against PATH, the evaluation sets to compare with.")
    if options.heldout and Path(options.heldout) == Path(options.out):
        raise UsageError(f"--heldout and --out are both {options.out}; name two files.")


def _sentence(report: CollectReport, out: Path, heldout: str | None) -> str:
    left_out = [
        f"{count:,} {what}"
        for what, count in (
            ("duplicate", report.duplicates),
            ("nearly duplicate", report.near_duplicates),
            ("contaminated", report.contaminated),
            ("malformed", report.malformed),
        )
        if count
    ]
    kept = f"{report.records:,} prompts in {out}"
    if heldout:
        kept += f", {report.heldout:,} in {heldout}"
    rest = f"; left out: {', '.join(left_out)}" if left_out else ""
    dropped = sum(report.dropped_turns.values())
    turns = f"; {dropped:,} turns of other roles dropped" if dropped else ""
    return f"{report.input:,} lines: {kept}{rest}{turns}."
