"""`dspark data corpus`: a corpus file as conversations."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.text import Text

from dspark.cli.common import (
    Commands,
    Screen,
    add_common_options,
    check_positive,
    new_parser,
)
from dspark.data.corpus import FORMATS

EXAMPLE = """\
  dspark data corpus gsm8k --path gsm8k_train.jsonl.gz --out questions.jsonl.gz"""


def add_parser(commands: Commands) -> None:
    """Add `data corpus`."""
    parser = new_parser(
        commands, "corpus", "turn a corpus file into conversations, in a seeded order", EXAMPLE
    )
    parser.add_argument("format", choices=FORMATS, help="how its records become conversations")
    parser.add_argument("--path", metavar="FILE", help="JSON lines (python_stdlib takes none)")
    parser.add_argument("--out", required=True, metavar="FILE", help="JSON lines, .gz compresses")
    parser.add_argument("--limit", type=int, metavar="N", help="write at most so many")
    parser.add_argument(
        "--drop-containing",
        action="append",
        default=[],
        metavar="TEXT",
        help="drop conversations that contain TEXT; repeatable",
    )
    add_common_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    """Run the command; its JSON object."""
    from dspark.data.corpus import write_source

    check_positive(options, "limit")
    out = Path(options.out)
    records = write_source(
        options.format,
        Path(options.path) if options.path else None,
        out,
        seed=options.seed or 0,
        without=tuple(options.drop_containing),
        limit=options.limit,
    )
    screen.out.print(Text(f"{records} conversations in {out}."), soft_wrap=True)
    return {"records": records, "failed": 0, "bytes": out.stat().st_size, "out": str(out)}
