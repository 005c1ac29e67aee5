"""Figures of a report, as Figs. 2 to 6 of the paper; requires the optional matplotlib."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from dspark.evaluation.sweeps import SWEEPS, Run, main_runs, run_labels, series

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, which the colour-blind can tell apart.
COLOURS = (
    "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#7f7f7f", "#000000",
)  # fmt: skip
FEW_ROUNDS = 30
POSITIONS = (1, 3, 5, 7)
_WIDTH = 5.6  # inches: a phone's width at a readable size of letters
STYLE: Any = {"font.size": 9, "svg.hashsalt": "dspark", "axes.grid": True, "grid.alpha": 0.3}
Report = Mapping[str, Any]


@dataclass(frozen=True)
class Drawing:
    """A figure, as a file and as text to embed."""

    png: bytes
    svg: str


def draw(report: Report) -> dict[str, Drawing]:
    """Every figure that the runs of a report have data for, by name."""
    painters: dict[str, Callable[[Report], Figure | None]] = {
        "accepted_length": _accepted_length,
        "decay": _decay,
        "depth": _depth,
        "block": _block,
        "threshold": _threshold,
        "calibration": _calibration,
        **{name: _sweep(name) for name in ("verifier", "temperature", "top-p")},
    }
    found = {}
    with mpl.rc_context(STYLE):
        for name, paint in painters.items():
            figure = paint(report)
            if figure is not None:
                found[name] = drawing_of(figure)
    return found


def drawing_of(figure: Figure) -> Drawing:
    """A figure as bytes and text that are the same each time."""
    png, svg = io.BytesIO(), io.StringIO()
    figure.savefig(png, format="png", dpi=150, metadata={"Software": None})
    figure.savefig(svg, format="svg", metadata={"Date": None})
    text = svg.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    return Drawing(png.getvalue(), text)


def _panels(count: int, height: float, *, columns: int | None = None) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels, in one column where they are few."""
    columns = columns or (1 if count <= 3 else 2)
    rows = -(-count // columns)
    figure = Figure(figsize=(_WIDTH, height * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for spare in axes[count:]:
        spare.set_visible(False)
    return figure, axes[:count]


def _named(runs: Sequence[Run]) -> list[tuple[str, Run, str]]:
    """Runs with their labels and colours."""
    labels = run_labels(runs)
    return [
        (label, run, COLOURS[i % len(COLOURS)])
        for i, (label, run) in enumerate(zip(labels, runs, strict=True))
    ]


def _domains(runs: Iterable[Run]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run["domains"]))


def _accepted_length(report: Report) -> Figure | None:
    named = _named(main_runs(report["runs"]))
    tasks = list(dict.fromkeys(task for _, run, _ in named for task in run["tasks"]))
    rows = [*tasks, "macro"] if len(tasks) > 1 else tasks
    step = 0.8 / max(len(named), 1)
    figure, (axes,) = _panels(1, 1.2 + 0.16 * len(rows) * (len(named) + 1))
    for i, (label, run, colour) in enumerate(named):
        points = [
            (at + i * step, row)
            for at, name in enumerate(rows)
            for row in [run["macro"] if name == "macro" else run["tasks"].get(name)]
            if row is not None and row["accepted_length"] is not None
        ]
        for at, row in points:
            _whiskers(axes, row["accepted_length"], at, row["ci95"], colour, across=True)
        if points:
            values = [row["accepted_length"] for _, row in points]
            axes.plot(values, [at for at, _ in points], "o", color=colour, label=label, ms=4)
    axes.set_yticks([at + 0.4 - step / 2 for at in range(len(rows))], rows)
    axes.invert_yaxis()
    axes.set_xlabel("accepted length, tokens per round")
    axes.legend(fontsize=8)
    return figure


def _whiskers(
    axes: Axes, x: float, y: float, ends: Sequence[float] | None, colour: str, *, across: bool
) -> None:
    if ends is None:
        return
    if across:
        axes.plot(ends, [y, y], "-", color=colour, lw=1)
    else:
        axes.plot([x, x], ends, "-", color=colour, lw=1)


def _decay(report: Report) -> Figure | None:
    named = _named([r for r in main_runs(report["runs"]) if r["drafter"]["block_size"]])
    domains = _domains(run for _, run, _ in named)
    if not domains:
        return None
    figure, panels = _panels(len(domains), 2.6)
    for axes, name in zip(panels, domains, strict=True):
        for label, run, colour in named:
            domain = run["domains"].get(name)
            if domain is None:
                continue
            pairs = zip(domain["conditional_acceptance"], domain["conditional_counts"], strict=True)
            points = [(k, a, n) for k, (a, n) in enumerate(pairs, 1) if a is not None]
            axes.plot([k for k, _, _ in points], [a for _, a, _ in points], "-", color=colour)
            for k, share, count in points:
                axes.plot(
                    k, share, "o", color=colour, ms=4, alpha=1 if count >= FEW_ROUNDS else 0.25
                )
            axes.plot([], [], "o-", color=colour, label=label, ms=4)
        axes.set_title(name, fontsize=9)
        axes.set(ylim=(0, 1.03), xlabel="draft position", ylabel="kept, given the ones before")
    panels[0].legend(fontsize=7)
    return figure


def _depth(report: Report) -> Figure | None:
    runs = [run for run in main_runs(report["runs"]) if run["drafter"]["layers"]]
    if len({run["drafter"]["layers"] for run in runs}) < 2:
        return None
    figure, (axes,) = _panels(1, 3.0)
    for label, run, colour in _named(runs):
        layers, macro = run["drafter"]["layers"], run["macro"]
        if macro["accepted_length"] is None:
            continue
        _whiskers(axes, layers, 0, macro["ci95"], colour, across=False)
        axes.plot(layers, macro["accepted_length"], "o", color=colour, label=label)
    axes.set(xlabel="layers of the drafter", ylabel="accepted length, mean over tasks")
    axes.set_xticks(sorted({run["drafter"]["layers"] for run in runs}))
    axes.legend(fontsize=8)
    return figure


def _block(report: Report) -> Figure | None:
    lines = series(report["runs"], "block_size")
    if not lines:
        return None
    domains = _domains(run for line in lines for run in line)
    figure, panels = _panels(len(domains), 2.6)
    for axes, name in zip(panels, domains, strict=True):
        for i, line in enumerate(lines):
            points = [
                (run["drafter"]["block_size"], run["domains"][name])
                for run in line
                if run["domains"].get(name, {}).get("accepted_length") is not None
            ]
            colour = COLOURS[i % len(COLOURS)]
            for at, row in points:
                _whiskers(axes, at, 0, row["ci95"], colour, across=False)
            values = [row["accepted_length"] for _, row in points]
            axes.plot(
                [at for at, _ in points], values, "o-", color=colour, label=_line(lines, i), ms=4
            )
        axes.set_title(name, fontsize=9)
        axes.set(xlabel=SWEEPS["block"].label, ylabel="accepted length")
    panels[0].legend(fontsize=7)
    return figure


def _line(lines: Sequence[Sequence[Run]], index: int, *varied: str) -> str:
    """The label of a line: its first run's among the lines' first runs."""
    without = dict.fromkeys(varied or ("block_size", "threshold"))
    bare = [{**line[0], "settings": {**line[0]["settings"], **without}} for line in lines]
    return run_labels(bare)[index]


def _threshold(report: Report) -> Figure | None:
    lines = series(report["runs"], "threshold")
    if not lines:
        return None
    domains = _domains(run for line in lines for run in line)
    figure, panels = _panels(2 * len(lines), 2.6, columns=2)
    for i, line in enumerate(lines):
        rows = (("acceptance", "(accepted + 1) / (verified + 1)"), ("accepted_length", None))
        for axes, (key, said) in zip(panels[2 * i : 2 * i + 2], rows, strict=True):
            for colour, name in zip(COLOURS * 2, domains, strict=False):
                points = [
                    (run["settings"]["threshold"], run["domains"][name][key])
                    for run in line
                    if run["domains"].get(name, {}).get(key) is not None
                ]
                xs, ys = [x for x, _ in points], [y for _, y in points]
                axes.plot(xs, ys, "o-", color=colour, label=name, ms=3)
            axes.set(xlabel=SWEEPS["threshold"].label, ylabel=said or "accepted length")
            axes.set_title(_line(lines, i), fontsize=8)
    panels[0].legend(fontsize=7)
    return figure


def _calibration(report: Report) -> Figure | None:
    found = [
        (label, pooled)
        for label, run, _ in _named(main_runs(report["runs"]))
        if (pooled := _pooled(run)) is not None
    ][:4]
    if not found:
        return None
    positions = [k for k in POSITIONS if k <= max(len(p["before"]) for _, p in found)]
    figure, panels = _panels(len(found) * len(positions), 2.4, columns=min(2, len(positions)))
    grid = iter(panels)
    for label, pooled in found:
        for position in positions:
            axes = next(grid)
            if position > len(pooled["before"]):
                axes.set_visible(False)
                continue
            _reliability(axes, pooled, position)
            axes.set_title(f"{label}, position {position}", fontsize=8)
    panels[0].legend(fontsize=7)
    return figure


def _reliability(axes: Axes, pooled: Mapping[str, Any], position: int) -> None:
    axes.plot([0, 1], [0, 1], ":", color="#7f7f7f", lw=1)
    for when, colour in (("before", COLOURS[1]), ("after", COLOURS[0])):
        bins = pooled[when][position - 1] if pooled[when] is not None else []
        filled = [(p / n, o / n) for n, p, o in bins if n]
        if filled:
            axes.plot(
                [p for p, _ in filled], [o for _, o in filled], "o-", color=colour, ms=3, label=when
            )
    counts = [n for n, _, _ in pooled["before"][position - 1]]
    width = 1 / len(counts)
    beside = axes.twinx()
    beside.bar(
        [(b + 0.5) * width for b in range(len(counts))], counts, width, color="#7f7f7f", alpha=0.2
    )
    beside.set_ylim(0, 3 * max(1, *counts))
    beside.set_yticks([])
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="predicted survival", ylabel="survived")


def _pooled(run: Run) -> dict[str, Any] | None:
    """Reliability of all tasks together: per position and bin (rounds, predicted, survived)."""
    found = [t["calibration"] for t in run["tasks"].values() if t["calibration"] is not None]
    if not found:
        return None
    pooled: dict[str, Any] = {}
    for when in ("before", "after"):
        each = [calibration[when] for calibration in found]
        pooled[when] = None if any(one is None for one in each) else _sum_bins(each)
    return pooled


def _sum_bins(found: Sequence[Mapping[str, Any]]) -> Any:
    """Rounds, predicted and survived [positions, bins, 3] of several tasks."""
    counts, predicted, observed = (
        np.array([task[name] for task in found])
        for name in ("bin_counts", "bin_predicted", "bin_observed")
    )
    return np.stack((counts, counts * predicted, counts * observed), -1).sum(0)


def _sweep(name: str) -> Callable[[Report], Figure | None]:
    """The painter of a sweep that has no figure in the paper."""

    def paint(report: Report) -> Figure | None:
        field = SWEEPS[name].field
        lines = series(report["runs"], field)
        if not lines:
            return None
        figure, (axes,) = _panels(1, 3.0)
        for i, line in enumerate(lines):
            known = [run for run in line if run["macro"]["accepted_length"] is not None]
            values = [run["macro"]["accepted_length"] for run in known]
            xs = [run["settings"][field] for run in known]
            colour = COLOURS[i % len(COLOURS)]
            axes.plot(xs, values, "o-", color=colour, label=_line(lines, i, field), ms=4)
        axes.set(xlabel=SWEEPS[name].label, ylabel="accepted length, mean over tasks")
        axes.legend(fontsize=8)
        return figure

    return paint
