"""A time budget as users write it."""

from __future__ import annotations

import math
import re

from dspark.errors import UsageError

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
