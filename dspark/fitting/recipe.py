"""The training recipe of a fit: a drafter's shape derived from its target."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dspark.drafters.config import evenly_spaced_taps
from dspark.errors import CompatibilityError, UsageError
from dspark.targets.target import Target
from dspark.training.drafters.new_drafter import has_copyable_layers

BLOCK_SIZE = 7
FEWEST_SUPERVISED = 8
COVERAGE = 0.995
SMALL_VOCABULARY = 8192
"""Vocabularies up to this size are drafted whole."""
VOCABULARY_STEP = 64
RATE_AT_WIDTH = (6e-4, 2048)
"""Peak learning rate at a hidden width; it falls with the root of the width."""
CE_FIRST_SHARE = 0.1
DTYPES = {"torch.float32": "float32", "torch.bfloat16": "bfloat16"}


@dataclass(frozen=True)
class Shape:
    """A drafter's shape.

    Attributes:
        layers: draft layers.
        rank: of the Markov head.
        taps: target layers that it reads.
        draft_vocabulary: tokens that it can propose; None for all.
        learning_rate: peak rate.
    """

    layers: int
    rank: int
    taps: tuple[int, ...]
    draft_vocabulary: int | None
    learning_rate: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def of(cls, record: dict[str, Any]) -> Shape:
        """What `as_dict` gave."""
        return cls(**{**record, "taps": tuple(record["taps"])})


def choose_shape(target: Target, training_s: float) -> Shape:
    """A drafter's shape for a target and a training time.

    The sequential head's rank grows with the vocabulary, its depth with the time that there is to
    train it; both cost time in every round.
    """
    rate, width = RATE_AT_WIDTH
    hours = training_s / 3600
    layers = 1 if hours < 0.1 else 2 if hours < 4 else 3 if hours < 24 else 5
    rank = 32 if target.vocab_size <= 1024 else 64 if target.vocab_size <= SMALL_VOCABULARY else 128
    return Shape(
        layers=min(layers, target.num_layers),
        rank=256 if hours >= 24 and rank == 128 else rank,
        taps=choose_taps(target.num_layers),
        draft_vocabulary=expected_vocabulary(target.vocab_size),
        learning_rate=float(f"{rate * math.sqrt(width / target.hidden_size):.2g}"),
    )


def choose_taps(num_layers: int) -> tuple[int, ...]:
    """Five layers, spread as published drafters have them; of a shallow target all that fit."""
    try:
        return evenly_spaced_taps(num_layers, 5)
    except CompatibilityError:
        count = min(num_layers, 5)
        if count == 1:
            return (0,)
        return tuple(round(i * (num_layers - 1) / (count - 1)) for i in range(count))


def expected_vocabulary(vocab_size: int) -> int | None:
    """About how many tokens a drafter will know, before there are answers to choose them by."""
    return None if vocab_size <= SMALL_VOCABULARY else vocab_size // 4


def choose_vocabulary(
    answers: Sequence[Sequence[int]], vocab_size: int
) -> tuple[int | None, float]:
    """How many tokens a drafter is to know, and the share of the answers' tokens that these are.

    The most frequent tokens that make up 99.5 % of the answers, and at least a quarter of the
    vocabulary, since answers that have not been seen hold further tokens; all of it where that
    saves little. The share is measured on the last quarter of the answers by the choice of the
    others, where there are enough of them.

    Args:
        answers: token ids of the target's own answers.
        vocab_size: of the target.
    """
    expected = expected_vocabulary(vocab_size)
    if expected is None:
        return None, 1.0
    counts = Counter(token for answer in answers for token in answer)
    total, covered, needed = counts.total(), 0, 0
    for _, count in counts.most_common():
        if covered >= COVERAGE * total:
            break
        covered, needed = covered + count, needed + 1
    size = max(needed, expected)
    size = -(-size // VOCABULARY_STEP) * VOCABULARY_STEP
    if size > 0.75 * vocab_size:
        return None, 1.0
    return size, _coverage(answers, size)


def _coverage(answers: Sequence[Sequence[int]], size: int) -> float:
    """The share of later answers' tokens among the `size` commonest of the earlier ones."""
    edge = len(answers) * 3 // 4 or len(answers)
    counts = Counter(token for answer in answers[:edge] for token in answer)
    ranked = [token for token, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
    known = set(ranked[:size])
    # Of tokens that no answer holds those of lower id are known, as in training.
    known |= set(_lowest_unseen(counts, size - len(known)))
    later = [token for answer in (answers[edge:] or answers) for token in answer]
    return sum(token in known for token in later) / max(len(later), 1)


def _lowest_unseen(seen: Counter[int], count: int) -> list[int]:
    found: list[int] = []
    token = 0
    while len(found) < count:
        if token not in seen:
            found.append(token)
        token += 1
    return found


def training_dtype(target: Target) -> str:
    """The dtype that a drafter is trained in: its target's.

    Raises:
        UsageError: training has no such dtype.
    """
    found = DTYPES.get(str(target.dtype))
    if found is None:
        raise UsageError(
            f"The target is loaded in {str(target.dtype).removeprefix('torch.')}, in which nothing "
            "is trained; give --dtype bfloat16 or float32."
        )
    return found


def recipe_of(
    target: Target,
    shape: Shape,
    *,
    paths: Sequence[str],
    output: Path,
    steps: int,
    rows: int,
    anchors: int,
    max_length: int,
    save_every: int,
    seed: int,
    features: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """A recipe that `dspark train` runs too.

    Args:
        target: what is drafted for.
        shape: of the drafter.
        paths: files of answers.
        output: folder of the training.
        steps: of the training.
        rows: samples per step.
        anchors: per row at most.
        max_length: tokens of a sample at most.
        save_every: steps between checkpoints.
        seed: names what is drawn.
        features: where the target's features come from, where not from the target in the step.
    """
    drafter: dict[str, Any] = {
        "num_layers": shape.layers,
        "block_size": BLOCK_SIZE,
        "markov_rank": shape.rank,
        "target_layer_ids": list(shape.taps),
        "initial_layers": "target" if has_copyable_layers(target) else "random",
    }
    if shape.draft_vocabulary is not None:
        drafter["draft_vocab_size"] = shape.draft_vocabulary
    return {
        "kind": "drafter",
        "algorithm": "dspark",
        "target": target.name,
        "drafter": drafter,
        "loss": {"ce_first_steps": int(CE_FIRST_SHARE * steps)},
        "samples": {
            "paths": list(paths),
            "max_length": max_length,
            "min_supervised": FEWEST_SUPERVISED,
            "num_anchors": anchors,
        },
        "optimiser": {"learning_rate": shape.learning_rate},
        "run": {
            "output_dir": str(output),
            "steps": steps,
            "rows": rows,
            "seed": seed,
            "dtype": training_dtype(target),
            "save_every": save_every,
        },
    } | ({} if features is None else {"features": features})
