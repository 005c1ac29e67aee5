"""What runs under load say: intervals of medians, and throughput against per-user speed.

A schedule's frontier is the line through its measured points (per-user speed, throughput), one per
concurrency, in their order. Nothing is said beyond its ends but that whoever is served at one
speed is served at every lower one.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

Point = tuple[float, float]
"""(x, y), such as (per-user tokens/s, tokens/s)."""

_RESAMPLES = 2000


def median(values: Sequence[float]) -> float:
    """The median, as a plain number."""
    return float(np.median(values))


def median_interval(values: Sequence[float], *, seed: int = 0) -> tuple[float, float] | None:
    """A 95 % interval of the median: the percentile bootstrap over the values.

    With few values it cannot be narrower than what they are: of five, the interval is nearly
    always their smallest and largest. None for fewer than two.
    """
    if len(values) < 2:
        return None
    drawn = np.random.default_rng(seed).choice(np.asarray(values), (_RESAMPLES, len(values)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    return float(low), float(high)


def best_at(points: Sequence[Point], floor: float) -> float | None:
    """The highest y of a frontier where x is at least `floor`; None if it never is.

    Args:
        points: neighbours are joined by straight lines.
        floor: least x.
    """
    best = [y for x, y in points if x >= floor]
    for (x0, y0), (x1, y1) in pairwise(points):
        if min(x0, x1) < floor <= max(x0, x1):
            best.append(y0 + (y1 - y0) * (floor - x0) / (x1 - x0))
    return max(best) if best else None


def matched(points: Sequence[Point], y: float) -> float | None:
    """The highest x at which a frontier has just this y; None where it has no such point."""
    found = [x for x, at in points if at == y]
    for (x0, y0), (x1, y1) in pairwise(points):
        if min(y0, y1) < y < max(y0, y1):
            found.append(x0 + (x1 - x0) * (y - y0) / (y1 - y0))
    return max(found) if found else None


def spread(values: Sequence[float], count: int) -> list[float]:
    """So many numbers evenly between the least and the greatest value, both left out.

    They are rounded to three digits.
    """
    inner = np.linspace(min(values), max(values), count + 2)[1:-1]
    return [float(f"{value:.3g}") for value in inner]
