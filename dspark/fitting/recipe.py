"""The training recipe of a fit: a drafter's shape derived from its target."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from dspark.drafters.config import evenly_spaced_taps
from dspark.errors import CompatibilityError, UsageError
from dspark.targets.target import Target
from dspark.training.drafters.warm_start import has_copyable_layers
from dspark.training.optim import usual_learning_rate

BLOCK_SIZE = 7
SHORT_BLOCKS = ((1, 1.5e6), (3, 6e6), (5, 2e7))
"""Block sizes, each below so many anchors, which are counted as if blocks had one draft."""
EAGLE3_TAPS, BLOCK_TAPS = 3, 5
"""Captured layers, as many as published drafters of either kind read."""
FEWEST_SUPERVISED = 8
COVERAGE = 0.995
SMALL_VOCABULARY = 8192
"""Smaller vocabularies are not reduced."""
VOCABULARY_STEP = 64
CE_FIRST_SHARE = 0.1
MATRIX_RATE = 2.7
"""Muon's peak rate over AdamW's (docs/LOG.md, "Short trainings of SmolLM2's drafter")."""
DTYPES = {"torch.float32": "float32", "torch.bfloat16": "bfloat16"}


@dataclass(frozen=True)
class Shape:
    """A drafter's shape.

    A drafter of one draft per round is an Eagle3: its layer begins from the target's last state
    beside the token, and learns from few answers what a block drafter must find by attention
    (docs/LOG.md, "One draft per round: Eagle3 or DSpark").

    Attributes:
        layers: draft layers; of an Eagle3 one.
        rank: of the Markov head, which an Eagle3 lacks.
        taps: captured target layers.
        draft_vocabulary: size of a reduced vocabulary; None for all tokens.
        learning_rate: peak rate.
        block_size: drafts per round.
    """

    layers: int
    rank: int
    taps: tuple[int, ...]
    draft_vocabulary: int | None
    learning_rate: float
    block_size: int = BLOCK_SIZE

    @property
    def algorithm(self) -> Literal["dspark", "eagle3"]:
        """What is trained."""
        return "eagle3" if self.block_size == 1 else "dspark"

    @property
    def whole_answers(self) -> bool:
        """Whether every token of an answer is an anchor, as an Eagle3 trains."""
        return self.algorithm == "eagle3"

    @classmethod
    def of(cls, record: dict[str, Any]) -> Shape:
        """The shape from `asdict`."""
        return cls(**{**record, "taps": tuple(record["taps"])})


def choose_shape(target: Target, training_s: float, block_size: int = 1) -> Shape:
    """A drafter's shape for a target, a training time and drafts per round.

    The sequential head's rank grows with the vocabulary, the number of layers with the training
    time; both cost time in every round.
    """
    if block_size == 1:
        return Shape(
            layers=1,
            rank=0,
            taps=choose_taps(target.num_layers, EAGLE3_TAPS),
            draft_vocabulary=expected_vocabulary(target.vocab_size),
            learning_rate=usual_learning_rate(target.hidden_size),
            block_size=1,
        )
    hours = training_s / 3600
    layers = 1 if hours < 1 else 2 if hours < 4 else 3 if hours < 24 else 5
    rank = 32 if target.vocab_size <= 1024 else 64 if target.vocab_size <= SMALL_VOCABULARY else 128
    return Shape(
        layers=min(layers, target.num_layers),
        rank=256 if hours >= 24 and rank == 128 else rank,
        taps=choose_taps(target.num_layers),
        draft_vocabulary=expected_vocabulary(target.vocab_size),
        learning_rate=usual_learning_rate(target.hidden_size),
        block_size=block_size,
    )


def choose_block_size(anchors: float) -> int:
    """Drafts per round of a drafter that could be trained on so many anchors of one draft.

    The last drafts of a young drafter hardly ever stay, but cost as much training as the first
    (docs/LOG.md, "Blocks of one draft").
    """
    return next((size for size, most in SHORT_BLOCKS if anchors < most), BLOCK_SIZE)


def choose_taps(num_layers: int, count: int = BLOCK_TAPS) -> tuple[int, ...]:
    """So many layers, spaced as in published drafters; fewer for a shallow target."""
    try:
        return evenly_spaced_taps(num_layers, count)
    except CompatibilityError:
        last = num_layers - 1 - (num_layers > count)  # the last layer's state engines cannot tap
        count = min(num_layers, count)
        return tuple(round(i * last / max(count - 1, 1)) for i in range(count))


def expected_vocabulary(vocab_size: int) -> int | None:
    """Expected size of the draft vocabulary, before answers determine it."""
    return None if vocab_size <= SMALL_VOCABULARY else vocab_size // 6


def choose_vocabulary(
    answers: Sequence[Sequence[int]], vocab_size: int
) -> tuple[int | None, float]:
    """Size of the draft vocabulary, and its share of the answers' tokens.

    The most frequent tokens that make up 99.5 % of the answers, and at least a sixth of the
    vocabulary, since unseen answers contain further tokens; all of it if that saves little. The
    share is measured on the last quarter of the answers with the choice of the others, if there are
    enough.

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
    """Share of later answers' tokens among the `size` most frequent of earlier ones."""
    edge = len(answers) * 3 // 4 or len(answers)
    counts = Counter(token for answer in answers[:edge] for token in answer)
    ranked = [token for token, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
    known = set(ranked[:size])
    # Unseen tokens are filled up by lowest id, as in training.
    unseen = (token for token in itertools.count() if token not in counts)
    known |= set(islice(unseen, max(size - len(known), 0)))
    later = [token for answer in (answers[edge:] or answers) for token in answer]
    return sum(token in known for token in later) / max(len(later), 1)


def training_dtype(target: Target) -> str:
    """The dtype of the training: the target's.

    Raises:
        UsageError: training does not support it.
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
    """A recipe, also usable with `dspark train`.

    Args:
        target: the target.
        shape: of the drafter.
        paths: files of answers.
        output: folder of the training.
        steps: of the training.
        rows: samples per step.
        anchors: per row at most; an Eagle3 takes all.
        max_length: tokens of a sample at most.
        save_every: steps between checkpoints.
        seed: of the training.
        features: settings of the feature source; None computes features online.
    """
    samples = {
        "paths": list(paths),
        "max_length": max_length,
        "min_supervised": FEWEST_SUPERVISED,
    }
    blocks = shape.algorithm == "dspark"
    return {
        "kind": "drafter",
        "algorithm": shape.algorithm,
        "target": target.name,
        "drafter": _drafter_of(target, shape),
        "loss": {"ce_first_steps": int(CE_FIRST_SHARE * steps)} if blocks else {},
        "samples": samples | ({"num_anchors": anchors} if blocks else {}),
        "optimiser": {
            "name": "muon",
            "learning_rate": shape.learning_rate,
            "matrix_learning_rate": MATRIX_RATE * shape.learning_rate,
            "betas": [0.9, 0.98],
        },
        "run": {
            "output_dir": str(output),
            "steps": steps,
            "rows": rows,
            "seed": seed,
            "dtype": training_dtype(target),
            "save_every": save_every,
        },
    } | ({} if features is None else {"features": features})


def _drafter_of(target: Target, shape: Shape) -> dict[str, Any]:
    """The recipe's drafter."""
    found: dict[str, Any] = {"target_layer_ids": list(shape.taps)}
    if shape.draft_vocabulary is not None:
        found["draft_vocab_size"] = shape.draft_vocabulary
    if shape.algorithm == "eagle3":
        return found | {"layers": "llama", "ttt_length": shape.block_size}
    return found | {
        "num_layers": shape.layers,
        "block_size": shape.block_size,
        "markov_rank": shape.rank,
        "initial_layers": "target" if has_copyable_layers(target) else "random",
    }
