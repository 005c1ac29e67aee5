"""What `dspark bench` is told: its options, and what they stand for."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

from dspark.cli.common import (
    Commands,
    add_common_options,
    add_loading_options,
    add_pair_options,
    new_parser,
)
from dspark.cli.options import add_no_profile
from dspark.request import VERIFIERS

if TYPE_CHECKING:
    from dspark.evaluation.load.sweep import ContenderName

EXAMPLE = """\
  dspark bench bundled --threads 1 --out bench
  dspark bench ./target --draft ./drafter --mtp ./mtp --prompts questions.jsonl \\
      --concurrency 1,4,16,64 --floors 20,40 --json"""
SCHEDULES: tuple[ContenderName, ...] = ("off", "fixed", "mtp1", "prefix", "lagged")
ALL_SCHEDULES = (*SCHEDULES, "lookahead")
BUNDLED_MTP = "bundled-mtp"


def bench_parser(commands: Commands) -> argparse.ArgumentParser:
    """The parser of `bench`."""
    summary = "measure throughput and per-user speed under load, every schedule in turn"
    parser = new_parser(commands, "bench", summary, EXAMPLE)
    add_pair_options(parser)
    parser.add_argument(
        "--mtp",
        metavar="DRAFT",
        help="the drafter of mtp1, one draft a round (default: the pair's own where it is an MTP "
        f"drafter; {BUNDLED_MTP} for bundled)",
    )
    _add_load_options(parser)
    _add_request_options(parser)
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="write load.json, and a figure as load.png and load.svg, into this directory",
    )
    add_loading_options(parser)
    add_common_options(parser)
    return parser


def _add_load_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "load",
        "A closed loop: each user sends its next request the moment its answer ends, until the "
        "counted requests, the same for every schedule, are answered; all users are busy all the "
        "time.",
    )
    group.add_argument(
        "--concurrency",
        type=_counts,
        default=(1, 2, 4, 8),
        metavar="C,C",
        help="numbers of users (default: 1,2,4,8)",
    )
    group.add_argument(
        "--schedule",
        type=_schedules,
        metavar="S,S",
        help=f"of {', '.join(ALL_SCHEDULES)} (default: {','.join(SCHEDULES)})",
    )
    group.add_argument(
        "--requests",
        type=int,
        default=16,
        metavar="N",
        help="counted at each concurrency, or twice the users if that is more (default: 16)",
    )
    group.add_argument(
        "--repeats", type=int, default=3, metavar="R", help="medians count (default: 3)"
    )
    add_no_profile(group)
    group.add_argument(
        "--floors",
        type=_speeds,
        default=(),
        metavar="F,F",
        help="per-user tokens/s at which throughput is told (default: five that were measured "
        "between)",
    )


def _add_request_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("requests")
    group.add_argument(
        "--prompts",
        metavar="FILE",
        help="JSON lines with `turns`, `messages` or `prompt`; by default a few built-in questions",
    )
    group.add_argument(
        "--max-new-tokens", type=int, default=64, metavar="N", help="per request (default: 64)"
    )
    group.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 (default) takes the best"
    )
    group.add_argument(
        "--verifier", choices=VERIFIERS, default="block", help="default: %(default)s"
    )


def _counts(text: str) -> tuple[int, ...]:
    """Parse numbers of users: ascending, each once."""
    parts = text.split(",")
    if not all(part.isdecimal() and 1 <= int(part) <= 1 << 16 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of positive integers like 1,2,4")
    return tuple(sorted({int(part) for part in parts}))


def _schedules(text: str) -> tuple[str, ...]:
    """Parse names of schedules, each once."""
    names = tuple(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in ALL_SCHEDULES:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(ALL_SCHEDULES)}")
    return names


def _speeds(text: str) -> tuple[float, ...]:
    """Parse per-user speeds."""
    try:
        speeds = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers like 20,40") from error
    if not all(math.isfinite(speed) and speed > 0 for speed in speeds):
        raise argparse.ArgumentTypeError(f"{text!r} holds a speed that is not above 0")
    return speeds
