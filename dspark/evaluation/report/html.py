"""A report as one HTML file: its figures within, nothing from the network, any width of screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from dspark.evaluation.report.document import Grid, Heading, Picture, Piece, Text

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
