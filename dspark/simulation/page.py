"""The page of a capacity plan: one HTML file, with its figures inline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from dspark.errors import DataError
from dspark.evaluation.load.report import can_draw
from dspark.evaluation.report.document import (
    Grid,
    Heading,
    Picture,
    Piece,
    Text,
    number,
    page,
    percent,
)
from dspark.simulation.planning import Plan, Row, gains

MISSING = (
    "The page has tables only: its figures need matplotlib; install it with pip install "
    "'dspark[plots]'."
)
_CAPTIONS = {
    "frontier": "Throughput against per-user speed (Fig. 7 of the paper), one point per number of "
    "users, each of whom always has one request in flight.",
    "verified": "Verified tokens per request and round, the anchor included, against users "
    "(Fig. 8).",
    "ttft": "Time to first token that 95 % of requests keep below, against the rate of arrivals; "
    "dotted: the service level.",
    "speed": "Median speed of a user against the rate of arrivals.",
}


def write_page(plan: Plan, about: Mapping[str, str], path: Path) -> bool:
    """Write the page; whether it has figures.

    Args:
        plan: what was simulated.
        about: name -> value of what it was simulated of.
        path: the file.

    Raises:
        DataError: it cannot be written.
    """
    drawings: dict[str, str] = {}
    if can_draw():
        from dspark.simulation.figures import draw

        drawings = {name: drawing.svg for name, drawing in draw(plan).items()}
    text = page(pieces_of(plan, about, tuple(drawings)), drawings)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error.strerror}); name another.") from error
    return bool(drawings)


def pieces_of(plan: Plan, about: Mapping[str, str], pictures: Sequence[str]) -> list[Piece]:
    """What the page says.

    Args:
        plan: what was simulated.
        about: as `write_page`.
        pictures: names of the figures that were drawn.
    """

    def picture(*names: str) -> list[Piece]:
        return [Picture(name, _CAPTIONS[name]) for name in names if name in pictures]

    found: list[Piece] = [Heading(f"Capacity plan: {about['target']}", 1)]
    found += _largest_rates(plan)
    if plan.rows:
        found += [
            Heading("At these rates"),
            Text(
                "Requests come by themselves. Times to the first token and speeds of a user are at "
                "p50 / p95 / p99: what 95 % of requests keep below, and what 95 % of users reach."
            ),
            Grid(_HEAD, tuple(_cells(row) for row in plan.rows)),
            *picture("ttft", "speed"),
        ]
    if plan.frontier:
        found += [
            Heading("Throughput and speed"),
            *picture("frontier", "verified"),
            Grid(_HEAD, tuple(_cells(row) for row in plan.frontier)),
            *_gains(plan.frontier),
        ]
    found += [
        Heading("What was simulated"),
        Grid(("", ""), tuple((name, value) for name, value in about.items())),
    ]
    return found


def _largest_rates(plan: Plan) -> list[Piece]:
    level = plan.level
    speed = "" if level.tokens_per_s is None else f" and at least {level.tokens_per_s:g} tokens/s"
    text = (
        f"Service level: for {level.percentile:g} % of requests the first token within "
        f"{level.ttft_ms:g} ms{speed}."
    )
    rows = tuple((name, number(rate)) for name, rate in plan.max_rate.items())
    return [
        Heading("Largest rate within the service level"),
        Text(text),
        Grid(("schedule", "requests per second"), rows),
    ]


_HEAD = (
    "schedule",
    "requests/s",
    "users",
    "tokens/s",
    "first token, ms",
    "tokens/s of a user",
    "accepted length",
    "verified",
    "busy",
    "cost per million",
)


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.schedule,
        number(row.rate),
        f"{row.users:.1f}" if row.rate is not None else f"{row.users:.0f}",
        number(row.tokens_per_s),
        " / ".join(f"{ms:.0f}" for ms in row.ttft_ms.values()),
        " / ".join("-" if v is None else f"{v:.3g}" for v in row.tokens_per_s_per_user.values()),
        number(row.accepted_length),
        number(row.verified_per_request),
        percent(row.busy),
        number(row.cost_per_million_tokens),
    )


def _gains(rows: Sequence[Row]) -> list[Piece]:
    names = dict.fromkeys(row.schedule for row in rows)
    baseline = "mtp1" if "mtp1" in names else "off"
    found = gains(rows, baseline) if baseline in names else []
    lines = tuple(
        (gain["schedule"], f"{gain['users']:.0f}", _over(gain["speed"]), _over(gain["throughput"]))
        for gain in found
    )
    if not lines:
        return []
    said = {"mtp1": "MTP-1", "off": "plain decoding"}[baseline]
    return [
        Text(
            f"Over {said}: a user's speed at the same throughput, and the throughput at the same "
            f"speed of a user, on the lines of the figure; a dash where {said} does not get there."
        ),
        Grid(("schedule", "users", "speed", "throughput"), lines),
    ]


def _over(ratio: float | None) -> str:
    return "-" if ratio is None else f"{100 * (ratio - 1):+.0f} %"
