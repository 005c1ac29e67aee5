"""What a training loop is given and gives: objective, order of the data, evaluation, result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from dspark.training.settings import RunSettings


class Objective(Protocol):
    """A module to train and the loss of a step's batch.

    Attributes:
        module: its parameters are updated by the optimiser.
        tokens_seen: sequence tokens that this rank has read so far.
    """

    module: nn.Module
    tokens_seen: int

    def loss(self, step: int, part: int, parts: int) -> tuple[Tensor, dict[str, float]]:
        """The loss of one of the `parts` of the step's batch, and metrics for the log.

        The mean over the parts is the loss of the step. All parts log the same names.
        """
        ...

    def export(self, directory: Path) -> None:
        """Write the trained weights as a checkpoint that the rest of the project loads."""
        ...


Measure = Callable[[], Mapping[str, float]]
"""Measures the module; the best one has the highest `real_accepted_length`."""


@dataclass(frozen=True)
class DataOrder:
    """Size and naming of a run's data.

    Attributes:
        steps_per_epoch: steps per pass over the data.
        tokens_per_step: mean sequence tokens per step, over all ranks.
        names: describes the data of (step, part, parts) for messages.
    """

    steps_per_epoch: float
    tokens_per_step: float
    names: Callable[[int, int, int], str]


@dataclass(frozen=True)
class Evaluation:
    """A periodic measurement during a run.

    Attributes:
        every: steps between measurements.
        measure: measures the module; called on all ranks, with equal results.
        keep: writes the module as the best so far; called on the first rank.
    """

    every: int
    measure: Measure
    keep: Callable[[], None]


@dataclass(frozen=True)
class TrainingResult:
    """Result of a run.

    Attributes:
        steps: steps done in all, including those before a resume.
        loss: loss of the last step.
        metrics: its metrics.
        tokens_per_s: sequence tokens per second since the start or resume, over all ranks.
        peak_memory_bytes: peak resident memory (CPU) or allocation (CUDA) of this process.
        output_dir: directory of the exported weights.
    """

    steps: int
    loss: float
    metrics: dict[str, float]
    tokens_per_s: float
    peak_memory_bytes: int
    output_dir: Path


def total_steps(run: RunSettings, steps_per_epoch: float) -> int:
    """Steps of a whole run."""
    if run.steps is not None:
        return run.steps
    assert run.epochs is not None
    return max(1, int(run.epochs * steps_per_epoch))


def peak_memory_bytes() -> int:
    """Peak resident memory (CPU) or allocation (CUDA) of this process so far."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
