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
"""Limit of rows read from one source."""


@dataclass(frozen=True)
class Collected:
    """Prompts without duplicates.

    Attributes:
        domains: records for `regenerate`, by domain: a file's name, or its `category`.
        duplicates: number of dropped duplicates.
        malformed: number of lines without a prompt.
    """

    domains: dict[str, list[dict[str, Any]]]
    duplicates: int = 0
    malformed: int = 0

    @property
    def count(self) -> int:
        """Number of prompts."""
        return sum(map(len, self.domains.values()))


def collect(sources: Sequence[str], *, seed: int, offline: bool) -> Collected:
    """Read prompts, each domain in a seeded order.

    Args:
        sources: JSON-lines files, folders of them, or data sets.
        seed: of the order.
        offline: read only what is on this machine.

    Raises:
        DataError: a source is missing, or no prompt remains.
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
    """The prompts of a file of self-written prompts."""
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
    """Write disjoint files of held-out, calibration and training prompts.

    Each alternates between domains, so that any prefix is a fair share.

    Args:
        collected: the prompts.
        folder: for the three files.
        heldout: limit of prompts for evaluation.
        calibration: limit of prompts for calibration.
        answers: limit of prompts for training.
        fits: whether a prompt leaves room for an answer in the context; others are dropped.

    Returns:
        The numbers of prompts, by part.

    Raises:
        DataError: a file cannot be written.
        UsageError: no training prompt remains.
    """
    fitting = (row for row in _in_turn(collected.domains) if fits(as_prompt(row[1], row[0])))
    mixed = list(islice(fitting, heldout + calibration + answers))
    # With fewer prompts than planned, most are still used for training.
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
