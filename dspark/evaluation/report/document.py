"""Report documents: their pieces (headings, text, tables, figures), as Markdown and as HTML.

The HTML is one file with its figures inline and no network access, for any screen width; Markdown
refers to figures as files beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
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
    """Two decimals, none for large numbers."""
    return "-" if value is None else f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"


def percent(value: float | None) -> str:
    """A share in percent."""
    return "-" if value is None else f"{100 * value:.1f} %"


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


def document(pieces: Sequence[Piece]) -> str:
    """The Markdown text of a report."""
    return "\n\n".join(_markdown_piece(piece) for piece in pieces) + "\n"


def _markdown_piece(piece: Piece) -> str:
    if isinstance(piece, Heading):
        return f"{'#' * piece.level} {piece.text}"
    if isinstance(piece, Text):
        return f"```\n{piece.text}\n```" if piece.fixed else piece.text
    if isinstance(piece, Picture):
        return f"![{piece.caption}]({piece.name}.png)\n\n*{piece.caption}*"
    return _markdown_table(piece)


def _markdown_table(grid: Grid) -> str:
    lines = [grid.head, ("---", *["---:"] * (len(grid.head) - 1)), *grid.rows]
    cells = (
        " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) for line in lines
    )
    return "\n".join(f"| {line} |" for line in cells)


_STYLE = """
:root { color-scheme: light dark; --text: #1c2024; --soft: #60646c; --line: #d9d9e0;
  --page: #ffffff; --band: #f4f4f6; --figure: #ffffff; }
@media (prefers-color-scheme: dark) { :root { --text: #edeef0; --soft: #b0b4ba; --line: #43484e;
  --page: #111113; --band: #1d1f22; --figure: #e8e8ec; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 64rem; color: var(--text);
  background: var(--page); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p { max-width: 44rem; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0;
  background: var(--page); white-space: normal; min-width: 8rem; }
thead th { background: var(--band); } thead th:first-child { background: var(--band); }
figure { margin: 1rem 0; } figcaption { color: var(--soft); font-size: .85rem; max-width: 44rem; }
figure svg { width: 100%; height: auto; background: var(--figure); border-radius: .4rem; }
pre { overflow-x: auto; padding: .8rem; background: var(--band); border-radius: .4rem;
  font-size: .8rem; }
"""


def page(pieces: Sequence[Piece], drawings: Mapping[str, str]) -> str:
    """The page of a report.

    Args:
        pieces: what it says.
        drawings: SVG texts by the names of the figures.
    """
    title = next(piece.text for piece in pieces if isinstance(piece, Heading))
    body = "\n".join(_html_piece(piece, drawings) for piece in pieces)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n"
        "</body>\n</html>\n"
    )


def _html_piece(piece: Piece, drawings: Mapping[str, str]) -> str:
    if isinstance(piece, Heading):
        return f"<h{piece.level}>{escape(piece.text)}</h{piece.level}>"
    if isinstance(piece, Text):
        kind = "pre" if piece.fixed else "p"
        return f"<{kind}>{escape(piece.text)}</{kind}>"
    if isinstance(piece, Picture):
        svg = drawings[piece.name]
        return f"<figure>{svg}<figcaption>{escape(piece.caption)}</figcaption></figure>"
    return _html_table(piece)


def _html_table(grid: Grid) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in grid.head)
    rows = "\n".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in grid.rows
    )
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table>'
        "</div>"
    )
