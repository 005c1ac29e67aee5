"""What the loop is told and what it gives: an objective, its data, its processes, the result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn


class Objective(Protocol):
    """What is trained: a module, and the loss of a step's batch.

    Attributes:
        module: whose parameters the optimiser steps.
        tokens_seen: tokens of the sequences that this rank's steps have read so far.
    """

    module: nn.Module
    tokens_seen: int

    def loss(self, step: int, part: int, parts: int) -> tuple[Tensor, dict[str, float]]:
        """The loss of one of the `parts` of the step's batch, and numbers worth logging.

        The mean over the parts is the loss of the step. All parts log the same names.
        """
        ...

    def export(self, directory: Path) -> None:
        """Write the trained weights as a checkpoint that the rest of the project loads."""
        ...


Measure = Callable[[], Mapping[str, float]]
"""Measures a module as it stands; the best one has the highest `real_accepted_length`."""


@dataclass(frozen=True)
class World:
    """The processes of a run.

    Attributes:
        rank: of this one.
        ranks: how many there are.
        sharded: whether they share masters, gradients and optimiser, or only the data.
    """

    rank: int = 0
    ranks: int = 1
    sharded: bool = False


@dataclass(frozen=True)
class DataOrder:
    """What a run knows of its data.

    Attributes:
        steps_per_epoch: steps in which they are seen once.
        tokens_per_step: tokens of sequences in a step, over all ranks, on average.
        names: says to people which data a part reads: (step, part, parts).
    """

    steps_per_epoch: float
    tokens_per_step: float
    names: Callable[[int, int, int], str]


@dataclass(frozen=True)
class Evaluation:
    """What is measured while a run goes on.

    Attributes:
        every: steps between measurements.
        measure: measures the module; called on all ranks, agrees on all.
        keep: writes the module as the best so far; called on the first rank.
    """

    every: int
    measure: Measure
    keep: Callable[[], None]


@dataclass(frozen=True)
class TrainingResult:
    """How a run ended.

    Attributes:
        steps: steps done in all, earlier sittings included.
        loss: loss of the last step.
        metrics: its metrics.
        tokens_per_s: tokens of sequences per second of this sitting, over all ranks.
        peak_memory_bytes: the largest resident memory (CPU) or allocation (CUDA) of this process.
        output_dir: where the exported weights lie.
    """

    steps: int
    loss: float
    metrics: dict[str, float]
    tokens_per_s: float
    peak_memory_bytes: int
    output_dir: Path
