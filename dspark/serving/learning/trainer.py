"""Trainer process of a learning server: `python -m dspark.serving.learning.trainer DIRECTORY`.

It runs at the lowest priority on one thread, for at most a given share of that thread's time. It
reads what the server has written and records in state.json which drafter is to serve. It can be
killed at any time: work that is not recorded yet is done again.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dspark.data.files.atomic import only_run
from dspark.errors import DataError, DSparkError, TrainingError
from dspark.request import Verifier
from dspark.scheduling.calibration import Rounds, TemperatureClass, assess
from dspark.scheduling.calibration_file import FILE_NAME, Calibration, calibrate
from dspark.serving.learning.directory import LearningDirectory, read_rounds

if TYPE_CHECKING:
    from dspark.drafters.dspark import DSparkDrafter
    from dspark.serving.learning.training import DrafterTraining

GAIN = 1.01
"""A drafter replaces the one that serves at this multiple of its accepted length."""
PAUSE_S = 1.0
FRESH_ROUND_FILES = 2
FRESH_HELD_OUT = 8
MOST_ROUNDS, FEWEST_ROUNDS = 4096, 400  # that a calibration is refreshed from
_logger = logging.getLogger(__name__)


class Orphaned(BaseException):
    """The server has ended."""


class Trainer:
    """Calibrates and trains, one piece of work at a time.

    Args:
        directory: of the server.
        parent: process id of the server; None for a trainer that is driven by calls of `advance`.
    """

    def __init__(self, directory: LearningDirectory, parent: int | None = None) -> None:
        plan = directory.plan()
        if plan is None:
            raise DataError(f"{directory.path} has no plan.json; start a server with --learn.")
        self.directory, self.plan = directory, plan
        self.state = directory.state()
        self._parent = parent
        self._drafters: dict[int, DSparkDrafter] = {}
        self._training: DrafterTraining | None = None
        self._rounds_read = -FRESH_ROUND_FILES
        self._trained_on: set[bytes] = set()
        self._judged_on: set[bytes] = set()
        self._worked_s = time.process_time()

    def run(self) -> None:
        """Work until the server ends."""
        while True:
            self.pulse()
            try:
                busy = self.advance()
            except (DataError, OSError) as error:  # samples were dropped meanwhile, for example
                _logger.warning("%s", error)
                busy = False
            if not busy:
                time.sleep(PAUSE_S)

    def pulse(self) -> None:
        """Rest after work so as to keep to the share of time; ends once the server has ended.

        A trainer that is driven by calls never rests.

        Raises:
            Orphaned: the server has ended.
        """
        if self._parent is None:
            return
        now_s = time.process_time()
        rest_s = (now_s - self._worked_s) * (1 / self.plan.share - 1)
        self._worked_s = now_s
        until_s = time.monotonic() + rest_s
        while os.getppid() == self._parent:
            left_s = until_s - time.monotonic()
            if left_s <= 0:
                return
            time.sleep(min(left_s, PAUSE_S))
        raise Orphaned

    def advance(self) -> bool:
        """Do one piece of work and record it in state.json; returns whether there was any.

        Raises:
            DataError: what is to be read is damaged, or has just been dropped.
        """
        if self.calibrate():
            return True
        return self.plan.mode == "drafter" and (self.look_back() or self.train())

    def calibrate(self) -> bool:
        """Refresh the calibration of the drafter that serves, where there are new rounds."""
        newest = self.directory.newest_rounds()
        if newest < self._rounds_read + FRESH_ROUND_FILES:
            return False
        self._rounds_read, generation = newest, self.state.generation
        path = self.directory.drafter(generation) / FILE_NAME
        known = Calibration.load(path) if path.is_file() else Calibration()
        better, rounds = refreshed(known, read_rounds(self.directory, generation, MOST_ROUNDS))
        if not rounds:
            return False
        better.save(path)
        self._say(
            revision=self.state.revision + 1,
            calibrations=self.state.calibrations + 1,
            calibration_rounds=rounds,
        )
        return True

    def look_back(self) -> bool:
        """Roll back to the previous drafter if it does better on new held-out samples."""
        state, held_out = self.state, set(self._samples(self.directory.held_out))
        if state.previous < 0 or len(held_out - self._judged_on) < FRESH_HELD_OUT:
            return False
        self._judged_on = held_out
        training = self._at_work()
        now = training.length(self._drafter(state.generation))
        before = training.length(self._drafter(state.previous))
        if before <= GAIN * now:
            self._say(held_out_length=now, held_out_before=before)
            return False
        self._say(
            generation=state.previous,
            previous=-1,
            rollbacks=state.rollbacks + 1,
            held_out_length=before,
            held_out_before=now,
        )
        return True

    def train(self) -> bool:
        """Train a candidate, and let it serve if it does better on held-out samples."""
        samples, held_out = map(self._samples, (self.directory.train, self.directory.held_out))
        fresh = set(samples) - self._trained_on
        tokens = sum(samples[key] for key in fresh)
        if tokens < self.plan.fresh_tokens or len(held_out) < FRESH_HELD_OUT:
            return False
        state, training = self.state, self._at_work()
        serving = self._drafter(state.generation)
        self._trained_on = set(samples)
        try:
            candidate = training.train(serving, seed=state.newest + state.rejected + 1)
        except TrainingError as error:
            _logger.warning("%s", error)
            self._say(rejected=state.rejected + 1)
            return True
        before, after = training.length(serving), training.length(candidate)
        steps = state.steps + self.plan.steps
        if after < GAIN * before:
            self._say(steps=steps, rejected=state.rejected + 1, held_out_length=before)
            return True
        number = state.newest + 1
        self._put(candidate, number)
        self._judged_on = set(held_out)
        self._say(
            generation=number,
            newest=number,
            previous=state.generation,
            steps=steps,
            held_out_length=after,
            held_out_before=before,
        )
        return True

    def _put(self, candidate: DSparkDrafter, number: int) -> None:
        """Write a drafter with its predecessor's calibration, and delete obsolete drafters."""
        from dspark.serving.learning.training import write_drafter

        generation = self.state.generation
        old = self.directory.drafter(generation) / FILE_NAME
        calibration = Calibration.load(old) if old.is_file() else None
        write_drafter(candidate, calibration, self.directory.drafter(number))
        self._drafters = {generation: self._drafter(generation), number: candidate}
        for other in self.directory.drafter(0).parent.glob("[0-9]*"):
            if int(other.name) not in (0, generation, number):
                shutil.rmtree(other, ignore_errors=True)

    def _drafter(self, generation: int) -> DSparkDrafter:
        if generation not in self._drafters:
            self._drafters[generation] = self._at_work().load(self.directory.drafter(generation))
        return self._drafters[generation]

    def _at_work(self) -> DrafterTraining:
        if self._training is None:
            from dspark.serving.learning.training import DrafterTraining

            where = self.directory.train, self.directory.held_out
            self._training = DrafterTraining(self.plan, *where, pulse=self.pulse)
        return self._training

    @staticmethod
    def _samples(cache: Path) -> dict[bytes, int]:
        """Tokens of each sample of a cache."""
        from dspark.data.features.cache import FeatureCache

        return {record.key: record.num_tokens for record in FeatureCache(cache).records}

    def _say(self, **changes: int | float) -> None:
        self.state = replace(self.state, **changes)  # type: ignore[arg-type]
        self.directory.write_state(self.state)


