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
from dspark.scheduling.files import read_json, write_json

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_budget(text: str) -> float:
    """Seconds of a budget such as 90s, 30m, 8h or 1h30m.

    Raises:
        UsageError: it is none.
    """
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd])", text)
    seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
    if "".join(map("".join, parts)) != text or not seconds > 0:
        raise UsageError(f"The budget is {text!r}, but must be a time such as 90s, 30m or 8h.")
    return seconds


def budget_text(seconds: float) -> str:
    """A budget as `parse_budget` reads it, rounded up to a figure that is easy to read."""
    if seconds <= 120:
        return f"{math.ceil(seconds)}s"
    if seconds <= 7200:
        return f"{math.ceil(seconds / 60)}m"
    return f"{math.ceil(seconds / 360) / 10:g}h"


def duration(seconds: float) -> str:
    """A time for people."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


FILE, VERSION = "fit.json", 1
HEARTBEAT_S = 5.0
STAGES = ("plan", "prompts", "answers", "training", "calibration", "costs", "evaluation", "attach")


class State:
    """The stages of a run that are done, what they gave, and the time that all sittings took.

    Args:
        folder: of the run.
        settings: what the run is asked, as JSON values; a run that was asked something else is not
            gone on with.
        waited_s: seconds of this sitting that have gone by already.
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
        """Seconds of all sittings so far."""
        return self._earlier + self._now() - self._began

    def is_done(self, stage: str) -> bool:
        """Whether a stage has come to its end, in this sitting or an earlier one."""
        return stage in self._done

    def result(self, stage: str) -> dict[str, Any]:
        """What a stage gave, as JSON values; empty before its end."""
        return self._results.get(stage, {})

    def seconds(self, stage: str) -> float:
        """What a stage took, in all sittings."""
        return self._seconds.get(stage, 0.0)

    def begin(self, stage: str) -> None:
        """Note that a stage begins."""
        self._stage = (stage, self._now())

    def beat(self) -> None:
        """Note the time that has gone by, every few seconds."""
        if self._now() - self._saved >= HEARTBEAT_S:
            self.save()

    def end(self, result: Mapping[str, Any]) -> None:
        """Note the end of the stage that has begun."""
        assert self._stage is not None
        stage, _ = self._stage
        self._count()
        self._stage = None
        self._results[stage] = json.loads(json.dumps(dict(result)))
        self._done.add(stage)
        self.save()

    def save(self) -> None:
        """Write the file, whole or not at all.

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
        """Add to the running stage's seconds what has gone by since they were last counted."""
        if self._stage is not None:
            stage, since = self._stage
            now = self._now()
            self._seconds[stage] = self.seconds(stage) + now - since
            self._stage = (stage, now)


class Watcher(Protocol):
    """Is told of stages, their progress and remarks."""

    def begin(self, stage: str, planned_s: float | None) -> None:
        """A stage begins, which is planned to take so long."""
        ...

    def advance(self, done: float, total: float, left_s: float) -> None:
        """The stage has done so much of so much; all stages together have so many seconds left."""
        ...

    def end(self, stage: str, seconds: float, *, skipped: bool) -> None:
        """A stage has ended, or was done by an earlier run."""
        ...

    def say(self, sentence: str) -> None:
        """Something that a user should know."""
        ...


class Silent:
    """A watcher that shows nothing."""

    def begin(self, stage: str, planned_s: float | None) -> None:
        """Nothing."""

    def advance(self, done: float, total: float, left_s: float) -> None:
        """Nothing."""

    def end(self, stage: str, seconds: float, *, skipped: bool) -> None:
        """Nothing."""

    def say(self, sentence: str) -> None:
        """Nothing."""
