"""Tiny random targets and drafters, some of them made up, that every test of this room shares."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dspark.attention.paged_cache import CacheShape, PagedCache
from dspark.attention.ragged_batch import RaggedBatch
from dspark.data.templates import train_tokenizer
from dspark.drafters.base import BorrowedParts, DraftBatch, Draw, Proposal
from dspark.drafters.dspark import DSparkDrafter
from dspark.drafters.eagle3 import Eagle3Drafter
from dspark.drafters.ngram import NgramDrafter
from dspark.engine.engine import Engine
from dspark.engine.speculation.schedule import Schedule
from dspark.request import Output, Request, SamplingParams
from dspark.targets.target import Target
from tests.helpers.drafters import tiny_backbone, tiny_dspark, tiny_eagle3
from tests.helpers.targets import tiny_qwen3

MAX_CONTEXT = 96


def make_model(
    *, vocab: int = 64, layers: int = 2, dtype: torch.dtype = torch.float32, seed: int = 2
) -> Any:
    return tiny_qwen3(
        seed=seed,
        dtype=dtype,
        vocab_size=vocab,
        num_hidden_layers=layers,
        max_position_embeddings=MAX_CONTEXT,
    )


def make_target(*, tokenizer: Any = None, **options: Any) -> Target:
    return Target.from_model(make_model(**options), name="tiny", tokenizer=tokenizer)


def make_drafter(
    target: Target,
    *,
    head: str = "vanilla",
    block_size: int = 5,
    std: float = 0.3,
    markov_rank: int = 8,
    **changes: Any,
) -> DSparkDrafter:
    """A random DSpark drafter, bound to the target; `known` is a reduced vocabulary."""
    changes |= {"markov_head_type": head, "block_size": block_size, "markov_rank": markov_rank}
    return tiny_dspark(target, taps=(-1, 0), std=std, **changes)


def make_eagle3(
    target: Target,
    *,
    mtp: bool = False,
    passes: int = 5,
    seed: int = 1,
    std: float = 0.3,
    **layer: Any,
) -> Eagle3Drafter:
    """A random Eagle3 drafter, or MTP-1, bound to the target; `layer` changes its backbone."""
    last = mtp or layer.get("input_projection", False)
    taps = (target.num_layers - 1,) if last else (-1, 0)
    backbone = tiny_backbone(target.hidden_size, len(taps), **layer)
    passes = 1 if mtp else passes
    return tiny_eagle3(target, taps=taps, seed=seed, std=std, backbone=backbone, ttt_length=passes)


@dataclass
class MadeUpDrafter:
    """The part that drafters without parameters, taps and context share."""

    block_size: int = 5

    @property
    def taps(self) -> tuple[int, ...]:
        return ()

    @property
    def context_shapes(self) -> tuple[CacheShape, ...]:
        return ()

    @property
    def reads_next_token(self) -> bool:
        return False

    @property
    def rows_ahead(self) -> int:
        return 0

    def bind(self, parts: BorrowedParts) -> None:
        """Nothing to borrow."""

    def observe(
        self,
        context: PagedCache,
        batch: RaggedBatch,
        features_TF: Tensor,
        next_tokens_T: Tensor,
    ) -> None:
        """Nothing to keep."""


class TargetDrafter(MadeUpDrafter):
    """Drafts from the target itself: `factor` 1 is nearly always right, -1 nearly never.

    With `spoil` n, each token that follows one divisible by n is drafted from reversed logits.
    """

    def __init__(
        self, target: Target, *, factor: float = 1.0, spoil: int = 0, block_size: int = 5
    ) -> None:
        super().__init__(block_size)
        self.target, self.factor, self.spoil = target, factor, spoil

    def propose(self, context: PagedCache, batch: DraftBatch, draw: Draw) -> Proposal:
        sequences = [list(tokens) for tokens in batch.tokens]
        for step in range(batch.num_drafts):
            ragged = RaggedBatch.fresh(sequences)
            last = torch.tensor(ragged.offsets[1:]) - 1
            logits_RV = self.target.forward(ragged, logit_rows=last).logits_NV
            assert logits_RV is not None
            factors = [
                -1.0 if self.spoil and ids[-1] % self.spoil == 0 else self.factor
                for ids in sequences
            ]
            tokens = draw(step, logits_RV * logits_RV.new_tensor(factors)[:, None]).tolist()
            for ids, token in zip(sequences, tokens, strict=True):
                ids.append(token)
        return Proposal(torch.zeros(len(sequences), batch.num_drafts))


class MarkovDrafter(MadeUpDrafter):
    """Law and confidence of a draft hang on the token before it, by random tables."""

    def __init__(self, vocab: int, *, block_size: int = 4, seed: int = 0) -> None:
        super().__init__(block_size)
        generator = torch.Generator().manual_seed(seed)
        self.logits_VV = torch.randn(vocab, vocab, generator=generator)
        self.confidence_V = torch.randn(vocab, generator=generator) + 0.7

    def propose(self, context: PagedCache, batch: DraftBatch, draw: Draw) -> Proposal:
        tokens = [batch.anchors_R]
        for step in range(batch.num_drafts):
            tokens.append(draw(step, self.logits_VV[tokens[-1]]))
        return Proposal(self.confidence_V[torch.stack(tokens[:-1], dim=1)])


class HeadlessDrafter(MarkovDrafter):
    """The same without confidences of its own."""

    def propose(self, context: PagedCache, batch: DraftBatch, draw: Draw) -> Proposal:
        super().propose(context, batch, draw)
        return Proposal()


def make_prompts(count: int, vocab: int, *, seed: int = 0, longest: int = 20) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(0, vocab, (n,), generator=generator).tolist() for n in lengths]


def make_requests(prompts: Sequence[Sequence[int]], **params: Any) -> list[Request]:
    """One request per prompt; prompt i draws with `seed + i`."""
    base = SamplingParams(**params)
    return [
        Request(tuple(prompt), base.with_seed(base.seed + i)) for i, prompt in enumerate(prompts)
    ]


def decode(
    target: Target,
    drafter: Any,
    requests: Sequence[Request],
    *,
    threshold: Any = None,
    **options: Any,
) -> list[Output]:
    """Outputs of a fresh engine."""
    if threshold is not None:
        options["schedule"] = Schedule("threshold", threshold)
    options.setdefault("max_length", MAX_CONTEXT)
    return Engine(target, drafter, **options).run(requests)


def deviation(counts: Counter[Any], law: dict[Any, float]) -> float:
    """Chi-squared as standard deviations of a normal (Wilson & Hilferty 1931)."""
    total = sum(counts.values())
    if any(law.get(outcome, 0) == 0 for outcome in counts):
        return math.inf  # what cannot be has been
    cells = [(counts[x], total * p) for x, p in law.items() if total * p >= 5]
    rare = (total - sum(n for n, _ in cells), total - sum(e for _, e in cells))
    if rare[1] >= 5:
        cells.append(rare)
    statistic = sum((n - e) ** 2 / e for n, e in cells)
    degrees = len(cells) - 1
    assert degrees > 20
    spread = 2 / (9 * degrees)
    return ((statistic / degrees) ** (1 / 3) - 1 + spread) / math.sqrt(spread)


def token_ids(outputs: Sequence[Output]) -> list[tuple[int, ...]]:
    return [output.token_ids for output in outputs]


def collect(engine: Engine, requests: Sequence[Request]) -> list[Output]:
    """Outputs of all requests, those that an error ended included."""
    ids = [engine.add(request) for request in requests]
    outputs = {}
    while engine.has_work:
        for event in engine.step():
            if event.output is not None:
                outputs[event.request_id] = event.output
    return [outputs[i] for i in ids]


def ngram(target: Target) -> NgramDrafter:
    drafter = NgramDrafter(block_size=4)
    drafter.bind(target.parts())
    return drafter


@pytest.fixture(scope="session")
def tiny() -> SimpleNamespace:
    """Everything above."""
    return SimpleNamespace(
        max_context=MAX_CONTEXT,
        make_model=make_model,
        make_target=make_target,
        make_drafter=make_drafter,
        make_eagle3=make_eagle3,
        TargetDrafter=TargetDrafter,
        MarkovDrafter=MarkovDrafter,
        HeadlessDrafter=HeadlessDrafter,
        ngram=ngram,
        make_prompts=make_prompts,
        make_requests=make_requests,
        decode=decode,
        token_ids=token_ids,
        deviation=deviation,
        collect=collect,
    )


@pytest.fixture(scope="session")
def target() -> Target:
    """A target of 64 tokens in fp32, without a tokenizer."""
    return make_target()


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A byte-level tokenizer that has learned hardly any merges."""
    texts = ["the cat sat on the mat, and the dog sat on the cat"] * 4
    return train_tokenizer(texts, 280)


@pytest.fixture(scope="session")
def talker(tokenizer: Any) -> Target:
    """A target with that tokenizer."""
    return make_target(vocab=len(tokenizer), tokenizer=tokenizer, seed=3)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder beside the project that holds larger test material."""
    return Path(__file__).parents[2].parent / "shared"
