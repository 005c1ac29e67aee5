"""Selection of runs for each figure, and labels that distinguish runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

Run = Mapping[str, Any]
MOST_RUNS = 14


def main_runs(runs: Sequence[Run]) -> list[Run]:
    """One run per drafter, temperature, verifier and top-p: the one with the most drafts verified.

    In a sweep over blocks or thresholds that is the longest block and the lowest threshold.
    """
    best: dict[tuple[Any, ...], Run] = {}
    for run in runs:
        settings = run["settings"]
        names = ("target", "drafter", "draft_weights", "temperature", "verifier", "top_p", "seed")
        key = tuple(settings[name] for name in names)
        if key not in best or _wholeness(run) > _wholeness(best[key]):
            best[key] = run
    return list(best.values())[:MOST_RUNS]


def _wholeness(run: Run) -> tuple[int, bool, float]:
    settings = run["settings"]
    threshold = settings["threshold"] or 0.0
    return run["drafter"]["block_size"], settings["schedule"] == "fixed", -threshold


def series(runs: Sequence[Run], field: str) -> list[list[Run]]:
    """Groups of at least two runs that differ in this setting alone, in its order."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        settings = run["settings"]
        if settings[field] is None and field != "block_size":
            continue
        rest = {name: value for name, value in settings.items() if name != field}
        groups.setdefault(json.dumps(rest, sort_keys=True), []).append(run)
    lines = []
    for group in groups.values():
        by_value = {_value(run, field): run for run in group}
        if len(by_value) > 1:
            lines.append([by_value[value] for value in _in_order(by_value)])
    return lines


def _value(run: Run, field: str) -> Any:
    """The setting, or the drafter's own block size."""
    return run["drafter"]["block_size"] if field == "block_size" else run["settings"][field]


def _in_order(values: Mapping[Any, Run]) -> list[Any]:
    """Numbers sorted, words in their order."""
    numbers = all(isinstance(value, int | float) for value in values)
    return sorted(values) if numbers else list(values)


# Settings that appear in labels if runs differ in them, and their format.
_NAMES = {
    "target": "of {}",
    "draft": "({})",
    "dtype": "{}",
    "temperature": "T={:g}",
    "top_p": "top-p {:g}",
    "top_k": "top-k {}",
    "verifier": "{}",
    "schedule": "{}",
    "threshold": "C={:g}",
    "block_size": "K={}",
    "batch_size": "batch {}",
    "max_new_tokens": "{} tokens",
    "thinking": "thinking {}",
    "raw": "raw {}",
    "turns": "turns {}",
    "draft_top_k": "{} candidates",
    "seed": "seed {}",
    "target_weights": "target {}",
    "draft_weights": "weights {}",
}
_OF_A_DRAFTER = ("draft", "draft_weights", "target_weights")


def run_labels(runs: Sequence[Run]) -> list[str]:
    """A label for each run: its drafter's name, and the settings in which the runs differ."""
    settings = [run["settings"] for run in runs]
    differing = [
        name
        for name in _NAMES
        if name not in _OF_A_DRAFTER and len({each[name] for each in settings}) > 1
    ]
    labels = [_label(each, differing) for each in settings]
    if len(set(labels)) < len(labels):  # a drafter retrained, or loaded from elsewhere
        labels = [_label(each, [*differing, *_OF_A_DRAFTER]) for each in settings]
    return labels


def _label(settings: Mapping[str, Any], names: Sequence[str]) -> str:
    said = [_NAMES[name].format(settings[name]) for name in names if settings[name] is not None]
    return " ".join([settings["drafter"], *said])
