"""A tiny target that speaks, and made-up drafters whose faults are planted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dspark.attention.paged_cache import BlockTable, CacheShape, PagedCache
from dspark.attention.ragged_batch import RaggedBatch
from dspark.data.conversations import Prompt
from dspark.data.templates import train_tokenizer
from dspark.drafters.base import BorrowedParts, DraftBatch, Draw, Proposal
from dspark.drafters.dspark import DSparkDrafter
from dspark.drafters.eagle3 import Eagle3Drafter
from dspark.targets.target import Target
from tests.helpers.drafters import tiny_dspark, tiny_eagle3
from tests.helpers.targets import tiny_qwen3

LAYERS, CONTEXT = 5, 160
TEXTS = ("the cat", "the dog sat", "on the mat, and")


def new_tokenizer() -> Any:
    texts = ["the cat sat on the mat, and the dog sat on the cat"] * 4
    return train_tokenizer(texts, 280)


def make_target(tokenizer: Any = None, *, vocab: int | None = None) -> Target:
    """A random Qwen3 whose logits are spread wide, and that never ends an answer."""
    model = tiny_qwen3(
        seed=3,
        vocab_size=vocab or len(tokenizer),
        num_hidden_layers=LAYERS,
        max_position_embeddings=CONTEXT,
    )
    return Target.from_model(model, name="tiny", tokenizer=tokenizer)


def make_drafter(target: Target, **changes: Any) -> DSparkDrafter:
    """A random DSpark drafter, bound to the target."""
    return tiny_dspark(target, taps=(0, 2), **changes)


@dataclass
class KnowingDrafter:
    """Drafts by the target's own logits, times `ill_at_ease` where it is not at ease.

    It is at ease if the last feature that it was shown is the output of the layers `wants`, and
    if the request's tokens please it.
    """

    target: Target
    taps: tuple[int, ...] = (0, 2)
    wants: tuple[int, ...] = (0, 2)
    pleased: Callable[[list[int]], bool] = lambda _tokens: True
    block_size: int = 4
    ill_at_ease: float = -1.0
    context_shapes: tuple[CacheShape, ...] = ()
    reads_next_token: bool = False
    rows_ahead: int = 0
    shown: dict[int, torch.Tensor] = field(default_factory=dict)

    def bind(self, parts: BorrowedParts) -> None:
        """Nothing to borrow."""

    def observe(
        self,
        context: PagedCache,
        batch: RaggedBatch,
        features_TF: torch.Tensor,
        next_tokens_T: torch.Tensor,
    ) -> None:
        for at, row in zip(batch.rows_T.tolist(), features_TF, strict=True):
            self.shown[at] = row

    def propose(self, context: PagedCache, batch: DraftBatch, draw: Draw) -> Proposal:
        sequences = [list(tokens) for tokens in batch.tokens]
        signs = torch.tensor(
            [
                self.mood(table, length, tokens)
                for table, length, tokens in zip(
                    batch.tables, batch.lengths, sequences, strict=True
                )
            ]
        )
        for step in range(batch.num_drafts):
            tokens = draw(step, self.forward(sequences).logits_NV * signs[:, None]).tolist()
            for ids, token in zip(sequences, tokens, strict=True):
                ids.append(token)
        return Proposal()

    def mood(self, table: BlockTable, length: int, tokens: list[int]) -> float:
        true_F = self.forward([tokens[:length]], self.wants).features_TF[-1]
        [row] = table.rows(length - 1, length)
        shown_F = self.shown[row]
        known = torch.allclose(shown_F, true_F, rtol=1e-3, atol=1e-3)
        return 1.0 if known and self.pleased(tokens) else self.ill_at_ease

    def forward(self, sequences: list[list[int]], taps: tuple[int, ...] = ()) -> Any:
        ragged = RaggedBatch.fresh(sequences)
        last = torch.tensor(ragged.offsets[1:]) - 1
        return self.target.forward(ragged, taps=taps, logit_rows=last)


class OtherwiseBlocks(DSparkDrafter):
    """Drafts what `knowing` does under the slot convention `other`, else the same token always."""

    knowing: KnowingDrafter
    other: bool

    def observe(self, *rows: Any) -> None:
        self.knowing.observe(*rows)

    def propose(self, context: PagedCache, batch: DraftBatch, draw: Draw) -> Proposal:
        scale = float(self.config.sample_from_anchor == self.other)
        return self.knowing.propose(
            context, batch, lambda step, logits, *tokens: draw(step, scale * logits, *tokens)
        )


class KnowingChain(Eagle3Drafter):
    """Drafts what `knowing` does."""

    knowing: KnowingDrafter

    def observe(self, *rows: Any) -> None:
        self.knowing.observe(*rows)

    def propose(self, context: PagedCache, batch: DraftBatch, draw: Draw) -> Proposal:
        return self.knowing.propose(context, batch, draw)


def make_eagle3(target: Target, *, taps: tuple[int, ...] = (0, 2), **changes: Any) -> Eagle3Drafter:
    """A random Eagle3 drafter, bound to the target."""
    return tiny_eagle3(target, taps=taps, **changes)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return new_tokenizer()


@pytest.fixture(scope="session")
def target(tokenizer: Any) -> Target:
    return make_target(tokenizer)


@pytest.fixture(scope="session")
def prompts() -> tuple[Prompt, ...]:
    return tuple(Prompt(({"role": "user", "content": text},), text) for text in TEXTS)


@pytest.fixture(scope="session")
def tiny() -> SimpleNamespace:
    """The functions above."""
    return SimpleNamespace(
        layers=LAYERS,
        new_tokenizer=new_tokenizer,
        make_target=make_target,
        make_drafter=make_drafter,
        KnowingDrafter=KnowingDrafter,
        OtherwiseBlocks=OtherwiseBlocks,
        make_eagle3=make_eagle3,
        KnowingChain=KnowingChain,
    )


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
