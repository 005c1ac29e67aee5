"""`dspark profile`: measures what steps cost on this machine."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import Progress
from rich.table import Table

from dspark.cli.common import (
    Commands,
    Screen,
    add_common_options,
    add_loading_options,
    add_pair_options,
    check_positive,
    load_model,
    new_parser,
)

if TYPE_CHECKING:
    from dspark.scheduling.cost import CostTable

EXAMPLE = """\
  dspark profile bundled
  dspark profile ./target --draft ./drafter --max-requests 32 --out costs.json"""


def add_parser(commands: Commands) -> None:
    """Add `profile`."""
    summary = "measure what steps cost on this machine, for the schedules that weigh it"
    parser = new_parser(commands, "profile", summary, EXAMPLE)
    add_pair_options(parser)
    parser.add_argument(
        "--max-requests", type=int, default=8, metavar="R", help="requests at once (default: 8)"
    )
    parser.add_argument(
        "--block-size", type=int, metavar="K", help="drafts per round (default: the drafter's)"
    )
    parser.add_argument(
        "--repeats", type=int, default=5, metavar="N", help="rounds per point (default: 5)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="where the table goes (default: the user's cache, where other commands look)",
    )
    add_loading_options(parser)
    add_common_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    """Run the command; its JSON object."""
    check_positive(options, "max_requests", "repeats")
    model = load_model(options, options.draft, screen)
    with Progress(console=screen.log, transient=True) as bar:
        task = bar.add_task("rounds", total=None)
        table = model.profile(
            max_requests=options.max_requests,
            block_size=options.block_size,
            repeats=options.repeats,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    path = table.save(options.out)
    _show(table, screen)
    screen.out.print(f"Written to {path}.", soft_wrap=True)
    return {
        "points": [asdict(point) for point in table.points],
        "machine": asdict(table.machine),
        "warnings": table.warnings(),
        "out": str(path),
    }


def _show(table: CostTable, screen: Screen) -> None:
    shown = Table("requests", "tokens", "verify ms", "draft ms", box=None, pad_edge=False)
    for point in table.points:
        shown.add_row(
            str(point.requests),
            str(point.tokens),
            f"{point.verify_ms:.2f}",
            f"{point.draft_ms:.2f}",
        )
    screen.out.print(shown)
    for sentence in table.warnings():
        screen.log.print(sentence, style="yellow", soft_wrap=True)
