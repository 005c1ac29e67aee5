"""What a run says while it goes on: a log of JSON lines, TensorBoard, a progress display."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dspark.errors import RecipeError

LOG = "log.jsonl"


class Writer(Protocol):
    """What TensorBoard's SummaryWriter is used for."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None: ...
    def close(self) -> None: ...


class Journal:
    """The log and the display of one run; on ranks but the first it does nothing.

    `log.jsonl` has a line per logged step: `step`, the metrics of that step over all ranks, and
    where it was measured `real_accepted_length` (`..._t0`, `..._t1`: by temperature).

    Args:
        output: the run's directory.
        first: steps done before; later ones that an interrupted sitting logged are dropped.
        steps: of the whole run.
        console: where the display goes.
        active: whether this is the first rank.
        tensorboard: whether to write for TensorBoard too.

    Raises:
        RecipeError: TensorBoard is asked for and not installed.
    """

    def __init__(
        self,
        output: Path,
        first: int,
        steps: int,
        console: Console,
        *,
        active: bool,
        tensorboard: bool,
    ) -> None:
        self._active = active
        self._path = output / LOG
        self._writer = _summary_writer(output, first) if tensorboard and active else None
        self._real: float | None = None
        if active:
            output.mkdir(parents=True, exist_ok=True)
            _drop_lines_after(self._path, first)
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not active,
        )
        self._task = self._bar.add_task("", total=steps, completed=first, note="")

    def __enter__(self) -> Journal:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()
        if self._writer is not None:
            self._writer.close()

    def plan(self, steps: int) -> None:
        """Note another number of steps of the whole run."""
        self._bar.update(self._task, total=steps)

    def show(self, step: int, metrics: Mapping[str, float], tokens_per_s: float) -> None:
        """Move the display on."""
        self._real = metrics.get("real_accepted_length", self._real)
        note = [f"loss {metrics['loss']:.3f}"]
        if "accepted_length" in metrics:
            note.append(f"accepted length {metrics['accepted_length']:.2f}")
        if self._real is not None:
            note.append(f"real {self._real:.2f}")
        note += [f"rate {metrics['learning_rate']:.1e}", f"{tokens_per_s:,.0f} tokens/s"]
        self._bar.update(self._task, completed=step, note="  ".join(note))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log a step."""
        if not self._active:
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        if self._writer is not None:
            for name, value in metrics.items():
                self._writer.add_scalar(name, value, step)


def _drop_lines_after(path: Path, step: int) -> None:
    """Keep the lines of steps up to `step`; a line that was cut off is none of them."""
    if not path.is_file():
        return
    kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _is_upto(line, step)]
    fresh = path.with_name(f"{path.name}.new")
    fresh.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    os.replace(fresh, path)


def _is_upto(line: str, step: int) -> bool:
    try:
        return int(json.loads(line)["step"]) <= step
    except (ValueError, KeyError, TypeError):
        return False


def _summary_writer(output: Path, first: int) -> Writer:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise RecipeError(
            "run.tensorboard is true, but the package tensorboard is not installed; install "
            "dspark[tensorboard], or set it to false."
        ) from error
    writer: Writer = SummaryWriter(str(output / "tensorboard"), purge_step=first + 1)
    return writer
