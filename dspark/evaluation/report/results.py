"""Results of a report as plain data: runs, tasks, and pairwise comparisons of drafters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, reduce
from itertools import combinations
from typing import Any

import numpy as np

from dspark.evaluation.calibration import calibration_figures
from dspark.evaluation.metrics import FloatArray, RoundCounts, draws, figures, interval
from dspark.evaluation.records import Record, RunRecords, Settings, Spent
from dspark.request import VERIFIERS

VERSION = 1


@dataclass(frozen=True)
class TaskRecords:
    """The finished prompts of one task of a run.

    Attributes:
        name, domain: of the task.
        block_size: drafts of a whole block.
        records: of prompts that were answered, at least in part, in the order of asking.
        planned: how many are to be asked.
        unfinished: how many of these have no record.
        skipped: (key, why) of those that could not be asked, or not to their last turn.
        spent: on all of them.
    """

    name: str
    domain: str
    block_size: int
    records: tuple[Record, ...]
    planned: int
    unfinished: int
    skipped: tuple[tuple[str, str], ...]
    spent: Spent

    @classmethod
    def of(cls, run: RunRecords, name: str) -> TaskRecords:
        """The records of a planned task."""
        records, plan = run.of_task(name), run.plan.tasks[name]
        return cls(
            name,
            plan["domain"],
            run.plan.drafter.block_size,
            tuple(record for record in records if record.turns),
            len(plan["keys"]),
            len(plan["keys"]) - len(records),
            tuple((r.key, r.skipped) for r in records if r.skipped is not None),
            sum((record.spent for record in records), Spent()),
        )

    @cached_property
    def counts(self) -> RoundCounts:
        """Counts of its rounds."""
        return RoundCounts.of(self.records, self.block_size)

    @property
    def length(self) -> float | None:
        """Its accepted length; None without observed rounds."""
        return float(self.counts.accepted_length()) if self.counts.whole_P.sum() else None

    @cached_property
    def drawn(self) -> FloatArray:
        """Resampled accepted lengths."""
        return draws(self.counts, self.name)


def report_of(runs: Sequence[RunRecords]) -> dict[str, Any]:
    """The report of some runs, each with a plan, independent of their order.

    Returns:
        `runs` and `comparisons`; keys as in docs/evaluation.md. Everything that depends on
        the clock is under keys named `timings`.
    """
    ordered = sorted(runs, key=lambda run: _order(run.settings))
    return {
        "version": VERSION,
        "runs": [run_report(run) for run in ordered],
        "comparisons": comparisons(ordered),
    }


def _order(settings: Settings) -> tuple[Any, ...]:
    return (
        settings.target,
        settings.drafter,
        settings.temperature,
        settings.top_p,
        VERIFIERS.index(settings.verifier),
        settings.schedule,
        settings.threshold or 0,
        settings.block_size or 0,
        settings.key,
    )


def run_report(run: RunRecords) -> dict[str, Any]:
    """One run: its settings, and the figures of its tasks and domains."""
    plan, settings = run.plan, run.settings
    tasks = [TaskRecords.of(run, name) for name in plan.tasks]
    found = {task.name: _figures(task, run) for task in tasks}
    tokens = sum(row["generated_tokens"] for row in found.values())
    spent = sum((task.spent for task in tasks), Spent())
    return {
        "name": settings.drafter,
        "settings": asdict(settings),
        "drafter": asdict(plan.drafter),
        "sources": {
            name: {key: task[key] for key in ("source", "available")}
            for name, task in plan.tasks.items()
        },
        "tasks": found,
        "domains": _domains(tasks),
        "macro": _macro(tasks),
        "skipped": [
            {"task": task.name, "key": key, "why": why}
            for task in tasks
            for key, why in task.skipped
        ],
        "unfinished": sum(task.unfinished for task in tasks),
        "timings": {
            "environment": dict(plan.environment),
            "commands": list(dict.fromkeys(each.command for each in run.plans)),
            **_timings(spent, tokens, None),
        },
    }


def _figures(task: TaskRecords, run: RunRecords) -> dict[str, Any]:
    found = figures(task.counts, task.name)
    drafter, verifier = run.plan.drafter, run.settings.verifier
    calibration = calibration_figures(task.records, drafter, verifier)
    empty = {"ece": None, "auc": None, "brier": None, "calibration": None}
    return (
        {"domain": task.domain, "planned": task.planned, "skipped": len(task.skipped)}
        | found
        | (calibration or empty)
        | {"timings": _timings(task.spent, found["generated_tokens"], found["accepted_length"])}
    )


def _domains(tasks: Sequence[TaskRecords]) -> dict[str, Any]:
    """Figures of all prompts of a domain; its accepted length is a mean over its tasks."""
    found = {}
    for name in dict.fromkeys(task.domain for task in tasks):
        mine = [task for task in tasks if task.domain == name]
        together = reduce(RoundCounts.joined, (task.counts for task in mine))
        found[name] = figures(together, name) | {"tasks": [task.name for task in mine]}
        found[name] |= _mean(mine)
    return found


def _mean(tasks: Sequence[TaskRecords]) -> dict[str, Any]:
    """The mean accepted length over tasks, and its interval, each task resampled separately."""
    known = [task for task in tasks if task.length is not None]
    lengths = [task.length for task in known if task.length is not None]
    many = bool(known) and all(len(task.records) > 1 for task in known)
    return {
        "accepted_length": sum(lengths) / len(lengths) if lengths else None,
        "ci95": interval(np.mean([task.drawn for task in known], axis=0)) if many else None,
    }


def _macro(tasks: Sequence[TaskRecords]) -> dict[str, Any]:
    """Means over tasks, and over domains of their means over tasks."""
    domains: dict[str, list[float]] = {}
    for task in tasks:
        if task.length is not None:
            domains.setdefault(task.domain, []).append(task.length)
    means = [sum(group) / len(group) for group in domains.values()]
    return {
        "tasks": sum(map(len, domains.values())),
        **_mean(tasks),
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


def comparisons(runs: Sequence[RunRecords]) -> list[dict[str, Any]]:
    """All pairs of drafters at the same setting, on their common prompts."""
    return [
        compare(a, b)
        for a, b in combinations(runs, 2)
        if _setting(a.settings) == _setting(b.settings)
    ]


def _setting(settings: Settings) -> Settings:
    """The settings without the drafter; plain decoding compares with the fixed schedule."""
    schedule = "fixed" if settings.schedule == "off" else settings.schedule
    return replace(settings, drafter="", draft="", draft_weights="", schedule=schedule)


def compare(first: RunRecords, second: RunRecords) -> dict[str, Any]:
    """Ratio of accepted lengths of `a`, the better one, and `b`: a paired bootstrap over prompts.

    Keys of `tasks` and `macro`: `ratio` and `ci95`; `same_answers` is the share of prompts with
    identical answers.
    """
    pairs, same = dict[str, tuple[TaskRecords, TaskRecords]](), list[bool]()
    for name in (n for n in first.plan.tasks if n in second.plan.tasks):
        both = _common(TaskRecords.of(first, name), TaskRecords.of(second, name))
        if both[0].length is not None and both[1].length is not None:
            pairs[name] = both
            answered = zip(both[0].records, both[1].records, strict=True)
            same += [_digests(x) == _digests(y) for x, y in answered]
    means = [_mean([pair[side] for pair in pairs.values()])["accepted_length"] for side in (0, 1)]
    better = 0 if not pairs or means[0] >= means[1] else 1
    tasks = {
        name: _ratio([pair[better]], [pair[1 - better]]) | {"prompts": len(pair[0].records)}
        for name, pair in pairs.items()
    }
    ours, theirs = ([pair[side] for pair in pairs.values()] for side in (better, 1 - better))
    names = [run.settings.drafter for run in (first, second)]
    return {
        "a": names[better],
        "b": names[1 - better],
        "setting": asdict(_setting(first.settings)),
        "tasks": tasks,
        "macro": _ratio(ours, theirs) if pairs else None,
        "same_answers": sum(same) / len(same) if same else None,
    }


def _common(a: TaskRecords, b: TaskRecords) -> tuple[TaskRecords, TaskRecords]:
    """The common prompts of both, in one order."""
    keys = {record.key for record in b.records}
    ours = [record for record in a.records if record.key in keys]
    theirs = {record.key: record for record in b.records}
    matched = tuple(theirs[record.key] for record in ours)
    return replace(a, records=tuple(ours)), replace(b, records=matched)


def _digests(record: Record) -> list[str]:
    return [turn.digest for turn in record.turns]


def _ratio(ours: Sequence[TaskRecords], theirs: Sequence[TaskRecords]) -> dict[str, Any]:
    """The ratio of mean accepted lengths, with paired resamples."""
    a, b = (np.mean([task.drawn for task in tasks], axis=0) for tasks in (ours, theirs))
    many = all(len(task.records) > 1 for task in ours)
    lengths = [_mean(tasks)["accepted_length"] for tasks in (ours, theirs)]
    return {"ratio": lengths[0] / lengths[1], "ci95": interval(a / b) if many else None}
