"""A report as a list of headings, paragraphs, tables and figures, whatever it is written in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Report = Mapping[str, Any]
Cells = tuple[str, ...]


@dataclass(frozen=True)
class Heading:
    """A heading; level 1 is the title."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    """A paragraph, or fixed-width text."""

    text: str
    fixed: bool = False


@dataclass(frozen=True)
class Grid:
    """A table: its first column names the rows, the others hold numbers."""

    head: Cells
    rows: tuple[Cells, ...]


@dataclass(frozen=True)
class Picture:
    """A figure, by the name of its file, and what it shows."""

    name: str
    caption: str


Piece = Heading | Text | Grid | Picture


def number(value: float | None) -> str:
    """Two decimals, or none where it is large."""
    return "-" if value is None else f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"


def percent(value: float | None) -> str:
    """A share in percent."""
    return "-" if value is None else f"{100 * value:.1f} %"


def share(value: float | None) -> str:
    """A share, two decimals."""
    return "-" if value is None else f"{value:.2f}"


def three(value: float | None) -> str:
    """Three decimals."""
    return "-" if value is None else f"{value:.3f}"


def setting(value: Any) -> str:
    """A setting as it is."""
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def with_interval(row: Report | None) -> str:
    """An accepted length with its interval."""
    if row is None or row["accepted_length"] is None:
        return "-"
    ends = "" if row["ci95"] is None else " ({:.2f} to {:.2f})".format(*row["ci95"])
    return f"{row['accepted_length']:.2f}{ends}"


def gain(row: Report | None) -> str:
    """A ratio as a gain in percent, with its interval."""
    if row is None:
        return "-"
    ends = ""
    if row["ci95"] is not None:
        low, high = (100 * (end - 1) for end in row["ci95"])
        ends = f" ({low:+.1f} to {high:+.1f})"
    return f"{100 * (row['ratio'] - 1):+.1f} %{ends}"
