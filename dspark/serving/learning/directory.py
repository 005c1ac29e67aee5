"""Directory of a learning server: what server and trainer tell each other, in files.

    plan.json                what the trainer is to do; by the server, at each start
    state.json               which drafter is to serve, and how learning goes; by the trainer
    rounds-NNNNNN.npz        outcomes of rounds, the latest files; by the server
    train/, held_out/        feature caches of samples, rings of segments; by the server
    drafters/NNNN/           a drafter and its calibration.json; 0000 is the one it began with

Token ids can be read as text, so that the directory is for its owner alone. No torch here: a
trainer of the calibration alone is a small process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from dspark.errors import DataError
from dspark.request import VERIFIERS, Verifier
from dspark.scheduling.calibration import Rounds, TemperatureClass
from dspark.scheduling.json_files import read_json, write_json

VERSION = 1
LearnMode = Literal["calibration", "drafter"]
KINDS: tuple[TemperatureClass, ...] = ("greedy", "sampled")
MOST_ROUND_FILES = 128
DEFAULT_SHARE = 0.25
_REMEDY = "give another --learn-dir, or delete this one"
T = TypeVar("T", "Plan", "State")


@dataclass(frozen=True)
class Plan:
    """What the trainer is to do.

    Attributes:
        mode: calibration, or drafter, which learns both.
        target: its directory or name.
        target_fingerprint: of its weights.
        drafter_fingerprint: of the drafter that learning began with.
        dtype: of the target's computation.
        num_drafts: drafts per round at most, K.
        max_length: tokens of a sample at most.
        steps: training steps before a candidate is judged.
        rows: samples per step.
        anchors: blocks per sample at most.
        fresh_tokens: tokens of samples not trained on yet that begin another training.
        learning_rate: AdamW's, for all but the layers' matrices.
        matrix_learning_rate: Muon's, for these.
        share: of one core's time that training may take.
    """

    mode: LearnMode
    target: str
    target_fingerprint: str
    drafter_fingerprint: str
    dtype: str
    num_drafts: int
    max_length: int
    steps: int = 60
    rows: int = 8
    anchors: int = 32
    fresh_tokens: int = 4096
    learning_rate: float = 1e-3
    matrix_learning_rate: float = 2e-3
    share: float = DEFAULT_SHARE


@dataclass(frozen=True)
class State:
    """How learning goes.

    Attributes:
        generation: number of the drafter that is to serve; 0 is the one that learning began with.
        revision: how often its calibration has changed.
        newest: largest number of a drafter so far.
        previous: number of the drafter to go back to where held-out acceptance falls; -1 for none.
        steps: training steps in all.
        rejected: candidates that did not gain enough on held-out samples.
        rollbacks: drafters taken back.
        calibrations: calibrations that were put to use.
        calibration_rounds: rounds that the latest was fitted and judged on.
        held_out_length: accepted length of the serving drafter on held-out samples, by the laws of
            both models along the target's own text; 0 where it is unknown.
        held_out_before: that of the drafter before it, on the same samples.
    """

    generation: int = 0
    revision: int = 0
    newest: int = 0
    previous: int = -1
    steps: int = 0
    rejected: int = 0
    rollbacks: int = 0
    calibrations: int = 0
    calibration_rounds: int = 0
    held_out_length: float = 0.0
    held_out_before: float = 0.0

    @property
    def serves(self) -> tuple[int, int]:
        """What tells one thing that serves from another."""
        return self.generation, self.revision


@dataclass(frozen=True)
class LearningDirectory:
    """Names of its files, and what they hold."""

    path: Path

    def create(self) -> None:
        """Make it, for its owner alone.

        Raises:
            DataError: it cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            os.chmod(self.path, 0o700)
        except OSError as error:
            raise DataError(
                f"{self.path} cannot be made ({error.strerror}); give another --learn-dir."
            ) from error

    @property
    def train(self) -> Path:
        """Feature cache of the samples to learn from."""
        return self.path / "train"

    @property
    def held_out(self) -> Path:
        """Feature cache of the samples to judge by."""
        return self.path / "held_out"

    def drafter(self, generation: int) -> Path:
        """A drafter's directory."""
        return self.path / "drafters" / f"{generation:04d}"

    def plan(self) -> Plan | None:
        """What the trainer is to do; None before the first start.

        Raises:
            DataError: the file is damaged.
        """
        return _read(self.path / "plan.json", Plan)

    def write_plan(self, plan: Plan) -> None:
        """Tell the trainer what to do."""
        write_json(self.path / "plan.json", {"version": VERSION, **asdict(plan)})

    def state(self) -> State:
        """How learning goes; as at the beginning where nobody has said.

        Raises:
            DataError: the file is damaged.
        """
        return _read(self.path / "state.json", State) or State()

    def write_state(self, state: State) -> None:
        """Tell the server how learning goes."""
        write_json(self.path / "state.json", {"version": VERSION, **asdict(state)})

    def round_files(self) -> list[Path]:
        """Files of rounds, the oldest first."""
        return sorted(self.path.glob("rounds-*.npz"))

    def newest_rounds(self) -> int:
        """Number of the newest file of rounds; -1 where there is none."""
        files = self.round_files()
        return int(files[-1].stem.removeprefix("rounds-")) if files else -1

    def append_rounds(self, outcomes: Sequence[Outcome]) -> None:
        """Write rounds to a file of their own, and delete the oldest files beyond a number.

        Raises:
            OSError: it cannot be written.
        """
        files = self.round_files()
        path = self.path / f"rounds-{self.newest_rounds() + 1:06d}.npz"
        fresh = path.with_suffix(".part")
        with fresh.open("wb") as file:
            np.savez(
                file,
                logits=np.array([each.logits_K for each in outcomes], dtype=np.float32),
                counts=np.array([each.numbers() for each in outcomes], dtype=np.int32),
            )
        fresh.replace(path)
        for old in files[: max(len(files) + 1 - MOST_ROUND_FILES, 0)]:
            old.unlink(missing_ok=True)


