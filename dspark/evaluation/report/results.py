"""What a report says, as plain data: every run, every task, and drafters compared in pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np

from dspark.evaluation.confidences import calibration_figures
from dspark.evaluation.metrics import FloatArray, Tallies, draws, figures, interval
from dspark.evaluation.records import Record, RunRecords, Settings, Spent

VERSION = 1


@dataclass(frozen=True)
class TaskRecords:
    """The finished prompts of one task of a run.

    Attributes:
        name, domain: of the task.
        records: of prompts that were answered, at least in part, in the order of asking.
        planned: how many are to be asked.
        skipped: (key, why) of those that could not be asked, or not to their last turn.
        spent: on all of them.
    """

    name: str
    domain: str
    records: tuple[Record, ...]
    planned: int
    skipped: tuple[tuple[str, str], ...]
    spent: Spent

    @classmethod
    def of(cls, run: RunRecords, name: str) -> TaskRecords:
        """Of a task that is planned."""
        records, plan = run.of_task(name), run.plan.tasks[name]
        return cls(
            name,
            plan["domain"],
            tuple(record for record in records if record.turns),
            len(plan["keys"]),
            tuple((r.key, r.skipped) for r in records if r.skipped is not None),
            sum((record.spent for record in records), Spent()),
        )


def report_of(runs: Sequence[RunRecords], seed: int = 0) -> dict[str, Any]:
    """The report of some runs.

    Args:
        runs: each with a plan.
        seed: of the resamples.

    Returns:
        `runs` and `comparisons`; keys as in docs/evaluation.md. All that hangs on the clock lies
        under keys named `timings`.
    """
    return {
        "version": VERSION,
        "runs": [run_report(run, seed) for run in runs],
        "comparisons": comparisons(runs, seed),
    }


def run_report(run: RunRecords, seed: int = 0) -> dict[str, Any]:
    """One run: its settings, and the figures of its tasks and domains."""
    plan, settings = run.plan, run.settings
    tasks = [TaskRecords.of(run, name) for name in plan.tasks]
    found = {task.name: _figures(task, run, seed) for task in tasks}
    domains = _domains(tasks, run, seed)
    return {
        "name": settings.drafter,
        "settings": asdict(settings),
        "drafter": asdict(plan.drafter),
        "sources": {name: dict(plan.tasks[name]) | {"keys": None} for name in plan.tasks},
        "tasks": found,
        "domains": domains,
        "macro": _macro(tasks, run, seed),
        "skipped": [
            {"task": task.name, "key": key, "why": why}
            for task in tasks
            for key, why in task.skipped
        ],
        "unfinished": sum(task.planned - len(run.of_task(task.name)) for task in tasks),
        "timings": {
            "environment": dict(plan.environment),
            "commands": list(dict.fromkeys(each.command for each in run.plans)),
            **_timings(
                sum((task.spent for task in tasks), Spent()),
                sum(row["tokens"] for row in found.values()),
                None,
            ),
        },
    }


def _figures(task: TaskRecords, run: RunRecords, seed: int) -> dict[str, Any]:
    drafter = run.plan.drafter
    tallies = Tallies.of(task.records, drafter.block_size)
    found = figures(tallies, task.name, seed)
    calibration = calibration_figures(task.records, drafter, run.settings.verifier)
    empty = {"ece": None, "auc": None, "brier": None, "calibration": None}
    return (
        {"domain": task.domain, "planned": task.planned, "skipped": len(task.skipped)}
        | found
        | (calibration or empty)
        | {"timings": _timings(task.spent, found["tokens"], found["accepted_length"])}
    )


def _domains(tasks: Sequence[TaskRecords], run: RunRecords, seed: int) -> dict[str, Any]:
    """All prompts of a domain together: its acceptance by position, and its calibration."""
    drafter, found = run.plan.drafter, dict[str, Any]()
    for name in dict.fromkeys(task.domain for task in tasks):
        mine = [task for task in tasks if task.domain == name]
        records = [record for task in mine for record in task.records]
        tallies = Tallies.of(records, drafter.block_size)
        lengths = [_length(task, run) for task in mine]
        known = [length for length in lengths if length is not None]
        found[name] = figures(tallies, name, seed) | {
            "tasks": [task.name for task in mine],
            # a mean over tasks, as in the paper's tables; the rest is of all prompts together
            "accepted_length": sum(known) / len(known) if known else None,
            "ci95": _mean_interval(mine, run, seed),
            "calibration": (calibration_figures(records, drafter, run.settings.verifier) or {}).get(
                "calibration"
            ),
        }
    return found


def _length(task: TaskRecords, run: RunRecords) -> float | None:
    tallies = Tallies.of(task.records, run.plan.drafter.block_size)
    return float(tallies.accepted_length()) if tallies.whole_P.sum() else None


def _drawn(task: TaskRecords, run: RunRecords, seed: int) -> FloatArray | None:
    tallies = Tallies.of(task.records, run.plan.drafter.block_size)
    return draws(tallies, task.name, seed) if tallies.whole_P.sum() else None


def _mean_interval(tasks: Sequence[TaskRecords], run: RunRecords, seed: int) -> list[float] | None:
    """The interval of a mean over tasks, each resampled by itself."""
    drawn = [each for task in tasks if (each := _drawn(task, run, seed)) is not None]
    many = all(len(task.records) > 1 for task in tasks if task.records)
    return interval(np.mean(drawn, axis=0)) if drawn and many else None


def _macro(tasks: Sequence[TaskRecords], run: RunRecords, seed: int) -> dict[str, Any]:
    """Means over tasks, and over domains of their means over tasks."""
    lengths = {task.name: _length(task, run) for task in tasks}
    known = [task for task in tasks if lengths[task.name] is not None]
    groups: dict[str, list[float]] = {}
    for task in known:
        length = lengths[task.name]
        assert length is not None
        groups.setdefault(task.domain, []).append(length)
    means = [sum(group) / len(group) for group in groups.values()]
    values = [value for group in groups.values() for value in group]
    return {
        "tasks": len(known),
        "accepted_length": sum(values) / len(values) if values else None,
        "ci95": _mean_interval(known, run, seed),
        "accepted_length_domains": sum(means) / len(means) if means else None,
    }


def _timings(spent: Spent, tokens: int, accepted_length: float | None) -> dict[str, float | None]:
    """Speed, and the terms of a token's latency L = (T_draft + T_verify) / tau."""
    steps = spent.decode_steps
    draft, schedule, verify = (
        ms / steps if steps else None for ms in (spent.draft_ms, spent.schedule_ms, spent.verify_ms)
    )
    round_ms = None
    if draft is not None and schedule is not None and verify is not None:
        round_ms = draft + schedule + verify
    return {
        "seconds": spent.seconds,
        "tokens_per_s": tokens / spent.seconds if spent.seconds else None,
        "draft_ms": draft,
        "schedule_ms": schedule,
        "verify_ms": verify,
        "requests_per_step": spent.judged / spent.steps if spent.steps else None,
        "latency_ms_per_token": (
            round_ms / accepted_length if round_ms is not None and accepted_length else None
        ),
    }


