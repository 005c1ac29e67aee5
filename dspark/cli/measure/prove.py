"""`dspark prove`: the losslessness of every rule and schedule, enumerated on the spot."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from dspark.cli.groups import Common
from dspark.cli.inputs import use_threads
from dspark.cli.options import Command
from dspark.cli.screen import Screen
from dspark.errors import UsageError

if TYPE_CHECKING:
    from dspark.evaluation.proof.case import Case
    from dspark.evaluation.proof.proof import Proof

EXAMPLE = """\
  dspark prove
  dspark prove --seed 1 --json"""
WRONG = "bold red"


def run(options: Common, screen: Screen) -> dict[str, Any]:
    """Run the command; its JSON object."""
    if options.device not in ("auto", "cpu"):
        raise UsageError(
            f"--device is {options.device}, but the proof runs on the CPU; leave it out."
        )
    if options.dtype != "auto":
        raise UsageError(
            f"--dtype is {options.dtype}, but the proof computes in float64; leave it out."
        )
    use_threads(options)
    from dspark.evaluation.proof.proof import Proof, all_cases

    start, cases = time.perf_counter(), []
    with screen.log.status("Enumerating ...") as status:
        for case in all_cases(options.seed or 0):
            cases.append(case)
            status.update(f"Enumerating ... {len(cases)} cases, the last: {case.name}")
    proof, seconds = Proof(tuple(cases)), time.perf_counter() - start
    _show(proof, seconds, screen)
    return {"ok": proof.ok, "cases": [_record(case) for case in proof.cases], "seconds": seconds}


def _record(case: Case) -> dict[str, Any]:
    record = asdict(case) | {"passed": case.passed}
    del record["cell"], record["holds"]
    return record


def _show(proof: Proof, seconds: float, screen: Screen) -> None:
    out = screen.out
    out.print(_schedules(proof))
    out.print(_others(proof))
    out.print(_controls(proof))
    out.print(_closing(proof, seconds), soft_wrap=True)


def _table(title: str, *columns: str, right: tuple[str, ...] = ()) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, header_style="bold")
    for name in (*columns, *right):
        table.add_column(name, justify="right" if name in right else "left")
    return table


def _schedules(proof: Proof) -> Table:
    """The largest distance of every verifier, schedule and head, for one request and for two."""
    cells = {case.cell: case for case in proof.cases if case.cell is not None}
    heads = list(dict.fromkeys(cell[2] for cell in cells))
    columns = [(head, requests) for head in heads for requests in (1, 2)]
    table = _table(
        "Must be exact: total variation from plain decoding, by the drafter's head;\n"
        "1: one request, 2: two requests jointly (coupled: share of outputs that differ)",
        "verifier",
        "schedule",
        right=tuple(f"{head}\n{requests}" for head, requests in columns),
    )
    for verifier in dict.fromkeys(cell[0] for cell in cells):
        names = dict.fromkeys(cell[1] for cell in cells if cell[0] == verifier)
        for n, schedule in enumerate(names):
            row = [_distance(cells.get((verifier, schedule, *column))) for column in columns]
            table.add_row("" if n else verifier, schedule, *row)
        table.add_section()
    return table


def _others(proof: Proof) -> Table:
    table = _table("Must be exact as well", "case", right=("distance",))
    for case in proof.of("exact"):
        if case.cell is None:
            table.add_row(_named(case), _distance(case))
    return table


def _controls(proof: Proof) -> Table:
    """The wrong variants, each beside the right one."""
    table = _table(
        "Controls, wrong on purpose: must be seen to fail, beside the right variant",
        "wrong variant",
        right=("distance", "right", "known"),
    )
    for case in proof.of("biased"):
        known = "" if case.documented is None else f"{case.documented:.2g}"
        right = "" if case.correct is None else f"{case.correct:.0e}"
        table.add_row(_named(case), _distance(case), right, known)
    return table


def _named(case: Case) -> Text:
    name = Text(case.name)
    if case.note:
        name.append(f"\n  {case.note}", "dim")
    return name


def _distance(case: Case | None) -> Text:
    if case is None:
        return Text("")
    value = case.distance
    shown = f"{value:.0e}" if 0 < value < 1e-6 else f"{value:.2g}"
    return Text(shown) if case.passed else Text(f"{shown} !", WRONG)


def _closing(proof: Proof, seconds: float) -> Text:
    exact, controls = proof.of("exact"), proof.of("biased")
    failed = [case.name for case in proof.cases if not case.passed]
    if failed:
        names = "; ".join(failed)
        sentence = f"{len(failed)} of {len(proof.cases)} cases (!) are not as they must be: {names}"
        return Text(f"{sentence}.", WRONG)
    return Text(
        f"All {len(exact)} exact cases are within {max(c.distance for c in exact):.0e} of plain "
        f"decoding, and all {len(controls)} controls fail as they must; {seconds:.0f} s."
    )


COMMAND = Command(
    "prove",
    "enumerate small worlds and show that speculation changes no output",
    EXAMPLE,
    Common,
    run,
)
