"""`dspark check`: does a drafter fit its target, and is it worth it on this machine."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from rich.table import Table
from rich.text import Text

from dspark.cli.groups import PROMPTS_HELP, Batch, Pair, Sampling
from dspark.cli.inputs import load_model, load_pair
from dspark.cli.options import Command, option, pick
from dspark.cli.screen import Screen
from dspark.errors import CheckpointError, CompatibilityError, UsageError

if TYPE_CHECKING:
    from dspark.evaluation.check.findings import CheckReport

EXAMPLE = """\
  dspark check bundled
  dspark check ./target --draft ./drafter --prompts questions.jsonl --json
  dspark check ./drafter --engine vllm"""
STYLES = {"error": "bold red", "warning": "yellow", "note": "dim"}


@dataclass(frozen=True)
class _LiveRun:
    TITLE: ClassVar = "live run"

    prompts: str | None = option(
        None, f"{PROMPTS_HELP}; by default a few built-in questions", metavar="FILE"
    )
    max_new_tokens: int = pick(
        Sampling, "max_new_tokens", 32, help="per prompt (default: {default})", least=1
    )
    batch_size: int = pick(
        Batch, "batch_size", 1, help="requests at once where speed is measured (default: {default})"
    )
    time_limit: float = option(
        60.0,
        "seconds after which no further alternative is tried and no measurement repeated "
        "(default: {default})",
        metavar="S",
    )


@dataclass(frozen=True)
class Options(_LiveRun, Pair):
    """Options of `check`."""

    engine: str | None = option(
        None,
        "in place of all that: whether another engine runs this drafter (the positional argument "
        "then names the drafter), with which commands, and what it gives up",
        choices=("vllm", "sglang", "llama.cpp"),
    )


def run(options: Options, screen: Screen) -> dict[str, Any]:
    """Run the command; its JSON object."""
    if options.engine is not None:
        return _run_elsewhere(options, options.engine, screen)
    if not options.time_limit > 0:
        raise UsageError(f"--time-limit is {options.time_limit:g}, but must be above 0.")
    from dspark.data.conversations import read_prompts
    from dspark.evaluation.check.findings import CheckReport, Finding
    from dspark.evaluation.check.inspection import has_draft_module

    if options.draft is None and has_draft_module(Path(options.target)):
        return _list_module(options.target, screen)
    prompts = read_prompts(options.prompts) if options.prompts else None
    try:
        model = load_pair(options, screen)
    except (CheckpointError, CompatibilityError) as error:
        # The target's own errors are raised here; what is left is the drafter's.
        load_model(options.target, "none", options, screen)
        return _show(CheckReport((Finding.refusal(error),)), screen)
    from dspark.evaluation.check.check import PROMPTS, check

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


def _list_module(target: str, screen: Screen) -> dict[str, Any]:
    """A draft module among the target's own tensors, which is listed without loading either."""
    from dspark.evaluation.check.findings import CheckReport, Finding
    from dspark.evaluation.check.inspection import list_draft_module

    try:
        module = list_draft_module(Path(target))
    except (CheckpointError, CompatibilityError) as error:
        return _show(CheckReport((Finding.refusal(error),)), screen)
    report = CheckReport(module.findings(target))
    _table(report, screen)
    screen.say("The draft module is whole; nothing was loaded.")
    return {
        "ok": True,
        "expected_speedup": None,
        "findings": [asdict(finding) for finding in report.findings],
        "draft_module": asdict(module),
    }


def _run_elsewhere(options: Options, engine: str, screen: Screen) -> dict[str, Any]:
    from dspark.drafters.checkpoints.checkpoint import load_drafter
    from dspark.integrations.engines import verdict

    if options.draft is not None:
        raise UsageError(
            f"--draft {options.draft} has no effect beside --engine; name the drafter in the place "
            "of the target."
        )
    source = options.target
    drafter = load_drafter(source, revision=options.revision, offline=options.offline)
    found = verdict(engine, drafter, source)
    if found.why_not:
        why = " and ".join(found.why_not)
        screen.say(f"{found.engine} does not run this drafter: it has {why}.")
    else:
        screen.say(f"{found.engine} runs this drafter:")
        for line in found.commands:
            screen.say(f"  {line}")
        for line in found.notes:
            screen.say(f"{line.removesuffix('.')}.")
    screen.say(f"There, {'; '.join(found.loses)}.")
    return {"ok": not found.why_not} | asdict(found)


def _table(report: CheckReport, screen: Screen) -> None:
    table = Table(show_header=True, header_style="bold", show_lines=True)
    for column in ("", "Finding", "What to do"):
        table.add_column(column, overflow="fold")
    for finding in report.findings:
        label = Text(finding.severity, STYLES[finding.severity])
        table.add_row(label, Text(finding.what), Text(finding.remedy))
    screen.out.print(table)


def _show(report: CheckReport, screen: Screen) -> dict[str, Any]:
    if report.findings:
        _table(report, screen)
    screen.say(closing(report))
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


COMMAND = Command(
    "check",
    "find out whether a drafter fits a target and is worth it on this machine",
    EXAMPLE,
    Options,
    run,
)
