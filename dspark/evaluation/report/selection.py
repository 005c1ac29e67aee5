"""Which runs of a report belong into which figure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

Run = Mapping[str, Any]
MOST_RUNS = 14


def main_runs(runs: Sequence[Run]) -> list[Run]:
    """One run for each drafter, temperature, verifier and top-p: of whole blocks, untrimmed.

    Of a sweep over blocks or thresholds that is the longest block and the lowest threshold.
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
    """Runs that differ in this setting alone, in its order: two of them at least."""
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
    """The setting, or the block size that a drafter has by itself."""
    return run["drafter"]["block_size"] if field == "block_size" else run["settings"][field]


def _in_order(values: Mapping[Any, Run]) -> list[Any]:
    """Numbers by size, words as they come."""
    numbers = all(isinstance(value, int | float) for value in values)
    return sorted(values) if numbers else list(values)
