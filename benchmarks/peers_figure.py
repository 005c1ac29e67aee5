"""A figure of what `benchmarks.peers` measured: `python -m benchmarks.peers_figure LINES.json PNG`.

The file holds JSON lines of any modes and threads; each gets a panel, the last line of a mode and
number of threads counts. It needs the extra `plots`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

OURS_COLOUR, OTHERS = "#c1440e", ("#3b6ea5", "#6b9bc9", "#5f7f5f", "#9aa96b", "#8a7ca8", "#b9a7c9")
Lines = Mapping[str, float]
"""Value by the number on the x axis, as text."""


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The measurements of a file, the last of each mode and number of threads.

    Raises:
        SystemExit: it holds none.
    """
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for text in path.read_text().splitlines():
        if text.startswith("{"):
            line = json.loads(text)
            if line.get("benchmark") == "peers":
                found[line["mode"], line["environment"]["threads"]] = line
    if not found:
        raise SystemExit(f"{path} holds no line of benchmarks.peers.")
    return list(found.values())


def series(line: Mapping[str, Any]) -> dict[str, Lines]:
    """Tokens per second by way, of a measurement with an x axis."""
    if line["mode"] == "batch":
        return dict(line["batch"])
    name, value = {
        "context": ("context", "decode_tokens_per_s"),
        "servers": ("servers", "tokens_per_s"),
    }[line["mode"]]
    return {way: {x: row[value] for x, row in by_x.items()} for way, by_x in line[name].items()}


def draw(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write the figure.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(lines), figsize=(5.2 * len(lines), 4.2), squeeze=False)
    for axis, line in zip(axes[0], lines, strict=True):
        if line["mode"] == "decoding":
            _bars(axis, {n: row["decode_tokens_per_s"] for n, row in line["ways"].items()})
        else:
            _curves(axis, series(line), _X_LABELS[line["mode"]])
        machine = line["environment"]
        axis.set_title(f"{line['mode']}, {machine['threads']} thread(s)", fontsize=10)
    machine = lines[0]["environment"]
    figure.suptitle(f"{lines[0]['settings']['model']} on {machine['cpu']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


_X_LABELS = {
    "context": "tokens of the prompt",
    "batch": "requests at once",
    "servers": "users",
}


def _colours(ways: Sequence[str]) -> list[str]:
    others = [way for way in ways if not way.startswith("dspark")]
    return [
        OTHERS[others.index(way) % len(OTHERS)] if way in others else OURS_COLOUR for way in ways
    ]


def _bars(axis: Any, speeds: Mapping[str, float]) -> None:
    ways = list(speeds)[::-1]
    axis.barh(ways, [speeds[way] for way in ways], color=_colours(ways))
    for i, way in enumerate(ways):
        axis.text(speeds[way], i, f" {speeds[way]:.1f}", va="center", fontsize=8)
    axis.set_xlabel("tokens/s of an answer, one request")
    axis.tick_params(axis="y", labelsize=8)


def _curves(axis: Any, by_way: Mapping[str, Lines], label: str) -> None:
    for (way, line), colour in zip(by_way.items(), _colours(list(by_way)), strict=True):
        style = "--" if way.endswith("draft") else "-"
        axis.plot([int(x) for x in line], list(line.values()), style, color=colour, label=way)
    axis.set_xscale("log", base=2)
    ticks = sorted({int(x) for line in by_way.values() for x in line})
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.set_xlabel(label)
    axis.set_ylabel("tokens/s")
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=7)


def main() -> None:
    """Read the lines and draw them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("lines", type=Path)
    parser.add_argument("figure", type=Path)
    args = parser.parse_args()
    draw(read_lines(args.lines), args.figure)


if __name__ == "__main__":
    main()