@dataclass(frozen=True)
class Outcome:
    """What became of one round's drafts.

    Attributes:
        logits_K: raw confidence logits.
        accepted: drafts that stayed.
        verified: drafts that were verified.
        verifier: that judged them.
        kind: temperature class of the request.
        generation: the drafter that made them.
    """

    logits_K: npt.NDArray[np.float64]
    accepted: int
    verified: int
    verifier: Verifier
    kind: TemperatureClass
    generation: int

    def numbers(self) -> tuple[int, ...]:
        """All but the logits."""
        entry = VERIFIERS.index(self.verifier) * len(KINDS) + KINDS.index(self.kind)
        return self.accepted, self.verified, entry, self.generation


def read_rounds(
    directory: LearningDirectory, generation: int, most: int
) -> Iterator[tuple[Verifier, TemperatureClass, Rounds]]:
    """The latest rounds of a drafter, in their order, for each verifier and temperature class.

    Args:
        directory: where they are.
        generation: of the drafter.
        most: rounds of each at most.
    """
    loaded = (_load(path) for path in directory.round_files())
    found = [pair for pair in loaded if pair is not None]
    if not found:
        return
    logits_NK = np.concatenate([logits for logits, _ in found]).astype(np.float64)
    accepted, verified, entry, made_by = np.concatenate([counts for _, counts in found]).T
    for number in range(len(VERIFIERS) * len(KINDS)):
        rows = np.flatnonzero((entry == number) & (made_by == generation))[-most:]
        if rows.size:
            verifier, kind = divmod(number, len(KINDS))
            yield (
                VERIFIERS[verifier],
                KINDS[kind],
                Rounds.of(logits_NK[rows], accepted[rows], verified[rows]),
            )


def _load(path: Path) -> tuple[Any, Any] | None:
    """A file of rounds; None where the server has just deleted it, or could not finish it."""
    try:
        with np.load(path) as file:
            return file["logits"], file["counts"]
    except (OSError, ValueError, KeyError):
        return None


def _read(path: Path, kind: type[T]) -> T | None:
    if not path.is_file():
        return None
    record = read_json(path, VERSION, _REMEDY)
    del record["version"]
    known = {field.name for field in fields(kind)}
    needed = {field.name for field in fields(kind) if field.default is MISSING}
    if not needed <= set(record) <= known:
        raise DataError(f"{path} has the keys {sorted(record)}; {_REMEDY}.")
    return kind(**record)
