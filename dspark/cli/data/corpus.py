"""`dspark data corpus`: a corpus file as conversations."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspark.cli.groups import Common
from dspark.cli.options import Command, option
from dspark.cli.screen import Screen
from dspark.data.corpus import SourceFormat

EXAMPLE = """\
  dspark data corpus gsm8k --path gsm8k_train.jsonl.gz --out questions.jsonl.gz"""


@dataclass(frozen=True)
class Options(Common):
    """Options of `data corpus`."""

    format: SourceFormat = option("messages", "format of the file's records", positional=True)
    path: Path | None = option(None, "JSON lines (python_stdlib takes none)", metavar="FILE")
    out: Path = option(None, "JSON lines, .gz compresses", metavar="FILE", required=True)
    limit: int | None = option(None, "write at most N", metavar="N", least=1)
    drop_containing: tuple[str, ...] = option(
        (), "drop conversations that contain TEXT; repeatable", metavar="TEXT"
    )


def run(options: Options, screen: Screen) -> dict[str, Any]:
    """Run the command; its JSON object."""
    from dspark.data.corpus import write_source

    out = options.out
    records = write_source(
        options.format,
        options.path,
        out,
        seed=options.seed or 0,
        without=options.drop_containing,
        limit=options.limit,
    )
    screen.say(f"{records} conversations in {out}.")
    return {"records": records, "failed": 0, "bytes": out.stat().st_size, "out": str(out)}


COMMAND = Command(
    "corpus", "turn a corpus file into conversations, in a seeded order", EXAMPLE, Options, run
)
