"""A tiny target that speaks, and made-up drafters whose faults are planted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from dspark.attention.layout import RaggedBatch
from dspark.attention.pages import BlockTable, CacheShape, PagedCache
from dspark.data.conversations import Prompt
from dspark.data.tokenizer import train_tokenizer
from dspark.drafters.base import BorrowedParts, DraftBatch, Draw, Proposal
from dspark.drafters.config import BackboneConfig, DSparkConfig
from dspark.drafters.dspark import DSparkDrafter
from dspark.drafters.eagle3 import Eagle3Config, Eagle3Drafter
from dspark.targets.target import Target

LAYERS, WIDTH, CONTEXT = 5, 16, 160
TEXTS = ("the cat", "the dog sat", "on the mat, and")


def new_tokenizer() -> Any:
    texts = ["the cat sat on the mat, and the dog sat on the cat"] * 4
    return train_tokenizer(texts, 280)


def make_target(tokenizer: Any = None, *, vocab: int | None = None) -> Target:
    """A random Qwen3 whose logits are spread wide, and that never ends an answer."""
    torch.manual_seed(3)
    config = Qwen3Config(
        vocab_size=vocab or len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=CONTEXT,
        initializer_range=0.7,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return Target.from_model(Qwen3ForCausalLM(config).eval(), name="tiny", tokenizer=tokenizer)


def make_drafter(
    target: Target,
    *,
    kind: type[DSparkDrafter] = DSparkDrafter,
    draft_tokens: torch.Tensor | None = None,
    **changes: Any,
) -> DSparkDrafter:
    """A random DSpark drafter, bound to the target."""
    taps = (0, 2)
    backbone = BackboneConfig(
        hidden_size=WIDTH,
        intermediate_size=24,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        num_taps=len(taps),
    )
    fields: dict[str, Any] = {
        "vocab_size": target.vocab_size,
        "block_size": 4,
        "mask_token_id": 3,
        "target_layer_ids": taps,
        "num_target_layers": LAYERS,
        "markov_rank": 4,
    }
    config = DSparkConfig(backbone, **(fields | changes))
    generator = torch.Generator().manual_seed(1)
    return kind.from_target(
        target.parts(), config, generator=generator, draft_tokens=draft_tokens
    ).eval()


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
        return self.knowing.propose(context, batch, lambda step, logits: draw(step, scale * logits))


class KnowingChain(Eagle3Drafter):
    """Drafts what `knowing` does."""

    knowing: KnowingDrafter

    def observe(self, *rows: Any) -> None:
        self.knowing.observe(*rows)

    def propose(self, context: PagedCache, batch: DraftBatch, draw: Draw) -> Proposal:
        return self.knowing.propose(context, batch, draw)


def make_eagle3(
    target: Target, *, kind: type[Eagle3Drafter] = Eagle3Drafter, **changes: Any
) -> Eagle3Drafter:
    """A random Eagle3 drafter, bound to the target; MTP-1 with one tap and a `ttt_length` of 1."""
    fields: dict[str, Any] = {
        "vocab_size": target.vocab_size,
        "target_layer_ids": (0, 2),
        "num_target_layers": LAYERS,
        "ttt_length": 4,
    }
    fields |= changes
    taps = len(fields["target_layer_ids"])
    config = Eagle3Config(BackboneConfig(WIDTH, 24, 1, 4, 2, 8, num_taps=taps), **fields)
    generator = torch.Generator().manual_seed(1)
    return kind.from_target(target.parts(), config, generator=generator).eval()


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
