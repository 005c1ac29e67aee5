"""Progress of a run: its log, display, stop signals and time budget."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dspark.data.files.atomic import replace_file
from dspark.errors import RecipeError

LOG = "log.jsonl"


class Writer(Protocol):
    """What TensorBoard's SummaryWriter is used for."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None: ...
    def close(self) -> None: ...


class RunLog:
    """The log and the display of one run; inactive on all ranks but the first.

    `log.jsonl` has a line per logged step: `step`, the step's metrics over all ranks, and, if
    measured, `real_accepted_length` (`..._t0`, `..._t1`: by temperature).

    Args:
        output: the run's directory.
        first: steps already done; later lines of an interrupted run are dropped.
        steps: of the whole run.
        console: of the display.
        active: whether this is the first rank.
        tensorboard: also write TensorBoard logs.

    Raises:
        RecipeError: TensorBoard is requested but not installed.
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

    def __enter__(self) -> RunLog:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        if self._writer is not None:
            self._writer.close()

    def plan(self, steps: int) -> None:
        """Change the number of steps of the whole run."""
        self._bar.update(self._task, total=steps)

    def show(self, step: int, metrics: Mapping[str, float], tokens_per_s: float) -> None:
        """Update the display."""
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
    """Keep the lines of steps up to `step`; drop truncated ones."""
    if not path.is_file():
        return
    kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _is_upto(line, step)]
    replace_file(path, "".join(f"{line}\n" for line in kept))


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


class StopSignals:
    """Context in which the first SIGTERM or SIGINT is only recorded; a second one acts as usual.

    Attributes:
        received: name of the signal, if any.
    """

    _WATCHED = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        # Only the main thread may handle signals.
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._note) for s in self._WATCHED}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self.received = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for watched, handler in self._before.items():
            signal.signal(watched, handler)
        self._before = {}


FIRST_LOOK, NEXT_LOOK = 0.1, 0.25
"""Shares of the remaining time or steps after which the speed is measured again."""


LAST_LOOK = 0.03
"""Remaining share of the time in which the plan no longer changes."""


TOLERANCE = 0.03


class Pace:
    """Keeps a run within a time budget by adjusting its number of steps.

    At each check the remaining time is divided by the seconds per step since the previous check.
    The learning rate follows the new number of steps, so its decay still completes.

    Args:
        seconds: time budget from the first step on.
        tell: called after every step with (steps done, steps in all).
        now: the clock, in seconds.

    Attributes:
        seconds_per_step: as last measured; None before the first check.
        changes: how often the number of steps was changed.
    """

    def __init__(
        self,
        seconds: float,
        *,
        tell: Callable[[int, int], None] | None = None,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._seconds, self._tell, self._now = seconds, tell, now
        self._ends: float | None = None
        self._since, self._look = (0.0, 0), (0.0, 0)
        self.seconds_per_step: float | None = None
        self.changes = 0

    def begin(self, done: int, total: int) -> None:
        """Start the clock after `done` earlier steps."""
        now = self._now()
        self._ends = now + self._seconds
        self._since = (now, done)
        self._next_look(now, done, total, FIRST_LOOK)

    def steps(self, done: int, total: int) -> int:
        """The new number of steps after `done` of them; at least `done`.

        Past its time a run ends after the current step.
        """
        assert self._ends is not None
        now = self._now()
        wanted = total
        if done < total and now >= self._ends:
            wanted = done
        elif done < total and (now >= self._look[0] or done >= self._look[1]):
            wanted = self._planned(now, self._ends - now, done, total)
            self._next_look(now, done, wanted, NEXT_LOOK)
        self.changes += wanted != total
        if self._tell is not None:
            self._tell(done, wanted)
        return wanted

    def _planned(self, now: float, left: float, done: int, total: int) -> int:
        since, first = self._since
        self.seconds_per_step = (now - since) / max(done - first, 1)
        self._since = (now, done)
        wanted = max(done + int(left / self.seconds_per_step), done + 1)
        return total if abs(wanted - total) <= TOLERANCE * total else wanted

    def _next_look(self, now: float, done: int, total: int, share: float) -> None:
        assert self._ends is not None
        left = self._ends - now
        if left < LAST_LOOK * self._seconds:
            self._look = (math.inf, total)
            return
        self._look = (now + share * left, done + max(math.ceil(share * (total - done)), 1))
