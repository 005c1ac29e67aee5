"""Learner of a server: writes what was gathered, keeps the trainer, and swaps in what it brings.

One thread writes and watches; a process trains (`trainer`). Swaps happen in the engine's thread,
between rounds. What goes wrong here ends learning, never serving.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Full, Queue

from dspark.data.features.manifest import Origin, sample_key, target_fingerprint
from dspark.data.files.atomic import only_run
from dspark.drafters.base import Drafter, Preparing
from dspark.drafters.dspark import DSparkDrafter
from dspark.drafters.eagle3 import Eagle3Drafter
from dspark.engine.engine import Engine
from dspark.engine.loading import load_draft
from dspark.engine.model import Model
from dspark.errors import DataError, DSparkError, UsageError
from dspark.evaluation.identity import draft_fingerprint
from dspark.scheduling.calibration_file import FILE_NAME, Calibration
from dspark.serving.learning.collector import Harvest, SampleRing, TrafficCollector
from dspark.serving.learning.directory import (
    DEFAULT_SHARE,
    LearningDirectory,
    LearnMode,
    Outcome,
    Plan,
    State,
)
from dspark.serving.learning.training import check_learnable, write_drafter
from dspark.sources.cache import cache_directory
from dspark.targets.target import Target
from dspark.training.optim import usual_learning_rate

DEFAULT_BYTES = 1 << 30
ROUNDS_PER_FILE = 256
_HELD_OUT_OF = 8
"""Of so many samples one is held out."""
_WAITING = 32
_WATCH_S = 1.0
_RESTART_S = 60.0
_logger = logging.getLogger(__name__)
Order = Callable[[Callable[[Engine], None]], None]
"""Have something done in the engine's thread, between rounds."""


@dataclass
class Progress:
    """How learning goes, for metrics.

    Attributes:
        state: of the trainer.
        samples: written since the start.
        tokens: of these.
        dropped: what requests brought that came too fast to be written.
        bytes: of samples on disk.
        swaps: drafters swapped in since the start, rollbacks included.
        trainer_failures: how often it has ended by itself.
    """

    state: State
    samples: int = 0
    tokens: int = 0
    dropped: int = 0
    bytes: int = 0
    swaps: int = 0
    trainer_failures: int = 0


def resume(
    model: Model, path: str | None, mode: LearnMode, share: float = DEFAULT_SHARE
) -> LearningDirectory:
    """Have a pair serve with what it has learned before; at the first start, begin.

    Args:
        model: gets the drafter and calibration that are to serve.
        path: the directory; None for one in the user's cache that belongs to this very pair.
        mode: what is to be learned.
        share: of one core's time that the trainer may take.

    Raises:
        UsageError: there is no drafter, or none of a kind that learns.
        DataError: the directory cannot be used, or is another pair's.
    """
    drafter = model.drafter
    if mode == "drafter":
        check_learnable(drafter)
    if not isinstance(drafter, DSparkDrafter | Eagle3Drafter):
        raise UsageError("--learn needs a drafter with weights; give one with --draft.")
    plan = Plan(
        mode=mode,
        target=model.target.name,
        target_fingerprint=target_fingerprint(model.target.name),
        drafter_fingerprint=draft_fingerprint(model),
        dtype=str(model.target.dtype).removeprefix("torch."),
        num_drafts=drafter.block_size,
        max_length=model.target.max_context,
        learning_rate=usual_learning_rate(model.target.hidden_size),
        matrix_learning_rate=2 * usual_learning_rate(model.target.hidden_size),
        share=share,
    )
    pair = f"{plan.target_fingerprint[:8]}-{plan.drafter_fingerprint[:8]}"
    place = cache_directory("learning") / pair if path is None else Path(path)
    directory = LearningDirectory(place)
    directory.create()
    found = directory.plan()
    for name in ("target_fingerprint", "drafter_fingerprint", "dtype"):
        if found is not None and getattr(found, name) != getattr(plan, name):
            raise UsageError(
                f"{place} was begun with another {name.partition('_')[0]}; give another "
                "--learn-dir, or delete this one."
            )
    directory.write_plan(plan)
    first = directory.drafter(0)
    if not first.is_dir():
        write_drafter(drafter, model.calibration, first)
    state = directory.state()
    served = directory.drafter(state.generation)
    if state.generation:
        learned = load_draft(model.target, served, draft_top_k=model.draft_top_k)
        model.drafter = learned.drafter
    if (served / FILE_NAME).is_file():
        model.calibration = Calibration.load(served / FILE_NAME)
    return directory


