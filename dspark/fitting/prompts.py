"""Prompts of a fit: collected or self-written, and split before training."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from dspark.data.conversations import RECORD_KEYS, Prompt, as_prompt, read_record
from dspark.data.files.json_lines import read_json_lines, stem, write_json_lines
from dspark.data.prompts.collect import train_record
from dspark.data.prompts.dedup import digest, near_text
from dspark.data.prompts.sources import DataSet, read_rows
from dspark.errors import DataError, UsageError

SELF_WRITTEN = "self-written"
TRAIN, CALIBRATION, HELD_OUT = "train.jsonl", "calibration.jsonl", "heldout.jsonl"
MOST_ROWS = 200_000
"""Rows that are read of one source."""


@dataclass(frozen=True)
class Collected:
    """Prompts without duplicates.

    Attributes:
        domains: records that `regenerate` reads, by domain: a file's name, or its `category`.
        duplicates: how many were left out.
        malformed: lines that hold no prompt.
    """

    domains: dict[str, list[dict[str, Any]]]
    duplicates: int = 0
    malformed: int = 0

    @property
    def count(self) -> int:
        """All prompts."""
        return sum(map(len, self.domains.values()))


def collect(sources: Sequence[str], *, seed: int, offline: bool) -> Collected:
    """Read prompts, of each domain in an order that the seed names.

    Args:
        sources: JSON-lines files, folders of them, or data sets.
        seed: of the order.
        offline: read what is on this machine only.

    Raises:
        DataError: a source is missing, or no prompt is left.
    """
    domains: dict[str, list[dict[str, Any]]] = {}
    seen, duplicates, malformed = set[int](), 0, 0
    for source in sources:
        name = stem(Path(source)) or source
        rows = read_rows(DataSet(source), RECORD_KEYS, offline=offline, stream=True)
        for row in islice(rows, MOST_ROWS):
            try:
                record = row.whole()
                found = read_record(record, row.where)
            except DataError:
                malformed += 1
                continue
            near = digest(map(near_text, found.asked))
            if near in seen:
                duplicates += 1
                continue
            seen.add(near)
            category = record.get("category")
            domain = category if isinstance(category, str) and category else name
            domains.setdefault(domain, []).append(train_record(found))
    if not domains:
        raise DataError(
            f"No prompt is in {', '.join(sources)} ({malformed} lines hold none); give others, or "
            "none, and the model writes them itself."
        )
    for prompts in domains.values():
        prompts.sort(key=lambda record: str(record["id"]))
        random.Random(seed).shuffle(prompts)
    return Collected(domains, duplicates, malformed)


def self_written(path: Path) -> Collected:
    """The prompts of a file that the model has written."""
    return Collected({SELF_WRITTEN: [record for _, record in read_json_lines(path)]})


def split(
    collected: Collected,
    folder: Path,
    *,
    heldout: int,
    calibration: int,
    answers: int,
    fits: Callable[[Prompt], bool],
) -> dict[str, int]:
    """Write what is held out, what calibrates and what is trained on, no prompt in two of them.

    Each part has prompts of all domains in turn, so that any beginning of it is a fair share.

    Args:
        collected: the prompts.
        folder: for the three files.
        heldout: prompts to evaluate with, at most.
        calibration: prompts to calibrate with, at most.
        answers: prompts to train on, at most.
        fits: whether a prompt leaves the model's context room for an answer; others are left out.

    Returns:
        The numbers of prompts, by part.

    Raises:
        DataError: a file cannot be written.
        UsageError: no prompt is left to train on.
    """
    fitting = (row for row in _in_turn(collected.domains) if fits(as_prompt(row[1], row[0])))
    mixed = list(islice(fitting, heldout + calibration + answers))
    # Where fewer came together than were planned, most of them are still trained on.
    heldout, calibration = (min(n, max(len(mixed) // 4, 1)) for n in (heldout, calibration))
    parts = {
        HELD_OUT: mixed[:heldout],
        CALIBRATION: mixed[heldout : heldout + calibration],
        TRAIN: mixed[heldout + calibration :][:answers],
    }
    if not parts[TRAIN]:
        raise UsageError(
            f"There are {len(mixed)} prompts that fit the model's context, of which "
            f"{heldout + calibration} are kept to calibrate and to evaluate; give more."
        )
    for name, rows in parts.items():
        with write_json_lines(folder / name) as write:
            for domain, record in rows:
                write({**record, "category": domain})
    return {Path(name).stem: len(rows) for name, rows in parts.items()}


def _in_turn(domains: dict[str, list[dict[str, Any]]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for row in zip_longest(*domains.values()):
        for name, record in zip(domains, row, strict=True):
            if record is not None:
                yield name, record
