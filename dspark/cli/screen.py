"""Where a command writes: its answer, progress, remarks and tables."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

REMARKING = ("dspark.sources", "dspark.engine.loading", "dspark.data.prompts.sources")
"""The loggers whose remarks a user of the command should see: what is fetched, and from where."""

Tell = Callable[[float, float | None], None]
"""(done, total) of what is going on."""


@dataclass(frozen=True)
class Screen:
    """Where a command writes.

    Attributes:
        out: the answer: standard output, or standard error under `--json`.
        log: progress and remarks: standard error.
    """

    out: Console = field(default_factory=lambda: Console(highlight=False))
    log: Console = field(default_factory=lambda: Console(highlight=False, stderr=True))

    def write(self, text: str, style: str = "") -> None:
        """Write a model's text, no line end added: coloured on a terminal, else just as it is."""
        if self.out.is_terminal:
            self.out.print(Text(printable(text), style), end="", soft_wrap=True)
        else:
            self.out.file.write(text)
            self.out.file.flush()

    def say(self, sentence: str, style: str = "") -> None:
        """Print a sentence of the answer."""
        self.out.print(Text(sentence, style), soft_wrap=True)

    def remark(self, sentence: str, style: str = "") -> None:
        """Print a remark."""
        self.log.print(Text(sentence, style), soft_wrap=True)

    def warn(self, sentence: str) -> None:
        """Print a remark that should be seen."""
        self.remark(sentence, "yellow")

    @contextmanager
    def progress(self, what: str, *, counted: bool = False) -> Iterator[Tell]:
        """A bar while something goes on.

        Args:
            what: names it.
            counted: show the numbers, and leave the bar there when it is done.
        """
        columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        bar = Progress(*columns if counted else (), console=self.log, transient=not counted)
        with bar:
            task = bar.add_task("" if counted else what, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)


def table(*left: str, right: tuple[str, ...] = ()) -> Table:
    """A plain table: columns of text, then columns of numbers."""
    found = Table(*left, box=None, pad_edge=False)
    for name in right:
        found.add_column(name, justify="right")
    return found


def cell(value: float | None, form: str = ".4g") -> str:
    """A number of a table."""
    return "-" if value is None else f"{value:{form}}"


def interval(ends: Sequence[float] | None, form: str = ".4g") -> str:
    """An interval of a table."""
    return "-" if ends is None else "-".join(cell(end, form) for end in ends)


@contextmanager
def showing_remarks(screen: Screen) -> Iterator[None]:
    """Print what `REMARKING` say, each remark once, while a command runs."""
    said: set[str] = set()

    class Remarks(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            if text not in said:
                said.add(text)
                screen.remark(text, "dim")

    remarks, loggers = Remarks(), [logging.getLogger(name) for name in REMARKING]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(remarks)
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.removeHandler(remarks)
            logger.setLevel(level)


def printable(text: str) -> str:
    """Drop control characters, with which a model's text could take over the terminal."""
    return "".join(c for c in text if c.isprintable() or c in "\n\t")


def without_nan(value: Any) -> Any:
    """Replace NaN and infinities, which JSON cannot hold, by None."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
