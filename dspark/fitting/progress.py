"""Progress of a fit: its time budget, the state kept in its folder, and the watcher interface."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from dspark.errors import UsageError
from dspark.scheduling.json_files import read_json, write_json

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_budget(text: str) -> float:
    """Seconds of a budget such as 90s, 30m, 8h or 1h30m.

    Raises:
        UsageError: it is not a time.
    """
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd])", text)
    seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
    if "".join(map("".join, parts)) != text or not seconds > 0:
        raise UsageError(f"The budget is {text!r}, but must be a time such as 90s, 30m or 8h.")
    return seconds


def budget_text(seconds: float) -> str:
    """A budget in the format of `parse_budget`, rounded up to a readable figure."""
    if seconds <= 120:
        return f"{math.ceil(seconds)}s"
    if seconds <= 7200:
        return f"{math.ceil(seconds / 60)}m"
    return f"{math.ceil(seconds / 360) / 10:g}h"


def duration(seconds: float) -> str:
    """A readable duration."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


FILE, VERSION = "fit.json", 3
HEARTBEAT_S = 5.0
STAGES = (
    "plan", "prompts", "answers", "features", "training", "calibration", "costs", "evaluation",
    "attach",
)  # fmt: skip


class State:
    """Finished stages of a run, their results, and the total time, on disk.

    Args:
        folder: of the run.
        settings: of the run, as JSON values; a run with other settings is not resumed.
        waited_s: seconds already spent since the command was given.
        now: the clock, in seconds.

    Raises:
        UsageError: the folder holds a run with other settings.
        DataError: the file is damaged.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        waited_s: float = 0.0,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.path = folder / FILE
        self._now = now
        self._settings: dict[str, Any] = json.loads(json.dumps(dict(settings)))
        self._results: dict[str, dict[str, Any]] = {}
        self._seconds: dict[str, float] = {}
        self._done: set[str] = set()
        self._earlier = 0.0
        if self.path.is_file():
            self._read(folder)
        self._saved = now()
        self._began = self._saved - waited_s
        self._stage: tuple[str, float] | None = None

    def _read(self, folder: Path) -> None:
        record = read_json(self.path, VERSION, "name another --out, or delete the folder")
        for name, value in self._settings.items():
            earlier = record["settings"].get(name)
            if earlier != value:
                raise UsageError(
                    f"{folder} holds a run with {name} {earlier!r}, but this one has {value!r}; "
                    "ask the same again to go on, or name another --out."
                )
        self._results, self._seconds = record["results"], record["seconds"]
        self._done, self._earlier = set(record["done"]), float(record["spent"])

    @property
    def elapsed_s(self) -> float:
        """Seconds spent so far, earlier starts included."""
        return self._earlier + self._now() - self._began

    def is_done(self, stage: str) -> bool:
        """Whether a stage is finished."""
        return stage in self._done

    def result(self, stage: str) -> dict[str, Any]:
        """The result of a stage, as JSON values; empty before its end."""
        return self._results.get(stage, {})

    def seconds(self, stage: str) -> float:
        """Seconds of a stage, earlier starts included."""
        return self._seconds.get(stage, 0.0)

    def begin(self, stage: str) -> None:
        """Begin a stage."""
        self._stage = (stage, self._now())

    def beat(self) -> None:
        """Save the elapsed time, every few seconds."""
        if self._now() - self._saved >= HEARTBEAT_S:
            self.save()

    def end(self, result: Mapping[str, Any]) -> None:
        """End the current stage."""
        assert self._stage is not None
        stage, _ = self._stage
        self._count()
        self._stage = None
        self._results[stage] = json.loads(json.dumps(dict(result)))
        self._done.add(stage)
        self.save()

    def save(self) -> None:
        """Write the file atomically.

        Raises:
            DataError: it cannot be written.
        """
        self._count()
        self._saved = self._now()
        write_json(
            self.path,
            {
                "version": VERSION,
                "settings": self._settings,
                "spent": self.elapsed_s,
                "done": [stage for stage in STAGES if stage in self._done],
                "seconds": self._seconds,
                "results": self._results,
            },
        )

    def _count(self) -> None:
        """Add the time since the last count to the current stage."""
        if self._stage is not None:
            stage, since = self._stage
            now = self._now()
            self._seconds[stage] = self.seconds(stage) + now - since
            self._stage = (stage, now)


class Watcher(Protocol):
    """Receives the stages of a fit, their progress and remarks."""

    def begin(self, stage: str, planned_s: float | None) -> None:
        """A stage begins, with its planned time."""
        ...

    def advance(self, done: float, total: float, left_s: float) -> None:
        """Progress of the stage, and the remaining seconds of the whole fit."""
        ...

    def end(self, stage: str, seconds: float, *, skipped: bool) -> None:
        """A stage has ended, or was finished by an earlier start."""
        ...

    def say(self, sentence: str) -> None:
        """A remark for the user."""
        ...
