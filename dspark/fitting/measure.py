"""Speed of this machine: short timed trials of generation and training."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from dspark.data.features.encoder import target_features
from dspark.data.files.atomic import replace_file, writing
from dspark.data.files.json_lines import write_json_lines
from dspark.data.samples import Sample
from dspark.engine.model import Model
from dspark.fitting.recipe import Shape, recipe_of
from dspark.params import SamplingParams
from dspark.request import Request
from dspark.training.run import plan_recipe

PROMPT_TOKENS, NEW_TOKENS, WARM_UP_TOKENS = 24, 16, 2
TRIAL_ROWS, TRIAL_TOKENS, TRIAL_ANCHORS = 2, 128, (8, 64)
"""Samples of a timed training step, their token limit, and anchors per sample (at most half of its
tokens)."""
LEAST_TOKENS = 16
"""Of a sample all of whose tokens are anchors."""
CODED_BYTES = 0.4
"""Bytes per number of a coded feature cache (docs/feature_cache.md)."""
ROUND_COST = 1.5
"""Cost of a round of K drafts relative to K + 1 decoded rows, drafting included."""


@dataclass(frozen=True)
class Speeds:
    """Measured speeds.

    Attributes:
        batch_size: requests at once in batched generation.
        batch_tokens_per_s: of such a batch, all requests together.
        single_tokens_per_s: of a single request.
        step_s: seconds of a training step whatever its samples: the optimiser's.
        row_s: seconds of the target's forward over a sample.
        anchor_s: seconds of a training step per anchor.
        feature_bytes: of a sample's features in a cache, about.
        memory_bytes: peak of this process up to a training step, optimiser included.
        checkpoint_bytes: disk space of a training.
        parameters: of the drafter.
    """

    batch_size: int
    batch_tokens_per_s: float
    single_tokens_per_s: float
    step_s: float
    row_s: float
    anchor_s: float
    feature_bytes: int
    memory_bytes: int
    checkpoint_bytes: int
    parameters: int

    @property
    def from_cache(self) -> Speeds:
        """The speeds of training steps that read features from a cache."""
        return replace(self, row_s=0.0)

    def whole_step_s(self, rows: int, anchors: int) -> float:
        """Seconds of a training step of `rows` samples with `anchors` anchors each."""
        return self.step_s + rows * (self.row_s + anchors * self.anchor_s)

    def round_s(self, drafts: int) -> float:
        """Approximate seconds of a round of `drafts` drafts of a request in a batch."""
        return ROUND_COST * (drafts + 1) / self.batch_tokens_per_s


def generation_speeds(model: Model, *, batch_size: int, seed: int) -> dict[str, Any]:
    """Fields of `Speeds`: of a batch of generation and of a request alone.

    Args:
        model: the target, without a drafter.
        batch_size: requests at once.
        seed: of the random tokens.
    """
    generator = random.Random(seed)
    return {
        "batch_size": batch_size,
        "batch_tokens_per_s": _tokens_per_s(model, batch_size, generator),
        "single_tokens_per_s": _tokens_per_s(model, 1, generator),
    }


def training_speeds(model: Model, shape: Shape, *, row_tokens: int, seed: int) -> dict[str, Any]:
    """Fields of `Speeds`: of training steps of two sizes.

    Args:
        model: the target, without a drafter.
        shape: of the drafter to train.
        row_tokens: tokens of a training sample.
        seed: of the random tokens.
    """
    generator = random.Random(seed)
    tokens = min(row_tokens, TRIAL_TOKENS)
    if shape.whole_answers:
        trials = min(max(tokens // 4, LEAST_TOKENS), tokens // 2), tokens
        return _whole_rows(model, shape, row_tokens, trials, generator, seed)
    least, most = TRIAL_ANCHORS
    most = max(min(most, tokens // 2), least + 1)
    few, many = (_step(model, shape, anchors, tokens, generator, seed) for anchors in (least, most))
    per_anchor = max(many["seconds"] - few["seconds"], 0.05 * many["seconds"]) / (
        (most - least) * TRIAL_ROWS
    )
    beside = max(few["seconds"] - TRIAL_ROWS * least * per_anchor, 0.0)
    per_row = min(_forward_s(model, shape, tokens, generator), beside / TRIAL_ROWS)
    return {
        "step_s": beside - TRIAL_ROWS * per_row,
        "row_s": per_row * row_tokens / tokens,
        "anchor_s": per_anchor,
        **_sizes(model, shape, row_tokens, many),
    }


def _whole_rows(
    model: Model,
    shape: Shape,
    row_tokens: int,
    trials: tuple[int, int],
    generator: random.Random,
    seed: int,
) -> dict[str, Any]:
    """`training_speeds` where every token is an anchor: of steps on short and on longer rows.

    Args:
        model: as there.
        shape: as there.
        row_tokens: as there.
        trials: tokens of either's rows.
        generator: of the tokens.
        seed: as there.
    """
    short, long = trials
    few, many = (_step(model, shape, tokens, tokens, generator, seed) for tokens in trials)
    per_token = max(many["seconds"] - few["seconds"], 0.05 * many["seconds"]) / (
        (long - short) * TRIAL_ROWS
    )
    forward_s = min(_forward_s(model, shape, long, generator) / long, 0.95 * per_token)
    return {
        "step_s": max(few["seconds"] - TRIAL_ROWS * short * per_token, 0.0),
        "row_s": forward_s * row_tokens,
        "anchor_s": per_token - forward_s,
        **_sizes(model, shape, row_tokens, many),
    }


def _sizes(
    model: Model, shape: Shape, row_tokens: int, trial: Mapping[str, float]
) -> dict[str, int]:
    """What a training needs of memory and disk."""
    width = (len(shape.taps) + 1) * model.target.hidden_size
    return {
        "feature_bytes": int(CODED_BYTES * width * row_tokens),
        "memory_bytes": int(trial["memory"]),
        "checkpoint_bytes": int(trial["disk"]),
        "parameters": int(trial["parameters"]),
    }


def _forward_s(model: Model, shape: Shape, row_tokens: int, generator: random.Random) -> float:
    """Seconds of the target's forward over a sample, as in training."""
    rows = [_random_ids(model, row_tokens, generator) for _ in range(TRIAL_ROWS)]
    samples = [Sample(tuple(ids), (True,) * row_tokens) for ids in rows]
    taken = []
    for _ in range(2):  # the first one warms up
        started = time.perf_counter()
        target_features(model.target, samples, shape.taps)
        taken.append(time.perf_counter() - started)
    return min(taken) / TRIAL_ROWS


