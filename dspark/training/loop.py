"""The training loop: any objective, exact resume, one gradient for the whole step.

Everything random in a part of a step is a function of (seed, step, part), and a batch is a function
of its step, so a run that is interrupted and resumed computes what the uninterrupted one would
have.

A step is divided into parts, `accumulate` of them sequential on each rank. Its gradient is the mean
of theirs; an objective ensures that the mean of the parts' losses is the loss of the whole step,
however unevenly its supervised tokens are distributed.
"""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from dspark.errors import TrainingError
from dspark.training.checkpoints import (
    Position,
    check_same_run,
    load,
    path_of,
    read_position,
    save,
    saved_steps,
    tidy,
)
from dspark.training.objective import (
    DataOrder,
    Evaluation,
    Objective,
    TrainingResult,
    peak_memory_bytes,
    total_steps,
)
from dspark.training.optim import MasterOptimiser
from dspark.training.parallel import (
    World,
    barrier,
    gather,
    reduce_after_this_part,
    shard,
    showing,
    sum_numbers,
    sum_over_ranks,
)
from dspark.training.progress import Pace, RunLog, StopSignals
from dspark.training.settings import OptimiserSettings, RunSettings


class Training:
    """A run: an objective, its optimiser and their progress.

    Args:
        objective: module and loss to train.
        run: length and checkpoints of the run.
        settings: the optimiser's settings.
        data: size and naming of the data.
        world: the processes that share the run.

    Attributes:
        steps: optimiser steps of the whole run.
        position: progress of the run.
        optimiser: updates the objective's parameters.
    """

    def __init__(
        self,
        objective: Objective,
        run: RunSettings,
        settings: OptimiserSettings,
        data: DataOrder,
        world: World,
    ) -> None:
        self.objective, self.run, self.data, self.world = objective, run, data, world
        self.steps = total_steps(run, data.steps_per_epoch)
        self.output = Path(run.output_dir)
        self._step = _PartOfStep(objective)
        if self.world.sharded:
            shard(self._step, next(objective.module.parameters()).dtype)
        named = objective.module.named_parameters()
        self.optimiser = MasterOptimiser(named, settings, self.steps)
        self._fixed: dict[str, Any] = {
            "run.steps": self.steps,
            "run.rows": run.rows,
            "run.seed": run.seed,
            "optimiser.name": settings.name,
            "optimiser.ema": settings.ema,
        }
        self.position = Position(0, self._fixed)

    def start(self, resume: bool) -> None:
        """Restore the newest checkpoint, if there is one.

        Args:
            resume: whether one may exist.

        Raises:
            TrainingError: the output directory holds a checkpoint although `resume` is false, or
                one of a run with other settings.
            CheckpointError: the checkpoint is damaged.
        """
        if not saved_steps(self.output):
            return
        if not resume:
            raise TrainingError(
                f"{self.output} already holds a run; give --resume to go on with it, or another "
                "output_dir."
            )
        position = read_position(self.output)
        check_same_run(self.output, position, self._fixed)
        load(self.output, self.optimiser)
        if self.world.rank == 0:
            tidy(self.output, self.run.keep_last)
        barrier()
        self.position = position

    def go(
        self,
        *,
        console: Console | None = None,
        evaluation: Evaluation | None = None,
        pace: Pace | None = None,
    ) -> TrainingResult:
        """Take the remaining steps and export the weights.

        Args:
            console: of the progress display; standard error by default.
            evaluation: periodic measurement.
            pace: adjusts the number of steps to a time budget; for one process.

        Raises:
            TrainingError: the loss is not finite; a checkpoint cannot be written; or the run was
                stopped by SIGTERM or SIGINT.
        """
        log = RunLog(
            self.output,
            self.position.step,
            self.steps,
            console or Console(stderr=True),
            active=self.world.rank == 0,
            tensorboard=self.run.tensorboard,
        )
        started = time.perf_counter()
        self.objective.tokens_seen = 0
        if pace is not None:
            pace.begin(self.position.step, self.steps)
        with StopSignals() as signals, log:
            while self.position.step < self.steps:
                stopping = self._advance(signals, evaluation)
                if pace is not None:
                    self._change_steps(pace.steps(self.position.step, self.steps), log)
                step, metrics = self.position.step, self.position.metrics
                log.show(step, metrics, self._tokens_per_s(started))
                measured = "real_accepted_length" in metrics
                if measured or stopping or self._is_due(step, self.run.log_every):
                    log.write(step, metrics)
                if stopping or self._is_due(step, self.run.save_every):
                    self._save()
                if stopping and step < self.steps:
                    raise TrainingError(self._stopped(step, signals.received))
            speed = self._tokens_per_s(started)
        with self.shown():
            if self.world.rank == 0:
                self.objective.export(self.output)
        barrier()
        return TrainingResult(
            steps=self.steps,
            loss=self.position.metrics.get("loss", math.nan),
            metrics=dict(self.position.metrics),
            tokens_per_s=speed,
            peak_memory_bytes=peak_memory_bytes(),
            output_dir=self.output,
        )

    def gradients(self, step: int) -> tuple[dict[str, float], list[tuple[int, float]]]:
        """Accumulate the mean gradient of this rank's parts of a step.

        Returns:
            The means of the parts' metrics, including the loss, and each part's number and loss.
        """
        accumulate = self.run.accumulate
        parts = self.world.ranks * accumulate
        own = range(self.world.rank * accumulate, (self.world.rank + 1) * accumulate)
        means: dict[str, float] = {}
        losses = list[tuple[int, float]]()
        for part in own:
            reduce_after_this_part(self._step, part == own[-1])
            torch.manual_seed(_part_seed(self.run.seed, step, part))
            loss, metrics = self._step(step, part, parts)
            (loss / accumulate).backward()
            self.optimiser.collect()
            losses.append((part, float(loss.detach())))
            for name, number in {"loss": losses[-1][1], **metrics}.items():
                means[name] = means.get(name, 0.0) + number / accumulate
        return means, losses

    def shown(self) -> AbstractContextManager[None]:
        """Context in which the module has the weights to evaluate or export; for all ranks."""
        if self.world.sharded or self.optimiser.averages is not None:
            return showing(self.objective.module, self.optimiser.shown())
        return nullcontext()

    def _advance(self, signals: StopSignals, evaluation: Evaluation | None) -> bool:
        """Take a step and measure where that is due; returns whether any rank is to stop."""
        metrics, stopping = self._take_step(self.position.step, signals)
        self.position = replace(self.position, step=self.position.step + 1, metrics=metrics)
        if evaluation is not None and self._is_due(self.position.step, evaluation.every):
            self._evaluate(evaluation)
        return stopping

    def _take_step(self, step: int, signals: StopSignals) -> tuple[dict[str, float], bool]:
        """Take an optimiser step; returns its metrics, and whether any rank is to stop."""
        ranks = self.world.ranks
        means, losses = self.gradients(step)
        sums = sum_numbers({**means, "stopping": float(signals.received is not None)})
        stopping = sums.pop("stopping") > 0
        metrics = {name: value / ranks for name, value in sums.items()}
        if not math.isfinite(metrics["loss"]):
            raise TrainingError(self._not_finite(step, losses))
        if not self.world.sharded:  # FSDP has averaged over ranks already
            sum_over_ranks(self.optimiser.gradients())
        norm = self.optimiser.clip(1.0 if self.world.sharded else 1 / ranks)
        if not math.isfinite(norm):
            raise TrainingError(
                f"Step {step} gave a gradient norm of {norm} at a loss of {metrics['loss']:.4g}; "
                f"{self._remedy()}"
            )
        rate = self.optimiser.step(step)
        return metrics | {"learning_rate": rate, "gradient_norm": norm}, stopping

    def _evaluate(self, evaluation: Evaluation) -> None:
        best = self.position.best_accepted_length
        with self.shown():
            measured = dict(evaluation.measure())
            length = measured["real_accepted_length"]
            better = best is None or length > best
            if better and self.world.rank == 0:
                evaluation.keep()
        barrier()
        metrics = {**self.position.metrics, **measured}
        self.position = replace(self.position, metrics=metrics)
        if better:
            self.position = replace(
                self.position, best_step=self.position.step, best_accepted_length=length
            )

    def _change_steps(self, steps: int, log: RunLog) -> None:
        """Change the number of steps, and save it so that a resumed run keeps it."""
        if steps == self.steps:
            return
        self.steps = self.optimiser.steps = steps
        self._fixed["run.steps"] = steps
        self.position = replace(self.position, fixed=dict(self._fixed))
        log.plan(steps)
        self._save()

    def _is_due(self, step: int, every: int) -> bool:
        return step % every == 0 or step == self.steps

    def _save(self) -> None:
        keep, rank = self.run.keep_last, self.world.rank
        save(self.output, self.optimiser, self.position, keep_last=keep, rank=rank)

    def _tokens_per_s(self, started: float) -> float:
        # The ranks' shares are alike.
        return self.objective.tokens_seen * self.world.ranks / (time.perf_counter() - started)

    def _not_finite(self, step: int, losses: list[tuple[int, float]]) -> str:
        parts = self.world.ranks * self.run.accumulate
        bad = [
            f"rank {self.world.rank}, part {part} ({self.data.names(step, part, parts)}): {loss}"
            for part, loss in losses
            if not math.isfinite(loss)
        ]
        found = "; ".join(each for of_rank in gather(bad) for each in of_rank)
        return f"Step {step} gave a loss that is not finite, in {found}; {self._remedy()}"

    def _remedy(self) -> str:
        saved = saved_steps(self.output)
        if not saved:
            return "there is no checkpoint before it: lower the learning rate and start again."
        return (
            f"the checkpoint before it is {path_of(self.output, saved[-1])}: lower the learning "
            "rate, or leave these data out, and go on from there with --resume."
        )

    def _stopped(self, step: int, signal: str | None) -> str:
        return (
            f"Stopped by {signal or 'a signal to another rank'} after step {step} of {self.steps}, "
            f"which is saved in {path_of(self.output, step)}; go on with --resume."
        )


class _PartOfStep(nn.Module):
    """A part of a training step as one module's forward, as FSDP requires."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.trained = objective.module
        self._objective = objective

    def forward(self, step: int, part: int, parts: int) -> tuple[Tensor, dict[str, float]]:
        return self._objective.loss(step, part, parts)


def _part_seed(seed: int, step: int, part: int) -> int:
    """Seed of torch's global generator for a part of a step."""
    return hash((seed, step, part)) % (1 << 63)
