"""Figures of a capacity plan, as the paper's Figs. 7 and 8; they need matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import matplotlib as mpl
from matplotlib.figure import Figure

from dspark.evaluation.load.report import COLOURS
from dspark.evaluation.report.figures import COLOURS as OTHERS
from dspark.evaluation.report.figures import STYLE, Drawing, drawing_of
from dspark.simulation.planning import Plan, Row, lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIZE = (5.6, 3.4)


def draw(plan: Plan) -> dict[str, Drawing]:
    """Every figure that a plan has data for, by name."""
    found: dict[str, Drawing] = {}
    with mpl.rc_context(STYLE):
        if plan.frontier:
            found["frontier"] = _figure(lambda axes: _frontier(axes, plan.frontier))
            found["verified"] = _figure(lambda axes: _verified(axes, plan.frontier))
        if len({row.rate for row in plan.rows}) > 1:
            found["ttft"] = _figure(lambda axes: _ttft(axes, plan))
            found["speed"] = _figure(lambda axes: _speed(axes, plan))
    return found


def _figure(paint: Callable[[Axes], None]) -> Drawing:
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.subplots()
    paint(axes)
    if axes.get_yscale() == "linear":
        axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    return drawing_of(figure)


def _by_way(rows: Sequence[Row]) -> Mapping[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.schedule, []).append(row)
    return found


def _colour(name: str, place: int) -> str:
    return COLOURS.get(name, OTHERS[(place + 4) % len(OTHERS)])


def _frontier(axes: Axes, rows: Sequence[Row]) -> None:
    for place, (name, line) in enumerate(lines(rows).items()):
        speeds, throughput = zip(*line, strict=True)
        colour = _colour(name, place)
        axes.plot(speeds, throughput, "o-", color=colour, label=name, markersize=4)
    last = list(_by_way(rows).values())[-1]
    for row in last:
        if row.mean_tokens_per_s_per_user is not None:
            at = (row.mean_tokens_per_s_per_user, row.tokens_per_s)
            axes.annotate(
                f"{row.users:.0f}", at, xytext=(4, 4), textcoords="offset points", fontsize=7
            )
    axes.set_xlabel("tokens/s of a user, after the first token")
    axes.set_ylabel("tokens/s of all users")


def _verified(axes: Axes, rows: Sequence[Row]) -> None:
    ticks = sorted({row.users for row in rows})
    for place, (name, mine) in enumerate(_by_way(rows).items()):
        points = sorted((row.users, row.verified_per_request) for row in mine)
        users, verified = zip(*points, strict=True)
        axes.plot(users, verified, "o-", color=_colour(name, place), label=name, markersize=4)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{users:.0f}" for users in ticks])
    axes.minorticks_off()
    axes.set_xlabel("users")
    axes.set_ylabel("verified tokens per request and round")


def _ttft(axes: Axes, plan: Plan) -> None:
    for place, (name, mine) in enumerate(_by_way(plan.rows).items()):
        points = sorted((row.rate or 0.0, row.ttft_ms["p95"]) for row in mine)
        rates, ms = zip(*points, strict=True)
        axes.plot(rates, ms, "o-", color=_colour(name, place), label=name, markersize=4)
    axes.axhline(plan.level.ttft_ms, color="#7f7f7f", linestyle=":", linewidth=1)
    axes.set_yscale("log")
    axes.set_xlabel("requests per second")
    axes.set_ylabel("time to first token, p95, ms")


def _speed(axes: Axes, plan: Plan) -> None:
    for place, (name, mine) in enumerate(_by_way(plan.rows).items()):
        points = sorted(
            (row.rate or 0.0, speed)
            for row in mine
            if (speed := row.tokens_per_s_per_user["p50"]) is not None
        )
        if points:
            rates, speeds = zip(*points, strict=True)
            axes.plot(rates, speeds, "o-", color=_colour(name, place), label=name, markersize=4)
    if plan.level.tokens_per_s is not None:
        axes.axhline(plan.level.tokens_per_s, color="#7f7f7f", linestyle=":", linewidth=1)
    axes.set_xlabel("requests per second")
    axes.set_ylabel("tokens/s of a user, median")