def _random_ids(model: Model, count: int, generator: random.Random) -> list[int]:
    return [generator.randrange(model.target.vocab_size) for _ in range(count)]


def _tokens_per_s(model: Model, count: int, generator: random.Random) -> float:
    """Generated tokens per second of `count` requests, sampled as answers are."""
    most = max(min(NEW_TOKENS, model.target.max_context - PROMPT_TOKENS - 1), 1)
    prompts = [tuple(_random_ids(model, PROMPT_TOKENS, generator)) for _ in range(count)]
    params = SamplingParams(most, temperature=1.0, top_p=0.95, ignore_eos=True)
    requests = [Request(ids, params.with_seed(i)) for i, ids in enumerate(prompts)]
    engine = model.engine(requests, batch_size=count, schedule="fixed")
    for request in requests:
        engine.add(request)
    for _ in range(WARM_UP_TOKENS):
        engine.step()
    started, tokens = time.perf_counter(), 0
    while engine.has_work:
        tokens += len(engine.step())
    return tokens / (time.perf_counter() - started)


def _step(
    model: Model, shape: Shape, anchors: int, row_tokens: int, generator: random.Random, seed: int
) -> dict[str, float]:
    """Time and memory of a training step on random tokens."""
    target = model.target
    with tempfile.TemporaryDirectory(prefix="dspark-fit-") as folder:
        rows = [_random_ids(model, row_tokens, generator) for _ in range(TRIAL_ROWS)]
        path = Path(folder) / "samples.jsonl"
        _write_samples(
            path, rows, 1 if shape.whole_answers else min(PROMPT_TOKENS, row_tokens // 4)
        )
        recipe = recipe_of(
            target,
            shape,
            paths=[str(path)],
            output=Path(folder) / "training",
            steps=1,
            rows=TRIAL_ROWS,
            anchors=anchors,
            max_length=row_tokens,
            save_every=1,
            seed=seed,
        )
        budget = plan_recipe(
            str(write_recipe(recipe, Path(folder))),
            device=str(target.device),
            console=Console(quiet=True),
            target=target,
        )
    assert budget.seconds_per_step is not None
    return {
        "seconds": budget.seconds_per_step,
        "memory": budget.memory_bytes["measured"],
        "disk": budget.disk_bytes,
        "parameters": budget.parameters,
    }


def _write_samples(path: Path, rows: Sequence[Sequence[int]], prompt_len: int) -> None:
    with write_json_lines(path) as write:
        for row in rows:
            write({"input_ids": list(row), "prompt_len": prompt_len})


def write_recipe(recipe: dict[str, Any], folder: Path) -> Path:
    """Write a recipe for `dspark train`.

    Raises:
        DataError: it cannot be written.
    """
    path = folder / "recipe.yaml"
    with writing(path):
        replace_file(path, yaml.safe_dump(recipe, sort_keys=False))
    return path
