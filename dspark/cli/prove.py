"""`dspark prove`: enumerates small worlds, and shows that no rule or schedule changes an output."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from dspark.cli.common import Commands, Screen, add_common_options, new_parser, use_threads

if TYPE_CHECKING:
    from dspark.evaluation.proof.case import Case

EXAMPLE = """\
  dspark prove
  dspark prove --seed 7 --json"""


def add_parser(commands: Commands) -> None:
    """Add `prove`."""
    summary = "prove by exact enumeration that speculation changes no output"
    parser = new_parser(commands, "prove", summary, EXAMPLE)
    add_common_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    """Run the command; its JSON object, with `ok` false where a case came out otherwise."""
    use_threads(options)
    from dspark.evaluation.proof.proof import Proof, all_cases

    started = time.perf_counter()
    cases: list[Case] = []
    with screen.log.status("Enumerating ...") as status:
        for case in all_cases(options.seed or 0):
            cases.append(case)
            status.update(f"Enumerated {len(cases)}: {case.name}")
    proof, seconds = Proof(tuple(cases)), time.perf_counter() - started
    _show_promise(proof.of("exact"), screen)
    _show_controls(proof.of("biased"), screen)
    failed = [case for case in cases if not case.passed]
    for case in failed:
        screen.out.print(Text(f"FAILED: {case.name}: {_distance(case)}", "bold red"))
    words = "as expected" if proof.ok else f"{len(failed)} NOT as expected"
    screen.out.print(
        f"{len(cases)} cases in {seconds:.0f} s, {words}: exact ones within 1e-12 of the target's "
        "own law, every mistake caught.",
        soft_wrap=True,
    )
    return {
        "cases": [
            {
                "name": case.name,
                "expected": case.expected,
                "tv_request": case.tv_request,
                "tv_joint": case.tv_joint,
                "limit": case.limit,
                "passed": case.passed,
                "note": case.note,
            }
            for case in cases
        ],
        "seconds": seconds,
        "ok": proof.ok,
    }


def _show_promise(cases: list[Case], screen: Screen) -> None:
    """The table of schedules, the largest distance of all heads; then what else is exact."""
    table = Table(title="Exact: largest total variation from plain decoding", title_justify="left")
    rows: dict[tuple[str, str], dict[int, list[float]]] = {}
    for case in cases:
        if case.cell is not None:
            verifier, schedule, _, requests = case.cell
            cell = rows.setdefault((verifier, schedule), {})
            cell.setdefault(requests, []).append(case.distance)
    table.add_column("verifier")
    table.add_column("schedule")
    table.add_column("one request", justify="right")
    table.add_column("two, joint law", justify="right")
    for (verifier, schedule), cell in sorted(rows.items()):
        values = [f"{max(cell[n]):.1e}" if n in cell else "-" for n in (1, 2)]
        table.add_row(verifier, schedule, *values)
    screen.out.print(table)
    other = Table("also exact", "total variation", box=None, pad_edge=False)
    for case in cases:
        if case.cell is None:
            other.add_row(Text(case.name), _distance(case))
    screen.out.print(other)


def _show_controls(cases: list[Case], screen: Screen) -> None:
    table = Table(title="Controls: mistakes that must show", title_justify="left")
    for name in ("mistake", "per request", "joint", "elsewhere", ""):
        table.add_column(name, justify="left" if name in ("mistake", "") else "right")
    for case in cases:
        table.add_row(
            Text(case.name),
            f"{case.tv_request:.2g}",
            "-" if case.tv_joint is None else f"{case.tv_joint:.2g}",
            "-" if case.documented is None else f"{case.documented:.2g}",
            Text("caught" if case.passed else "MISSED", "" if case.passed else "bold red"),
        )
    screen.out.print(table)
    for case in cases:
        if case.note:
            screen.out.print(Text(f"{case.name}: {case.note}", "dim"), soft_wrap=True)


def _distance(case: Case) -> str:
    return f"{case.distance:.1e}"
