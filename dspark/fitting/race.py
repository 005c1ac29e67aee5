"""Speed-up of a drafter: held-out prompts decoded plainly and as they are served, in turn.

One request at a time, end to end. Each prompt's two runs follow each other at once and change
places from prompt to prompt, so that a slow moment of the machine falls on both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dspark.data.conversations import Prompt
from dspark.data.files.journal import Journal
from dspark.engine.model import Model
from dspark.errors import RequestError
from dspark.evaluation.check.live import render
from dspark.evaluation.metrics import RESAMPLES, interval
from dspark.params import SamplingParams
from dspark.request import Request

WARM_UP_TOKENS = 4


@dataclass(frozen=True)
class Lap:
    """A prompt decoded both ways at one temperature.

    Attributes:
        prompt: its place among the held-out prompts.
        domain: what it is about.
        temperature: of both runs.
        plain_tokens, plain_s: generated plainly, and the seconds that it took.
        tokens, seconds: the same with the drafter.
    """

    prompt: int
    domain: str
    temperature: float
    plain_tokens: int
    plain_s: float
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Held:
    """A held-out prompt with its domain."""

    prompt: Prompt
    domain: str


def race(
    model: Model,
    prompts: Sequence[Held],
    journal_path: Path,
    *,
    temperatures: Sequence[float],
    max_new_tokens: int,
    least: int,
    is_over: Callable[[], bool],
    progress: Callable[[int, int], None],
) -> list[Lap]:
    """Decode prompts both ways until the time is over, `least` of them in any case.

    Laps stand in a journal, so an interrupted race goes on where it was.

    Raises:
        DataError: the journal cannot be written.
        RequestError, NumericsError: decoding failed.
    """
    journal = Journal(journal_path, {"max_new_tokens": max_new_tokens, "drafter": model.name})
    try:
        laps = [Lap(**entry) for _, entry in journal.entries()]
        done = {(lap.prompt, lap.temperature) for lap in laps}
        encoded = render(model, [held.prompt for held in prompts])
        _warm_up(model, encoded[0])
        for number, (held, ids) in enumerate(zip(prompts, encoded, strict=True)):
            if number >= least and is_over():
                break
            for temperature in temperatures:
                if (number, temperature) in done:
                    continue
                params = SamplingParams(max_new_tokens, temperature=temperature, seed=number)
                lap = _lap(model, Request(ids, params), number, held.domain)
                journal.append(asdict(lap))
                laps.append(lap)
            progress(number + 1, len(prompts))
    finally:
        journal.close()
    return laps


def _warm_up(model: Model, ids: Sequence[int]) -> None:
    request = Request(tuple(ids), SamplingParams(WARM_UP_TOKENS))
    for each in (Model(model.target), model):
        each.engine([request], batch_size=1).run([request])


def _lap(model: Model, request: Request, number: int, domain: str) -> Lap:
    order = [Model(model.target), model]
    found: dict[bool, tuple[int, float]] = {}
    for each in order if number % 2 == 0 else order[::-1]:
        engine = each.engine([request], batch_size=1)
        started = time.perf_counter()
        (output,) = engine.run([request])
        seconds = time.perf_counter() - started
        found[each is model] = (len(output.checked().token_ids), seconds)
    (plain_tokens, plain_s), (tokens, seconds) = found[False], found[True]
    temperature = request.params.temperature
    return Lap(number, domain, temperature, plain_tokens, plain_s, tokens, seconds)


def fits(model: Model, prompt: Prompt, max_new_tokens: int) -> bool:
    """Whether a prompt leaves the context room for an answer."""
    try:
        (ids,) = render(model, [prompt])
    except RequestError:  # the template refuses it, or there is none for a dialogue
        return False
    return len(ids) + max_new_tokens <= model.target.max_context


def speedup(laps: Sequence[Lap], *, seed: int = 0) -> Mapping[str, Any]:
    """How many times faster than plain decoding some laps were, and its 95 % interval.

    Tokens per second over tokens per second, all laps together; the interval is that of 2,000
    resamples of the prompts, None of a single one.
    """
    if not laps:
        return {"speedup": None, "ci95": None, "prompts": 0}
    rows = np.array([(x.tokens, x.seconds, x.plain_tokens, x.plain_s) for x in laps])
    weights = np.random.default_rng(seed).multinomial(
        len(laps), np.full(len(laps), 1 / len(laps)), RESAMPLES
    )
    drawn = weights @ rows
    return {
        "speedup": float(_ratio(rows.sum(axis=0))),
        "ci95": interval(_ratio(drawn)) if len(laps) > 1 else None,
        "prompts": len(laps),
    }


def _ratio(sums: Any) -> Any:
    return (sums[..., 0] / sums[..., 1]) / (sums[..., 2] / sums[..., 3])
