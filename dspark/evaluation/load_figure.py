"""The figure of a sweep, as the paper's Figs. 7 and 8: needs the optional matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from dspark.evaluation.load.report import LoadRow, frontiers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MISSING = (
    "The figure is left out: it needs matplotlib; install it with pip install 'dspark[plots]'."
)
# Each contender keeps its colour, whichever of them ran (Okabe and Ito's palette).
COLOURS = {
    "off": "#7f7f7f",
    "fixed": "#e69f00",
    "mtp1": "#cc79a7",
    "prefix": "#56b4e9",
    "lagged": "#0072b2",
    "lookahead": "#009e73",
}
FORMATS = ("png", "svg")


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def save_figure(rows: Sequence[LoadRow], title: str, directory: Path) -> list[Path]:
    """Draw throughput against per-user speed, and verified tokens against concurrency.

    Args:
        rows: of `load_report.load_rows`.
        title: what was measured, and where.
        directory: exists; gets `load.png` and `load.svg`.

    Returns:
        The paths.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    figure.suptitle(title, fontsize=10)
    left, right = figure.subplots(1, 2)
    _draw_frontiers(left, rows)
    _draw_verified(right, rows)
    paths = [directory / f"load.{kind}" for kind in FORMATS]
    for path in paths:
        figure.savefig(path, dpi=150)
    return paths


def _draw_frontiers(axes: Axes, rows: Sequence[LoadRow]) -> None:
    for name, line in frontiers(rows).items():
        speeds, throughput = zip(*line, strict=True)
        axes.plot(speeds, throughput, "o-", color=COLOURS[name], label=name, markersize=4)
    for row in rows:
        if row.schedule == "lagged" and row.tokens_per_s_per_user is not None:
            at = (row.tokens_per_s_per_user, row.tokens_per_s)
            text = str(row.concurrency)
            axes.annotate(text, at, xytext=(4, 4), textcoords="offset points", fontsize=8)
    axes.set_xlabel("tokens/s of a user, after the first token")
    axes.set_ylabel("tokens/s of all users")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_verified(axes: Axes, rows: Sequence[LoadRow]) -> None:
    names = list(dict.fromkeys(row.schedule for row in rows))
    for name in names:
        mine = sorted(
            (row.concurrency, row.verified_per_request) for row in rows if row.schedule == name
        )
        users, verified = zip(*mine, strict=True)
        axes.plot(users, verified, "o-", color=COLOURS[name], label=name, markersize=4)
    ticks = sorted({row.concurrency for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(users) for users in ticks])
    axes.minorticks_off()
    axes.set_xlabel("users")
    axes.set_ylabel("verified tokens per request and round")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
