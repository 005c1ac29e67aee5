"""`dspark report`: writes the report of an evaluation again, from its records."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dspark.cli.common import Commands, Screen, new_parser

EXAMPLE = """\
  dspark report evaluation
  dspark report today yesterday --out both"""


def add_parser(commands: Commands) -> None:
    """Add `report`."""
    summary = "write the report of evaluations from their records, side by side"
    parser = new_parser(commands, "report", summary, EXAMPLE)
    parser.add_argument(
        "directories",
        metavar="DIR",
        nargs="+",
        type=Path,
        help="a folder that dspark eval --out wrote",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where to write it (default: the first DIR)"
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="make the last line of standard output a JSON object; all else goes to standard error",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, screen: Screen) -> dict[str, Any]:
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
    written = write_report(report, out, lambda sentence: warn(screen, sentence))
    screen.out.print(f"Written to {out / 'report.html'}.", soft_wrap=True, markup=False)
    return report | {"out": [str(path) for path in written]}


def warn(screen: Screen, sentence: str) -> None:
    """Say what is left out."""
    screen.log.print(sentence, style="yellow", soft_wrap=True, markup=False)