def refreshed(
    known: Calibration, recorded: Iterable[tuple[Verifier, TemperatureClass, Rounds]]
) -> tuple[Calibration, int]:
    """The calibration in use, its entries replaced by newly fitted ones where these are better.

    An entry is fitted to the older half of its rounds, and replaces the one in use where its mean
    calibration error on the newer half is lower.

    Args:
        known: the calibration in use.
        recorded: rounds of each verifier and temperature class, in the order they were recorded.

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
    """Rounds in which every draft was verified, which alone inform the block rule's calibration."""
    rows = np.flatnonzero(rounds.verified_N == rounds.logits_NK.shape[1])
    return Rounds(rounds.logits_NK[rows], rounds.accepted_N[rows], rounds.verified_N[rows])


def main(path: str) -> None:
    """Train for the server that has started this process."""
    os.nice(19)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    directory, parent = LearningDirectory(Path(path)), os.getppid()
    try:
        with only_run(directory.path / "trainer"):
            trainer = Trainer(directory, parent)
            if trainer.plan.mode == "drafter":
                import torch

                torch.set_num_threads(1)
            trainer.run()
    except DSparkError as error:
        raise SystemExit(str(error)) from error
    except Orphaned:
        return


if __name__ == "__main__":
    main(sys.argv[1])
