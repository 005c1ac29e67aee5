"""Arrival process: when requests come, and how long their prompts and answers are."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from dspark.errors import DataError, UsageError
from dspark.simulation.jobs import Job
from dspark.simulation.traffic import FloatArray, IntArray


@dataclass(frozen=True)
class Lengths:
    """How long prompts, or answers, are: log-normal, in tokens.

    Attributes:
        mean: their mean, 1 at least.
        spread: standard deviation over mean; 0 makes all alike.

    Raises:
        UsageError: a number is not possible.
    """

    mean: float
    spread: float = 0.0

    def __post_init__(self) -> None:
        if not (1 <= self.mean < math.inf and 0 <= self.spread < math.inf):
            raise UsageError(
                f"Lengths of {self.mean} tokens with a spread of {self.spread} cannot be; give a "
                "mean of 1 or more, and a spread of 0 or more."
            )

    def draw(self, count: int, generator: np.random.Generator) -> IntArray:
        """So many lengths, [count], 1 at least."""
        if not self.spread:
            return np.full(count, round(self.mean), dtype=np.int64)
        variance = math.log1p(self.spread**2)
        drawn = generator.lognormal(math.log(self.mean) - variance / 2, math.sqrt(variance), count)
        return np.maximum(np.rint(drawn), 1).astype(np.int64)


@dataclass(frozen=True)
class Arrivals:
    """N requests in the order in which they come.

    Attributes:
        at_s_N: seconds since the first, never falling.
        prompt_N, answer_N: tokens, 1 at least.
        stream_N: which stream of the acceptance profile each answer follows; None draws them.
    """

    at_s_N: FloatArray
    prompt_N: IntArray
    answer_N: IntArray
    stream_N: IntArray | None = None

    def __len__(self) -> int:
        return len(self.at_s_N)

    @property
    def rate(self) -> float:
        """Requests per second; infinite where all come at once."""
        span_s = float(self.at_s_N[-1] - self.at_s_N[0])
        return (len(self) - 1) / span_s if span_s > 0 else math.inf

    def jobs(self) -> list[Job]:
        """The requests, as a server takes them."""
        streams = [None] * len(self) if self.stream_N is None else self.stream_N.tolist()
        columns = (self.prompt_N.tolist(), self.answer_N.tolist(), self.at_s_N.tolist())
        return [Job(i, *row) for i, row in enumerate(zip(*columns, streams, strict=True))]

    def first(self, count: int) -> Arrivals:
        """The first requests, as far as there are so many."""
        return Arrivals(
            self.at_s_N[:count],
            self.prompt_N[:count],
            self.answer_N[:count],
            None if self.stream_N is None else self.stream_N[:count],
        )

    def at_rate(self, rate: float) -> Arrivals:
        """The same requests, bursts included, at another mean rate.

        Raises:
            UsageError: they all come at once, so that no rate can be made of them.
        """
        if not math.isfinite(self.rate):
            raise UsageError("All requests of the trace come at once; give two moments at least.")
        return replace(self, at_s_N=self.at_s_N * (self.rate / rate))


def drawn_arrivals(
    count: int, prompts: Lengths, answers: Lengths, *, burstiness: float = 1.0, seed: int = 0
) -> Arrivals:
    """Random requests, one per second in the mean.

    Args:
        count: N, 2 at least.
        prompts: their lengths.
        answers: theirs.
        burstiness: shape of the gamma law of the times between them: 1 is a Poisson process,
            smaller comes in bursts, larger more evenly.
        seed: of the draws.

    Raises:
        UsageError: a number is not possible.
    """
    if count < 2 or not 0 < burstiness < math.inf:
        raise UsageError(
            f"{count} requests of burstiness {burstiness} cannot be simulated; give 2 or more, and "
            "a burstiness above 0."
        )
    times, lengths = (np.random.default_rng((seed, i)) for i in range(2))
    gaps_N = times.gamma(burstiness, 1 / burstiness, count - 1)
    at_s_N = np.concatenate(([0.0], np.cumsum(gaps_N)))
    found = Arrivals(at_s_N, prompts.draw(count, lengths), answers.draw(count, lengths))
    return found.at_rate(1.0)


# What columns are called: here, in the Mooncake traces, and in Azure's LLM inference traces.
_NAMES = {
    "at": ("arrival_s", "timestamp", "TIMESTAMP"),
    "prompt": ("prompt_tokens", "input_length", "ContextTokens"),
    "answer": ("answer_tokens", "output_length", "GeneratedTokens"),
}
_MILLISECONDS = "timestamp"


def read_trace(path: Path) -> Arrivals:
    """Requests of a file: JSON lines, or CSV with a head.

    Columns `arrival_s`, `prompt_tokens`, `answer_tokens`; or `timestamp` in milliseconds,
    `input_length`, `output_length`; or `TIMESTAMP` as date and time, `ContextTokens`,
    `GeneratedTokens`. Others are ignored; requests without an answer are left out.

    Raises:
        DataError: the file is missing, damaged, or has fewer than 2 requests.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = _rows(text)
        found = sorted(_request(row) for row in rows)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is no trace ({error}); give JSON lines or CSV with arrival_s, prompt_tokens "
            "and answer_tokens."
        ) from error
    found = [row for row in found if row[2] > 0]
    if len(found) < 2:
        raise DataError(f"{path} has fewer than 2 requests with an answer.")
    at_s_N, prompt_N, answer_N = (np.array(column) for column in zip(*found, strict=True))
    return Arrivals(at_s_N - at_s_N[0], np.maximum(prompt_N, 1), answer_N)


def _rows(text: str) -> list[Mapping[str, Any]]:
    lines = [line for line in text.splitlines() if line.strip()]
    if lines and lines[0].lstrip().startswith("{"):
        return [json.loads(line) for line in lines]
    return list(csv.DictReader(lines))


def _request(row: Mapping[str, Any]) -> tuple[float, int, int]:
    names = {key: next(n for n in known if n in row) for key, known in _present(row).items()}
    at = row[names["at"]]
    try:
        at_s = float(at)
    except ValueError:
        at_s = datetime.fromisoformat(str(at)[:26]).timestamp()
    if names["at"] == _MILLISECONDS:
        at_s /= 1e3
    tokens = [int(row[names[key]]) for key in ("prompt", "answer")]
    if not math.isfinite(at_s) or min(tokens) < 0:
        raise ValueError(f"a request at {at} of {tokens} tokens")
    return at_s, tokens[0], tokens[1]


def _present(row: Mapping[str, Any]) -> Mapping[str, tuple[str, ...]]:
    for known in _NAMES.values():
        if not any(name in row for name in known):
            raise KeyError(f"no column {known[0]}")
    return _NAMES
