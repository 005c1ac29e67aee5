"""`dspark check`: does a drafter fit its target, and is it worth it on this machine."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

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
from dspark.errors import CheckpointError, CompatibilityError, UsageError

if TYPE_CHECKING:
    from dspark.evaluation.findings import CheckReport

EXAMPLE = """\
  dspark check bundled
  dspark check ./target --draft ./drafter --prompts questions.jsonl --json"""
STYLES = {"error": "bold red", "warning": "yellow", "note": "dim"}


def add_parser(commands: Commands) -> None:
    """Add `check`."""
    summary = "find out whether a drafter fits a target and is worth it on this machine"
    parser = new_parser(commands, "check", summary, EXAMPLE)
    add_pair_options(parser)
    group = parser.add_argument_group("live run")
    group.add_argument(
        "--prompts",
        metavar="FILE",
        help="JSON lines with `turns`, `messages` or `prompt`; by default a few built-in questions",
    )
    group.add_argument(
        "--max-new-tokens", type=int, default=32, metavar="N", help="per prompt (default: 32)"
    )
    group.add_argument(
        "--batch-size",
        type=int,
        default=1,
        metavar="R",
        help="requests at once where speed is measured (default: 1)",
    )
    group.add_argument(
        "--time-limit",
        type=float,
        default=60.0,
        metavar="S",
        help="seconds after which no further alternative is tried and no measurement repeated "
        "(default: %(default)g)",
    )
    add_loading_options(parser)
    add_common_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    """Run the command; its JSON object."""
    check_positive(options, "batch_size", "max_new_tokens")
    if not options.time_limit > 0:
        raise UsageError(f"--time-limit is {options.time_limit:g}, but must be above 0.")
    from dspark.data.conversations import read_prompts
    from dspark.evaluation.findings import CheckReport, Finding

    prompts = read_prompts(options.prompts) if options.prompts else None
    try:
        model = load_model(options, options.draft, screen)
    except (CheckpointError, CompatibilityError) as error:
        # The target's own errors are raised here; what is left is the drafter's.
        load_model(argparse.Namespace(**vars(options) | {"draft_top_k": None}), "none", screen)
        return _show(CheckReport((Finding.refusal(error),)), screen)
    from dspark.evaluation.check import PROMPTS, check

    with screen.log.status("Inspecting ...") as status:

        def show(step: str) -> None:
            if screen.log.is_terminal:
                status.update(f"{step} ...")
            else:
                screen.log.print(f"{step} ...", soft_wrap=True, markup=False)

        report = check(
            model,
            prompts or PROMPTS,
            max_new_tokens=options.max_new_tokens,
            batch_size=options.batch_size,
            seed=options.seed or 0,
            limit_s=options.time_limit,
            progress=show,
        )
    return _show(report, screen)


def _show(report: CheckReport, screen: Screen) -> dict[str, Any]:
    if report.findings:
        table = Table(show_header=True, header_style="bold", show_lines=True)
        for column in ("", "Finding", "What to do"):
            table.add_column(column, overflow="fold")
        for finding in report.findings:
            label = Text(finding.severity, STYLES[finding.severity])
            table.add_row(label, Text(finding.what), Text(finding.remedy))
        screen.out.print(table)
    screen.out.print(closing(report), soft_wrap=True)
    return {
        "ok": report.ok,
        "expected_speedup": report.expected_speedup,
        "findings": [asdict(finding) for finding in report.findings],
        "runs": [asdict(run) | {"speedup": run.speedup} for run in report.runs],
        "trials": [asdict(trial) for trial in report.trials],
    }


def closing(report: CheckReport) -> str:
    """The sentence that sums a report up."""
    verdict = _verdict(report)
    if not report.runs:
        return f"{verdict}."
    gains = " and ".join(
        f"{r.accepted_length:.2f} at temperature {r.temperature:g}" for r in report.runs
    )
    speeds = " and ".join(f"{r.speedup:.2f}" for r in report.runs)
    return (
        f"{verdict}; tokens gained per round: {gains}; measured speed on this machine: {speeds} "
        "times plain decoding."
    )


def _verdict(report: CheckReport) -> str:
    if errors := report.count("error"):
        return f"Not ready for speculative decoding: {_counted(errors, 'error')}"
    if not report.runs[0].telling:
        return "Undecided: too few tokens to judge the drafter by"
    if report.runs[0].speedup < 1:
        return "The drafter works, but does not pay on this machine"
    if warnings := report.count("warning"):
        return f"The drafter works, with {_counted(warnings, 'warning')}"
    return "The drafter fits"


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