def comparisons(runs: Sequence[RunRecords], seed: int = 0) -> list[dict[str, Any]]:
    """Every two drafters at the same setting, on the prompts that both have answered."""
    found = []
    for a, b in combinations(runs, 2):
        if _setting(a.settings) == _setting(b.settings):
            found.append(compare(b, a, seed))
    return found


def _setting(settings: Settings) -> Settings:
    """All but the drafter."""
    return replace(settings, drafter="", draft="", draft_weights="")


def compare(a: RunRecords, b: RunRecords, seed: int = 0) -> dict[str, Any]:
    """The accepted length of `a` over that of `b`: a paired bootstrap over prompts."""
    tasks, drawn_a, drawn_b, lengths = dict[str, Any](), [], [], []
    same = answers = 0
    for name in (n for n in a.plan.tasks if n in b.plan.tasks):
        ours = {r.key: r for r in TaskRecords.of(a, name).records}
        theirs = {r.key: r for r in TaskRecords.of(b, name).records}
        keys = [key for key in ours if key in theirs]
        first, second = (
            Tallies.of([records[key] for key in keys], run.plan.drafter.block_size)
            for run, records in ((a, ours), (b, theirs))
        )
        if not first.whole_P.sum() or not second.whole_P.sum():
            continue
        pair = float(first.accepted_length()), float(second.accepted_length())
        first_B, second_B = draws(first, name, seed), draws(second, name, seed)
        tasks[name] = _ratio(pair, first_B, second_B, many=len(keys) > 1) | {"prompts": len(keys)}
        drawn_a.append(first_B)
        drawn_b.append(second_B)
        lengths.append(pair)
        same += sum(_digests(ours[key]) == _digests(theirs[key]) for key in keys)
        answers += len(keys)
    macro = None
    if lengths:
        means = (
            sum(pair[0] for pair in lengths) / len(lengths),
            sum(pair[1] for pair in lengths) / len(lengths),
        )
        many = all(row["prompts"] > 1 for row in tasks.values())
        macro = _ratio(means, np.mean(drawn_a, axis=0), np.mean(drawn_b, axis=0), many=many)
    return {
        "a": a.settings.drafter,
        "b": b.settings.drafter,
        "setting": asdict(_setting(a.settings)),
        "tasks": tasks,
        "macro": macro,
        "same_answers": same / answers if answers else None,
    }


def _digests(record: Record) -> list[str]:
    return [turn.digest for turn in record.turns]


def _ratio(
    lengths: tuple[float, float], a_B: FloatArray, b_B: FloatArray, *, many: bool
) -> dict[str, Any]:
    return {
        "ratio": lengths[0] / lengths[1],
        "ci95": interval(a_B / b_B) if many else None,
    }
