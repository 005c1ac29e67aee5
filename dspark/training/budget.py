"""Cost of a run, reported before it starts: parameters, tokens, time, memory and disk."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dspark.errors import TrainingError
from dspark.training.checkpoints import saved_steps
from dspark.training.loop import Training
from dspark.training.objective import peak_memory_bytes
from dspark.training.optim import number_of

# Runs with fewer steps left are not probed: the probe takes two.
PROBED_FROM = 100
_FP32, _BF16 = 4, 2


@dataclass(frozen=True)
class Probe:
    """Measurement of one step without its update.

    Attributes:
        seconds: of the step without the optimiser.
        peak_memory_bytes: of this process so far.
    """

    seconds: float
    peak_memory_bytes: int


@dataclass(frozen=True)
class Budget:
    """Cost of a run.

    Attributes:
        parameters: number of trained parameters.
        steps: of the whole run.
        steps_left: remaining steps.
        tokens_per_step: mean sequence tokens per step, over all ranks.
        memory_bytes: per rank, by use; `measured` is the process's peak in a probe of the first
            step.
        checkpoint_bytes: of one checkpoint.
        disk_bytes: of all checkpoints kept at once and the exported weights.
        free_bytes: on the disk of the output directory.
        seconds_per_step: from the probe; None without one.
    """

    parameters: int
    steps: int
    steps_left: int
    tokens_per_step: float
    memory_bytes: Mapping[str, int]
    checkpoint_bytes: int
    disk_bytes: int
    free_bytes: int
    seconds_per_step: float | None = None

    @property
    def seconds(self) -> float | None:
        """Of the remaining steps."""
        return None if self.seconds_per_step is None else self.seconds_per_step * self.steps_left

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "seconds": self.seconds}

    def line(self) -> str:
        """One line for people."""
        uses = ", ".join(f"{name} {_size(size)}" for name, size in self.memory_bytes.items())
        disk = f"disk {_size(self.disk_bytes)} of {_size(self.free_bytes)} free"
        took = "time per step not probed"
        if self.seconds_per_step is not None and self.seconds is not None:
            took = f"{self.seconds_per_step:.3g} s per step, {_duration(self.seconds)} in all"
        return (
            f"Budget: {_count(self.parameters)} parameters to train; {self.steps_left:,} of "
            f"{self.steps:,} steps of {_count(self.tokens_per_step)} tokens, "
            f"{_count(self.tokens_per_step * self.steps_left)} in all; memory per process: {uses}; "
            f"{disk}; {took}."
        )


def probe(training: Training, step: int) -> Probe:
    """Time a step's gradients, computed twice and discarded."""
    training.gradients(step)
    training.optimiser.clear()
    started = time.perf_counter()
    training.gradients(step)
    seconds = time.perf_counter() - started
    training.optimiser.clear()
    return Probe(seconds, peak_memory_bytes())


def budget_of(
    training: Training,
    *,
    features_bytes: int,
    vocabulary_bytes: int,
    probed: Probe | None,
    steps_done: int,
) -> Budget:
    """The budget of a run.

    Args:
        training: prepared.
        features_bytes: of one part's target features.
        vocabulary_bytes: of one vocabulary chunk.
        probed: the probe, if there was one.
        steps_done: before this run.
    """
    run, settings, world = training.run, training.optimiser.settings, training.world
    count = number_of(training.optimiser.masters)
    own = count // world.ranks if world.sharded else count
    low = _BF16 if run.dtype == "bfloat16" else _FP32
    moments = 2 if settings.name == "adamw" else 1
    averages = 0 if settings.ema is None else 1
    memory = {
        "weights": count * low if low == _BF16 or world.sharded else 0,
        "masters": own * _FP32,
        "gradients": count * _FP32,
        "optimiser": own * _FP32 * moments,
        "average": own * _FP32 * averages,
        "features": features_bytes,
        "vocabulary": vocabulary_bytes,
    }
    if probed is not None:
        memory["measured"] = probed.peak_memory_bytes + memory["optimiser"]
    checkpoint = count * _FP32 * (1 + moments + averages)
    return Budget(
        parameters=count,
        steps=training.steps,
        steps_left=training.steps - steps_done,
        tokens_per_step=training.data.tokens_per_step,
        memory_bytes={name: size for name, size in memory.items() if size},
        checkpoint_bytes=checkpoint,
        disk_bytes=checkpoint * (run.keep_last + 1) + count * _BF16,
        free_bytes=shutil.disk_usage(_existing(training.output)).free,
        seconds_per_step=None if probed is None else probed.seconds,
    )


def refuse_small_disk(budget: Budget, output: Path) -> None:
    """Refuse a run whose checkpoints do not fit on the disk.

    Raises:
        TrainingError: with the needed and the free bytes.
    """
    needed = budget.disk_bytes - budget.checkpoint_bytes * len(saved_steps(output))
    if needed > budget.free_bytes:
        raise TrainingError(
            f"The checkpoints of this run need {_size(needed)}, but the disk of {output} has "
            f"{_size(budget.free_bytes)} free; free space, lower run.keep_last, or give another "
            "run.output_dir."
        )


def _existing(path: Path) -> Path:
    return path if path.exists() or path == path.parent else _existing(path.parent)


def _size(size: float) -> str:
    return _scaled(size, " B", " kB", " MB", " GB", " TB")


def _count(count: float) -> str:
    return _scaled(count, "", " k", " M", " billion")


def _scaled(number: float, *units: str) -> str:
    power = 0
    while number >= 1000 and power + 1 < len(units):
        number, power = number / 1000, power + 1
    return f"{number:.3g}{units[power]}"


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
