"""A report as Markdown, its figures as files beside it."""

from __future__ import annotations

from collections.abc import Sequence

from dspark.evaluation.report.document import Grid, Heading, Picture, Piece, Text


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
