"""Figures of a load sweep: medians with intervals, speed floors, gains over MTP-1, and the plot.

A schedule's frontier is the line through its measured points (per-user speed, throughput), one per
concurrency, in order. Beyond its ends only this is inferred: what is served at one speed is served
at every lower one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dspark.engine.speculation.round_record import RoundTimes
from dspark.evaluation.load.closed_loop import LoadRun
from dspark.evaluation.load.sweep import Runs, same_answers
from dspark.request import Stats

if TYPE_CHECKING:
    from matplotlib.axes import Axes


Point = tuple[float, float]
"""(x, y), such as (per-user tokens/s, tokens/s)."""

_RESAMPLES = 2000


def median(values: Sequence[float]) -> float:
    """The median, as a plain number."""
    return float(np.median(values))


def median_interval(values: Sequence[float], *, seed: int = 0) -> tuple[float, float] | None:
    """A 95 % percentile-bootstrap interval of the median.

    Of five values it is nearly always their smallest and largest. None for fewer than two.
    """
    if len(values) < 2:
        return None
    drawn = np.random.default_rng(seed).choice(np.asarray(values), (_RESAMPLES, len(values)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    return float(low), float(high)


def best_at(points: Sequence[Point], floor: float) -> float | None:
    """The highest y of a frontier at which x is at least `floor`; None if it never is.

    Args:
        points: joined by straight lines.
        floor: least x.
    """
    best = [y for x, y in points if x >= floor]
    for (x0, y0), (x1, y1) in pairwise(points):
        if min(x0, x1) < floor <= max(x0, x1):
            best.append(y0 + (y1 - y0) * (floor - x0) / (x1 - x0))
    return max(best) if best else None


def matched(points: Sequence[Point], y: float) -> float | None:
    """The highest x at which a frontier has exactly this y; None if there is none."""
    found = [x for x, at in points if at == y]
    for (x0, y0), (x1, y1) in pairwise(points):
        if min(y0, y1) < y < max(y0, y1):
            found.append(x0 + (x1 - x0) * (y - y0) / (y1 - y0))
    return max(found) if found else None


def spread(values: Sequence[float], count: int) -> list[float]:
    """`count` evenly spaced numbers strictly between the extremes, rounded to three digits."""
    inner = np.linspace(min(values), max(values), count + 2)[1:-1]
    return [float(f"{value:.3g}") for value in inner]


FLOORS = 5
BASELINE = "mtp1"


@dataclass(frozen=True)
class LoadRow:
    """One contender at one concurrency; every figure is the median over the repeats.

    Attributes:
        concurrency: users, each with one request in flight.
        schedule: the contender.
        tokens_per_s: throughput while all users are busy.
        ci95: bootstrap interval of that median; None for a single repeat.
        tokens_per_s_per_user: mean over requests of their speed after the first token; None if
            no request has more tokens than its first ones.
        tokens_per_s_per_user_median: the median over requests instead.
        ttft_ms: median time to first token.
        accepted_length: tokens gained per round.
        verified_per_request: rows of a request in a round, the anchor's included.
        draft_ms, schedule_ms, verify_ms: of a step that reads no prompt; None if every step did.
        identical: share of answers that are those of `off`; None where that is not compared.
        requests: counted answers of a repeat.
        repeats: how many.
    """

    concurrency: int
    schedule: str
    tokens_per_s: float
    ci95: tuple[float, float] | None
    tokens_per_s_per_user: float | None
    tokens_per_s_per_user_median: float | None
    ttft_ms: float
    accepted_length: float
    verified_per_request: float
    draft_ms: float | None
    schedule_ms: float | None
    verify_ms: float | None
    identical: float | None
    requests: int
    repeats: int


def load_rows(runs: Runs, *, compare: bool) -> list[LoadRow]:
    """A row per concurrency and contender, in the order of the runs.

    Args:
        runs: of a sweep.
        compare: whether answers ought to be those of `off`, if that ran.
    """
    rows = []
    for (users, name), repeats in runs.items():
        against = compare and name != "off" and (users, "off") in runs
        identical = same_answers(runs, users, name) if against else None
        rows.append(_row(users, name, repeats, identical))
    return rows


def _row(users: int, name: str, runs: Sequence[LoadRun], identical: float | None) -> LoadRow:
    throughput = [run.tokens_per_s for run in runs]
    times = [run.clock.per_step() for run in runs if run.clock.steps]
    speeds = [run.user_speeds for run in runs if run.user_speeds]
    return LoadRow(
        concurrency=users,
        schedule=name,
        tokens_per_s=median(throughput),
        ci95=median_interval(throughput),
        tokens_per_s_per_user=_median([sum(s) / len(s) for s in speeds]),
        tokens_per_s_per_user_median=_median([median(s) for s in speeds]),
        ttft_ms=median([median([a.ttft_ms for a in run.answers]) for run in runs]),
        accepted_length=median([run.stats.accepted_length for run in runs]),
        verified_per_request=median([_rows_per_round(run.stats) for run in runs]),
        draft_ms=_step_ms(times, "draft_ms"),
        schedule_ms=_step_ms(times, "schedule_ms"),
        verify_ms=_step_ms(times, "verify_ms"),
        identical=identical,
        requests=len(runs[0].answers),
        repeats=len(runs),
    )


def _rows_per_round(stats: Stats) -> float:
    return 1 + stats.verified / stats.rounds if stats.rounds else 1.0


def _step_ms(times: Sequence[RoundTimes], name: str) -> float | None:
    return _median([getattr(t, name) for t in times])


def _median(values: Sequence[float]) -> float | None:
    return median(values) if values else None


def frontiers(rows: Sequence[LoadRow]) -> dict[str, list[Point]]:
    """Per contender its points (per-user speed, throughput), by rising concurrency."""
    found: dict[str, list[Point]] = {}
    for row in sorted(rows, key=lambda row: row.concurrency):
        if row.tokens_per_s_per_user is not None:
            point = (row.tokens_per_s_per_user, row.tokens_per_s)
            found.setdefault(row.schedule, []).append(point)
    return found


def at_floors(rows: Sequence[LoadRow], floors: Sequence[float] = ()) -> list[dict[str, Any]]:
    """The throughput of every contender where no user is slower than a floor.

    Args:
        rows: of `load_rows`.
        floors: tokens per second per user; by default five between the slowest and the fastest
            measured.

    Returns:
        Per floor `tokens_per_s_per_user`, and `tokens_per_s` by contender, interpolated on its
        own frontier; None where the floor is not reached.
    """
    lines = frontiers(rows)
    speeds = [speed for line in lines.values() for speed, _ in line]
    if not floors and speeds:
        floors = spread(speeds, FLOORS)
    return [
        {
            "tokens_per_s_per_user": floor,
            "tokens_per_s": {name: best_at(line, floor) for name, line in lines.items()},
        }
        for floor in floors
    ]


def over_mtp1(rows: Sequence[LoadRow]) -> list[dict[str, Any]]:
    """Every point's per-user speed over that of MTP-1 at the same throughput.

    MTP-1's speed is interpolated on its own frontier; where that has no such throughput, it and
    the gain are None. Empty if MTP-1 did not run.
    """
    baseline = frontiers(rows).get(BASELINE)
    if baseline is None:
        return []
    found = []
    for row in rows:
        if row.schedule == BASELINE or row.tokens_per_s_per_user is None:
            continue
        theirs = matched(baseline, row.tokens_per_s)
        found.append(
            {
                "concurrency": row.concurrency,
                "schedule": row.schedule,
                "tokens_per_s": row.tokens_per_s,
                "tokens_per_s_per_user": row.tokens_per_s_per_user,
                "mtp1_tokens_per_s_per_user": theirs,
                "gain": None if theirs is None else row.tokens_per_s_per_user / theirs - 1,
            }
        )
    return found


def load_report(rows: Sequence[LoadRow], floors: Sequence[float] = ()) -> dict[str, Any]:
    """The JSON keys of a sweep: `rows`, `at_floor` and `over_mtp1`."""
    return {
        "rows": [asdict(row) for row in rows],
        "at_floor": at_floors(rows, floors),
        "over_mtp1": over_mtp1(rows),
    }


MISSING = (
    "The figure is left out: it needs matplotlib; install it with pip install 'dspark[plots]'."
)
# One fixed colour per contender (Okabe and Ito's palette).
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
        rows: from `load_rows`.
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
    _finish(axes, "tokens/s of a user, after the first token", "tokens/s of all users")


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
    _finish(axes, "users", "verified tokens per request and round")


def _finish(axes: Axes, x: str, y: str) -> None:
    axes.set(xlabel=x, ylabel=y)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
