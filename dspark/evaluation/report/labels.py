"""Names of runs that tell them apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Run = Mapping[str, Any]
# Settings that a label names where runs differ in them, and how.
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
    if len(set(labels)) < len(labels):  # one drafter, retrained or loaded from elsewhere
        labels = [_label(each, [*differing, *_OF_A_DRAFTER]) for each in settings]
    return labels


def _label(settings: Mapping[str, Any], names: Sequence[str]) -> str:
    said = [_NAMES[name].format(settings[name]) for name in names if settings[name] is not None]
    return " ".join([settings["drafter"], *said])
