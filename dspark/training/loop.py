"""The training loop: any objective, exact resume, atomic checkpoints, a log and a progress bar.

Everything random in a step is a function of (seed, step, rank), and a batch is a function of its
step, so a run that is cut and resumed computes what the uncut run would have.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from dspark.errors import TrainingError
from dspark.training.optim import MasterOptimiser
from dspark.training.parallel import average_over_ranks, barrier
from dspark.training.recipe import OptimiserSettings, RunSettings

LATEST = "latest"


class Objective(Protocol):
    """What is trained: a module, and the loss of a step's batch.

    Attributes:
        module: whose parameters the optimiser steps.
        tokens_seen: tokens of the sequences that this rank's steps have read so far.
    """

    module: nn.Module
    tokens_seen: int

    def loss(self, step: int, part: int, parts: int) -> tuple[Tensor, dict[str, float]]:
        """The loss of one of the `parts` of the step's batch, and numbers worth logging."""
        ...

    def export(self, directory: Path) -> None:
        """Write the trained weights as a checkpoint that the rest of the project loads."""
        ...


@dataclass(frozen=True)
class TrainingResult:
    """How a run ended.

    Attributes:
        steps: steps done in all, earlier sittings included.
        loss: mean loss of the last logged steps.
        metrics: the last logged metrics.
        tokens_per_s: tokens of sequences per second of this sitting, over all ranks.
        peak_memory_bytes: the largest resident memory (CPU) or allocation (CUDA).
        output_dir: where the exported weights lie.
    """

    steps: int
    loss: float
    metrics: dict[str, float]
    tokens_per_s: float
    peak_memory_bytes: int
    output_dir: Path


def train(
    objective: Objective,
    run: RunSettings,
    optimiser_settings: OptimiserSettings,
    *,
    rank: int = 0,
    ranks: int = 1,
    resume: bool = False,
    console: Console | None = None,
) -> TrainingResult:
    """Run the steps that are left and export the weights.

    Raises:
        TrainingError: the loss is not finite, or the output directory holds another run's
            checkpoint and `resume` is off.
    """
    output = Path(run.output_dir)
    optimiser = MasterOptimiser(objective.module.named_parameters(), optimiser_settings, run.steps)
    first = _resume_step(output, optimiser, run, resume)
    started = time.perf_counter()
    metrics: dict[str, float] = {}
    with _progress(run, first, console, rank) as (report, log):
        for step in range(first, run.steps):
            metrics = _gradients(objective, optimiser, run.accumulate, step, rank, ranks)
            average_over_ranks(optimiser.gradients())
            norm, rate = optimiser.step(step)
            _check_finite(metrics["loss"], norm, step, output)
            metrics |= {"learning_rate": rate, "gradient_norm": norm}
            report(step + 1, metrics)
            if (step + 1) % run.log_every == 0 or step + 1 == run.steps:
                log(step + 1, metrics)
            if (step + 1) % run.save_every == 0 and step + 1 < run.steps:
                _save(output, optimiser, step + 1, run, rank)
        seconds = time.perf_counter() - started
        _save(output, optimiser, run.steps, run, rank)
    if rank == 0:
        objective.export(output)
    barrier()
    done = objective.tokens_seen * ranks  # the ranks' shares are alike
    return TrainingResult(
        steps=run.steps,
        loss=metrics.get("loss", math.nan),
        metrics=metrics,
        tokens_per_s=done / seconds if done else 0.0,
        peak_memory_bytes=_peak_memory_bytes(),
        output_dir=output,
    )


def _gradients(
    objective: Objective,
    optimiser: MasterOptimiser,
    accumulate: int,
    step: int,
    rank: int,
    ranks: int,
) -> dict[str, float]:
    """Collect the mean gradient of this rank's parts of a step; the means of their metrics."""
    total: dict[str, float] = {}
    for part in range(rank * accumulate, (rank + 1) * accumulate):
        loss, metrics = objective.loss(step, part, ranks * accumulate)
        (loss / accumulate).backward()  # type: ignore[no-untyped-call]
        optimiser.collect()
        for name, value in {"loss": float(loss.detach()), **metrics}.items():
            total[name] = total.get(name, 0.0) + value / accumulate
    return total


def _check_finite(loss: float, norm: float, step: int, output: Path) -> None:
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise TrainingError(
            f"Step {step} gave a loss of {loss} and a gradient norm of {norm}; the checkpoint "
            f"before it is in {output / LATEST}: lower the learning rate and resume from there."
        )


def _resume_step(output: Path, optimiser: MasterOptimiser, run: RunSettings, resume: bool) -> int:
    path = output / LATEST / "state.pt"
    if not path.is_file():
        return 0
    if not resume:
        raise TrainingError(
            f"{output} already holds a run; give --resume to go on with it, or another output_dir."
        )
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    if state["steps"] != run.steps:
        raise TrainingError(
            f"The run in {output} was started for {state['steps']} steps, not {run.steps}; its "
            "learning-rate schedule depends on that, so resume it with the same number."
        )
    optimiser.load_state_dict(state["optimiser"])
    return int(state["step"])


def _save(output: Path, optimiser: MasterOptimiser, step: int, run: RunSettings, rank: int) -> None:
    """Write the checkpoint beside the last one, then swap: a crash leaves one of them whole."""
    if rank == 0:
        fresh, old = output / f"{LATEST}.new", output / f"{LATEST}.old"
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        torch.save(
            {"step": step, "steps": run.steps, "optimiser": optimiser.state_dict()},
            fresh / "state.pt",
        )
        shutil.rmtree(old, ignore_errors=True)
        if (output / LATEST).exists():
            os.replace(output / LATEST, old)
        os.replace(fresh, output / LATEST)
        shutil.rmtree(old, ignore_errors=True)
    barrier()


def _peak_memory_bytes() -> int:
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


Report = Callable[[int, dict[str, float]], None]


class _progress:
    """A progress bar with the time left, and a JSON-lines log beside the checkpoint."""

    def __init__(self, run: RunSettings, first: int, console: Console | None, rank: int) -> None:
        self._rank = rank
        self._path = Path(run.output_dir) / "log.jsonl"
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console or Console(stderr=True),
            disable=rank != 0,
        )
        self._task = self._bar.add_task("", total=run.steps, completed=first, note="")

    def __enter__(self) -> tuple[Report, Report]:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._bar.start()
        return self._report, self._log

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def _report(self, step: int, metrics: dict[str, float]) -> None:
        note = f"loss {metrics['loss']:.3f}"
        if "accepted_length" in metrics:
            note += f"  accepted length {metrics['accepted_length']:.2f}"
        self._bar.update(self._task, completed=step, note=note)

    def _log(self, step: int, metrics: dict[str, float]) -> None:
        if self._rank == 0:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **metrics}) + "\n")
