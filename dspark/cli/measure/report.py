"""`dspark report`: writes the report of an evaluation again, from its records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspark.cli.groups import Json
from dspark.cli.options import Command, option
from dspark.cli.screen import Screen

EXAMPLE = """\
  dspark report evaluation
  dspark report today yesterday --out both"""


@dataclass(frozen=True)
class Options(Json):
    """Options of `report`."""

    directories: tuple[Path, ...] = option(
        (), "a folder that dspark eval --out wrote", positional=True, nargs="+", metavar="DIR"
    )
    out: Path | None = option(None, "where to write it (default: the first DIR)", metavar="DIR")


def run(options: Options, screen: Screen) -> dict[str, Any]:
    """Run the command; its JSON object."""
    return rebuild(options.directories, options.out or options.directories[0], screen)


def rebuild(directories: Sequence[Path], out: Path, screen: Screen) -> dict[str, Any]:
    """Write the report of all runs of some folders.

    Raises:
        DataError: a folder has no run, or a file is damaged.
    """
    from dspark.evaluation.records import load_runs
    from dspark.evaluation.report.results import report_of
    from dspark.evaluation.report.write import write_report

    report = report_of(load_runs(directories))
    written = write_report(report, out, screen.warn)
    screen.say(f"Written to {out / 'report.html'}.")
    return report | {"out": [str(path) for path in written]}


COMMAND = Command(
    "report",
    "write the report of evaluations from their records, side by side",
    EXAMPLE,
    Options,
    run,
)
