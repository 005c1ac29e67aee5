"""Shows two runs side by side: while they are decoded, or afterwards as they happened.

For a replay both are decoded first, one after the other, so that neither the other run nor the
display takes time from them; the replay then keeps their measured pace, stretched alike.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from dspark.cli.common import printable
from dspark.cli.decoding import Decoded, Show
from dspark.engine.sequence import Piece
from dspark.request import Output

DRAFTED = "green"
REPLAY_SECONDS = 4.0
_FRAMES_PER_SECOND = 20


@dataclass(frozen=True)
class Side:
    """One of the two runs, and what it is called."""

    title: str
    run: Decoded

    def text_at(self, seconds: float) -> Text:
        """What had been decoded by then; accepted drafts are coloured."""
        text = Text(overflow="fold")
        for moment, pieces in self.run.moments:
            if moment > seconds:
                break
            for piece in pieces:
                text.append(printable(piece.text), DRAFTED if piece.drafted else "")
        return text

    def panel_at(self, seconds: float) -> Panel:
        """The text, with the run's time so far."""
        shown = min(seconds, self.run.seconds)
        note = f"{shown:.2f} s"
        if seconds >= self.run.seconds:
            note += f", {self.run.tokens_per_s:.0f} tokens/s"
        return Panel(self.text_at(seconds), title=self.title, subtitle=note)


class Watched:
    """Panels side by side that runs fill one after the other; elsewhere than on a terminal, text.

    The time of showing is not counted in a run's.
    """

    def __init__(self, titles: Sequence[str], console: Console) -> None:
        self.titles, self.console = titles, console
        self.texts = [Text(overflow="fold") for _ in titles]
        self.live = (
            Live(self._frame(), console=console, auto_refresh=False)
            if console.is_terminal
            else None
        )

    def __enter__(self) -> Watched:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.live is not None:
            self.live.stop()

    def show(self, side: int) -> Show:
        """What to tell of the steps of one run."""
        if self.live is None:
            self.console.print(f"[{self.titles[side]}]", style="bold", markup=False)

        def step(_index: int, pieces: Sequence[Piece], output: Output | None) -> None:
            for piece in pieces:
                self.texts[side].append(printable(piece.text), DRAFTED if piece.drafted else "")
                if self.live is None:
                    self.console.file.write(printable(piece.text))
            if self.live is not None:
                self.live.update(self._frame(), refresh=True)
            else:
                self.console.file.write("\n" if output is not None else "")
                self.console.file.flush()

        return step

    def _frame(self) -> Table:
        grid = Table.grid(expand=True)
        grid.caption = "Decoded in turn. Green: drafted and accepted."
        for _ in self.titles:
            grid.add_column(ratio=1)
        sides = zip(self.titles, self.texts, strict=True)
        grid.add_row(*[Panel(text, title=title) for title, text in sides])
        return grid


def replay(sides: Sequence[Side], console: Console) -> None:
    """Play the runs side by side on a terminal; elsewhere print them one after the other."""
    if not console.is_terminal:
        for side in sides:
            console.print(f"[{side.title}]", style="bold", markup=False)
            console.print(side.text_at(side.run.seconds), soft_wrap=True)
        return
    longest = max(side.run.seconds for side in sides)
    stretch = REPLAY_SECONDS / longest
    started = time.monotonic()
    with Live(_frame(sides, 0.0, stretch), console=console, auto_refresh=False) as live:
        while (seconds := (time.monotonic() - started) / stretch) < longest:
            live.update(_frame(sides, seconds, stretch), refresh=True)
            time.sleep(1 / _FRAMES_PER_SECOND)
        live.update(_frame(sides, longest, stretch), refresh=True)


def _frame(sides: Sequence[Side], seconds: float, stretch: float) -> Table:
    grid = Table.grid(expand=True)
    pace = f"replayed together at {1 / stretch:.2g} x their speed"
    grid.caption = f"Timed in turn, {pace}. Green: drafted and accepted."
    for _ in sides:
        grid.add_column(ratio=1)
    grid.add_row(*[side.panel_at(seconds) for side in sides])
    return grid
