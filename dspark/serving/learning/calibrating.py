"""Refreshing a calibration from the rounds that a server has recorded."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from dspark.errors import DataError
from dspark.request import Verifier
from dspark.scheduling.calibration import Rounds, TemperatureClass, assess
from dspark.scheduling.calibration_file import Calibration, calibrate

MOST_ROUNDS = 4096
FEWEST_ROUNDS = 400


def refreshed(
    known: Calibration, recorded: Iterable[tuple[Verifier, TemperatureClass, Rounds]]
) -> tuple[Calibration, int]:
    """A calibration whose entries are fitted anew where that is better.

    Each is fitted to the older half of its rounds, and put to use where it has a lower mean
    calibration error on the newer half than what is in use.

    Args:
        known: what is in use.
        recorded: rounds of each verifier and temperature class, in their order.

    Returns:
        The calibration, and the number of rounds of the entries that have changed: 0 for none.
    """
    changed = 0
    for verifier, kind, rounds in recorded:
        if verifier == "block":
            rounds = _whole(rounds)  # noqa: PLW2901
        if len(rounds.accepted_N) < FEWEST_ROUNDS:
            continue
        older, newer = rounds.halves()
        try:
            entry = calibrate(older, verifier, kind, newer)
        except DataError:  # a position was hardly ever observed
            continue
        at_work = next((each for each in known.entries if each.key == entry.key), None)
        before = entry.before if at_work is None else assess(newer, verifier, at_work.scaling)
        errors = [np.mean([each.ece for each in found]) for found in (before, entry.after)]
        if errors[1] < errors[0]:
            known = known.with_entry(entry)
            changed += len(rounds.accepted_N)
    return known, changed


def _whole(rounds: Rounds) -> Rounds:
    """Rounds in which every draft was verified: those of which the block rule tells anything."""
    rows = np.flatnonzero(rounds.verified_N == rounds.logits_NK.shape[1])
    return Rounds(rounds.logits_NK[rows], rounds.accepted_N[rows], rounds.verified_N[rows])
