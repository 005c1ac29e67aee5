"""Sweeps: one setting varied, the others fixed (Figs. 4 and 5 of the paper, and more).

Depth (Fig. 3) is not a setting of a drafter: evaluate several drafters instead.
"""

from __future__ import annotations

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