class Learner:
    """Learns from a service's traffic.

    Args:
        directory: from `resume`.
        engine: at work with the drafter that `resume` has left.
        draft_top_k: of the model.
        max_bytes: of samples on disk.
        trains: whether to start the trainer; a test or benchmark may drive one itself.

    Attributes:
        collector: for the engine's thread.
        progress: how learning goes.
    """

    def __init__(
        self,
        directory: LearningDirectory,
        engine: Engine,
        *,
        draft_top_k: int | None = None,
        max_bytes: int = DEFAULT_BYTES,
        trains: bool = True,
    ) -> None:
        plan = directory.plan()
        assert plan is not None, "resume has written it"
        assert engine.drafter is not None, "resume has seen to it"
        self.directory, self.plan = directory, plan
        self._target: Target = engine.target
        self._top_k, self._trains = draft_top_k, trains
        self.progress = Progress(directory.state())
        self._served = self.progress.state.serves
        self._brought: Queue[Harvest] = Queue(_WAITING)
        self._outcomes: list[Outcome] = []
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None
        self._trainer: subprocess.Popen[bytes] | None = None
        self._next_start_s = 0.0
        self._turns = 0
        self._lock: AbstractContextManager[None] = only_run(directory.path)
        self._lock.__enter__()
        self._rings = self._open_rings(engine.drafter, max_bytes)
        self.collector = TrafficCollector(
            engine.verifier,
            engine.num_drafts,
            max(engine.max_requests // 2, 1),
            self._take,
            features=plan.mode == "drafter",
        )
        self.collector.generation = self.progress.state.generation

    def _open_rings(self, drafter: Drafter, max_bytes: int) -> tuple[SampleRing, ...]:
        """The samples to learn from and those to judge by; none where outcomes are enough."""
        if self.plan.mode != "drafter":
            return ()
        origin = Origin(
            target=self.plan.target,
            target_fingerprint=self.plan.target_fingerprint,
            num_layers=self._target.num_layers,
            hidden_size=self._target.hidden_size,
            taps=tuple(drafter.taps),
            dtype=self.plan.dtype,
        )
        held_out = max_bytes // _HELD_OUT_OF
        sizes = {self.directory.train: max_bytes - held_out, self.directory.held_out: held_out}
        return tuple(
            SampleRing(place, origin, self.plan.max_length, size) for place, size in sizes.items()
        )

    def start(self, order: Order) -> None:
        """Begin; what is brought is swapped in by `order`."""
        self._thread = threading.Thread(
            target=self._work, args=(order,), name="dspark-learning", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Write what waits, and end the trainer."""
        self._ending.set()
        if self._thread is not None:
            self._thread.join()
        if self._trainer is not None:
            self._trainer.terminate()
            self._trainer.wait()
        for ring in self._rings:
            with contextlib.suppress(DataError):  # a full disk has been told of
                ring.close()
        self._lock.__exit__(None, None, None)

    def flush(self) -> None:
        """Wait until all that was brought is on disk, and what serves next has been ordered."""
        for _ in range(2):  # the turn at work may have begun before
            seen = self._turns
            while self._turns == seen and self._thread is not None and self._thread.is_alive():
                time.sleep(0.01)

    @property
    def trainer_pid(self) -> int | None:
        """Process id of the trainer; None where it does not run."""
        running = self._trainer is not None and self._trainer.poll() is None
        return self._trainer.pid if self._trainer is not None and running else None

    def sentence(self) -> str:
        """One line on what serves and what it was learned from."""
        state = self.progress.state
        words = [f"Learning ({self.plan.mode}): drafter {state.generation} serves"]
        if state.held_out_length:
            words.append(
                f"held-out accepted length {state.held_out_length:.2f} "
                f"(the one before: {state.held_out_before:.2f})"
            )
        words.append(f"{state.steps} steps, {state.rejected} candidates rejected")
        words.append(f"{state.rollbacks} rollbacks, {state.calibrations} calibrations")
        return ", ".join(words) + "."

    def _take(self, harvest: Harvest) -> None:
        """In the engine's thread: never wait."""
        try:
            self._brought.put_nowait(harvest)
        except Full:
            self.progress.dropped += 1

    # From here on: the learner's thread.

    def _work(self, order: Order) -> None:
        try:
            while not self._ending.is_set():
                self._write_waiting()
                self._keep_trainer()
                self._look(order)
                self._turns += 1
            self._write_waiting()
            self._write_outcomes()
        except Exception:
            _logger.exception("Learning has ended; the server goes on with what it has.")

    def _write_waiting(self) -> None:
        """Write what comes within a second."""
        until, wrote = time.monotonic() + _WATCH_S, False
        while not wrote or not self._brought.empty():
            left = until - time.monotonic()
            if left <= 0 or (self._ending.is_set() and self._brought.empty()):
                break
            try:
                harvest = self._brought.get(timeout=min(left, 0.2))
            except Empty:
                continue
            self._store(harvest)
            wrote = True
        if wrote:
            for ring in self._rings:
                ring.commit()
            self.progress.bytes = sum(ring.bytes for ring in self._rings)
        if len(self._outcomes) >= ROUNDS_PER_FILE:
            self._write_outcomes()

    def _store(self, harvest: Harvest) -> None:
        self._outcomes += harvest.outcomes
        if harvest.sample is None or not self._rings:
            return
        held_out = sample_key(harvest.sample)[0] % _HELD_OUT_OF == 0
        ring = self._rings[int(held_out)]
        if ring.add(harvest.sample, harvest.features_LF, harvest.hidden_LH):
            self.progress.samples += 1
            self.progress.tokens += len(harvest.sample.input_ids)

    def _write_outcomes(self) -> None:
        if self._outcomes:
            self.directory.append_rounds(self._outcomes)
            self._outcomes = []

    def _keep_trainer(self) -> None:
        """Start the trainer, and again after a while where it has ended."""
        if not self._trains or time.monotonic() < self._next_start_s:
            return
        if self._trainer is not None:
            if self._trainer.poll() is None:
                return
            self.progress.trainer_failures += 1
            _logger.warning(
                "The trainer has ended with status %d; %s says why.",
                self._trainer.returncode,
                self.directory.path / "trainer.log",
            )
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        with (self.directory.path / "trainer.log").open("wb") as log:
            self._trainer = subprocess.Popen(
                [sys.executable, "-m", "dspark.serving.learning.trainer", str(self.directory.path)],
                env=os.environ | threads,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._next_start_s = time.monotonic() + _RESTART_S

    def _look(self, order: Order) -> None:
        """Swap in what the trainer has brought."""
        state = self.directory.state()
        if state.serves == self._served:
            self.progress.state = state
            return
        place, before = self.directory.drafter(state.generation), self._served
        self._served = state.serves
        try:
            drafter = None
            if state.generation != before[0]:
                drafter = load_draft(self._target, place, draft_top_k=self._top_k).drafter
                if isinstance(drafter, Preparing):  # here, where no request waits for it
                    drafter.prepare()
            path = place / FILE_NAME
            calibration = Calibration.load(path) if path.is_file() else None
        except DSparkError as error:
            _logger.warning("What was learned cannot be read: %s", error)
            return
        self.progress.state = state
        order(lambda engine: self._swap(engine, state.generation, drafter, calibration))

    def _swap(
        self,
        engine: Engine,
        generation: int,
        drafter: Drafter | None,
        calibration: Calibration | None,
    ) -> None:
        """In the engine's thread, between rounds."""
        try:
            if drafter is not None:
                engine.replace_drafter(drafter)
                self.collector.generation = generation
                self.progress.swaps += 1
            if calibration is not None and engine.scheduler is not None:
                engine.scheduler.recalibrate(calibration)
        except Exception:  # whatever it is, the engine goes on with what it has
            _logger.exception("What was learned cannot serve.")
            return
        _logger.info("%s", self.sentence())
