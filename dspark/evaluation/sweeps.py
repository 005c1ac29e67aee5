"""Sweeps, and which runs make a figure.

A sweep varies one setting, the others fixed (Figs. 4 and 5 of the paper, and more). Depth (Fig. 3)
is not a setting of a drafter: evaluate several drafters instead. Runs are selected for each figure,
with labels that distinguish them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from dspark.errors import UsageError
from dspark.evaluation.records import Settings
from dspark.request import VERIFIERS, Verifier

_THRESHOLDS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_TEMPERATURES = (0.0, 0.25, 0.5, 0.75, 1.0)
_TOP_PS = (0.5, 0.7, 0.8, 0.9, 0.95, 1.0)


@dataclass(frozen=True)
class Sweep:
    """A setting to vary.

    Attributes:
        field: of `Settings`.
        values: by default; None takes every block size of the drafter.
        read: a value from a word of the command line.
        label: what the figure's axis says.
    """

    field: str
    values: tuple[Any, ...] | None
    read: Callable[[str], Any]
    label: str


def _verifier(word: str) -> Verifier:
    if word not in VERIFIERS:
        raise ValueError(word)
    return get_args(Verifier)[VERIFIERS.index(word)]  # type: ignore[no-any-return]


SWEEPS: Mapping[str, Sweep] = {
    "threshold": Sweep("threshold", _THRESHOLDS, float, "confidence threshold"),
    "block": Sweep("block_size", None, int, "drafts per round"),
    "verifier": Sweep("verifier", VERIFIERS, _verifier, "verifier"),
    "temperature": Sweep("temperature", _TEMPERATURES, float, "temperature"),
    "top-p": Sweep("top_p", _TOP_PS, float, "top-p"),
}


def sweep_values(name: str, words: Sequence[str] = ()) -> tuple[Any, ...] | None:
    """The values to go through: those given, or the sweep's own; None for the drafter's blocks.

    Raises:
        UsageError: a word is no value of the sweep.
    """
    sweep = SWEEPS[name]
    if not words:
        return sweep.values
    try:
        return tuple(dict.fromkeys(sweep.read(word) for word in words))
    except ValueError as error:
        raise UsageError(
            f"--values has {','.join(words)}, but the sweep {name} takes values like "
            f"{','.join(map(str, sweep.values or (1, 3, 7)))}."
        ) from error


def varied(
    base: Settings, name: str, values: Sequence[Any] | None, block_size: int
) -> list[Settings]:
    """The settings of a sweep.

    Args:
        base: what is kept.
        name: of the sweep.
        values: of `sweep_values`.
        block_size: the drafter's own, for the sweep over blocks.

    Raises:
        UsageError: a value does nothing, such as top-p at temperature 0.
    """
    sweep = SWEEPS[name]
    if name == "top-p" and base.temperature == 0:
        raise UsageError(
            "The sweep top-p does nothing at temperature 0; give a --temperature above 0."
        )
    values = range(1, block_size + 1) if values is None else values
    if name == "threshold":
        return [replace(base, schedule="threshold", threshold=value) for value in values]
    changes: list[dict[str, Any]] = [{sweep.field: value} for value in values]
    return [replace(base, **change) for change in changes]


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
        key = (*(settings[name] for name in names), settings["tree_nodes"])
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
    "tree_nodes": "trees of {}",
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
