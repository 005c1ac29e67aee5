"""Report files: HTML, Markdown, JSON, and pictures if matplotlib is installed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dspark.evaluation.load.report import can_draw
from dspark.evaluation.report.document import document, page
from dspark.evaluation.report.sections import pieces_of
from dspark.scheduling.json_files import write_json

MISSING = (
    "The figures are left out, the tables hold what they would show: they need matplotlib; install "
    "it with pip install 'dspark[plots]'."
)


def write_report(
    report: Mapping[str, Any], directory: Path, warn: Callable[[str], None]
) -> list[Path]:
    """Write `report.html`, `report.md`, `report.json` and a PNG for each figure.

    Args:
        report: of `results.report_of`.
        directory: made where it is missing.
        warn: told once where figures are left out.

    Returns:
        The paths, the HTML first.

    Raises:
        DataError: the folder cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"report.{kind}" for kind in ("html", "md", "json")]
    write_json(paths[2], report)
    pictures: dict[str, bytes] = {}
    drawings: dict[str, str] = {}
    if can_draw():
        from dspark.evaluation.report.figures import draw

        for name, figure in draw(report).items():
            pictures[name], drawings[name] = figure.png, figure.svg
    else:
        warn(MISSING)
    for name, picture in pictures.items():
        paths.append(directory / f"{name}.png")
        paths[-1].write_bytes(picture)
    pieces = pieces_of(report, tuple(pictures))
    paths[0].write_text(page(pieces, drawings), encoding="utf-8")
    paths[1].write_text(document(pieces), encoding="utf-8")
    return paths
