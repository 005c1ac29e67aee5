"""Acceptance profiles from what a user names: records of an evaluation, or tables of survivals."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dspark.errors import DataError, UsageError
from dspark.evaluation.metrics import RoundCounts
from dspark.evaluation.records import SUFFIX, Record, RunRecords, Turn, load_runs
from dspark.scheduling.calibration import TemperatureScaling
from dspark.simulation.acceptance import Acceptance, Stream, synthetic
from dspark.simulation.traffic import FloatArray, Traffic
from dspark.simulation.trees import first_children, trees_behind


def of_records(run: RunRecords, seed: int = 0) -> Acceptance:
    """The profile of an evaluation: its answers, round by round, calibrated as they were.

    Raises:
        UsageError: the evaluation drafted nothing, or did not verify whole blocks.
    """
    settings, drafter = run.settings, run.plan.drafter
    num_drafts = drafter.block_size
    if not num_drafts or settings.schedule != "fixed":
        raise UsageError(
            f"{run.path} was evaluated with the schedule {settings.schedule!r}, which hides what "
            "would have become of other drafts; evaluate a drafter with --schedule fixed."
        )
    turns = [turn for record in run.records.values() for turn in record.turns]
    turns = [turn for turn in turns if rounds_of(turn)]
    if any(turn.trees for turn in turns):  # an answer without room for a draft has none
        turns = [turn for turn in turns if turn.trees is not None]
    if not turns:
        raise UsageError(f"{run.path} has no rounds yet; run dspark eval again.")
    scaling = None
    if drafter.temperatures is not None:
        scaling = TemperatureScaling(drafter.temperatures, drafter.shifts)
    return of_turns(turns, num_drafts, scaling, f"{settings.drafter}, {len(turns)} answers", seed)


def of_turns(
    turns: Sequence[Turn],
    num_drafts: int,
    scaling: TemperatureScaling | None,
    source: str,
    seed: int = 0,
) -> Acceptance:
    """The profile of some answers, one stream each.

    Args:
        turns: of whole blocks, or of whole trees, that have rounds (`rounds_of`).
        num_drafts: K.
        scaling: calibrates their confidences; None takes them as they are.
        source: names them.
        seed: as `Acceptance.of`.
    """
    survival_K = RoundCounts.of([Record("", "", tuple(turns))], num_drafts).survival()
    before_K = np.concatenate(([1.0], survival_K[:-1]))
    mean_K = np.clip(survival_K / np.maximum(before_K, 1e-9), 1e-6, 1 - 1e-6)
    unknown_K = np.log(mean_K) - np.log1p(-mean_K)
    streams = [
        _stream(turn, unknown_K, scaling) if turn.trees is None else _tree_stream(turn, unknown_K)
        for turn in turns
    ]
    return Acceptance.of(streams, survival_K, source, seed)


def rounds_of(turn: Turn) -> int:
    """Rounds whose outcome is known: the last one's is not where the answer ended within it."""
    return len(turn.kept) - turn.cut


def _stream(turn: Turn, unknown_K: FloatArray, scaling: TemperatureScaling | None) -> Stream:
    count = rounds_of(turn)
    logits_NK = np.tile(unknown_K, (count, 1))
    for row, logits in zip(logits_NK, turn.logits or (), strict=False):
        known = np.array(logits[: len(row)], dtype=np.float64)
        if scaling is not None and len(known):
            chance = np.clip(scaling.apply(known[None])[0], 1e-300, 1 - 1e-16)
            known = np.log(chance) - np.log1p(-chance)
        row[: len(known)] = known
    return Stream(np.array(turn.kept[:count]), np.array(turn.verified[:count]), logits_NK)


def _tree_stream(turn: Turn, unknown_K: FloatArray) -> Stream:
    """An answer of trees. Chains beside them are the first children of each node.

    Their confidences are the survivals that trees grow by, as far down as the trees have them.
    """
    assert turn.trees is not None
    count = rounds_of(turn)
    rounds = turn.trees[:count]
    logits_NK = np.tile(unknown_K, (count, 1))
    for row, found in zip(logits_NK, rounds, strict=True):
        chain = first_children(found.parents)[: len(row)]
        survival = np.array([1.0, *(found.survival[node] for node in chain)])
        chance = np.clip(survival[1:] / np.maximum(survival[:-1], 1e-9), 1e-6, 1 - 1e-6)
        row[: len(chance)] = np.log(chance) - np.log1p(-chance)
    kept, tested = np.array(turn.kept[:count]), np.array(turn.verified[:count])
    return Stream(kept, tested, logits_NK, trees_behind(rounds, len(unknown_K)))


def read_acceptance(source: str, seed: int = 0) -> Acceptance:
    """A profile from what a user names.

    Args:
        source: survivals between commas; a JSON file with `survival`, and if wanted `between`,
            `within`, `persistence` and `sharpness` of `Traffic`; a file of records, or a folder
            with one, of `dspark eval`.
        seed: of all draws.

    Raises:
        DataError: the file is missing or damaged.
        UsageError: it says nothing usable.
    """
    path = Path(source)
    if path.is_dir():
        runs = [run for run in load_runs([path]) if run.plan.drafter.block_size]
        if len(runs) != 1:
            names = ", ".join(str(run.path) for run in runs)
            raise UsageError(f"{path} has {len(runs)} evaluations of drafters; name one: {names}.")
        return of_records(runs[0], seed)
    if source.endswith(SUFFIX) and path.is_file():
        return of_records(RunRecords.load(path), seed)
    if path.is_file():
        return _read_table(path, seed)
    try:
        return synthetic([float(part) for part in source.split(",")], seed=seed)
    except ValueError as error:
        raise DataError(
            f"{source} is neither a file, a folder of an evaluation, nor survivals like .8,.6,.5."
        ) from error


def _read_table(path: Path, seed: int) -> Acceptance:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        survival_K = [float(value) for value in found.pop("survival")]
        shape = {name: float(value) for name, value in found.items()}
        if not set(shape) <= {"between", "within", "persistence", "sharpness"}:
            raise ValueError(f"its keys are {sorted(found)}")
        traffic = Traffic(**shape)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"{path} is no table of survivals ({error}); give a JSON object with `survival`."
        ) from error
    return synthetic(survival_K, traffic, seed)
