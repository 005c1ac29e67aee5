"""Golden files, tiny drafters and targets' parts for the drafters' tests."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dspark.attention.packed import BlockLayout
from dspark.attention.paged_cache import BlockTable, PagedCache
from dspark.attention.ragged_batch import RaggedBatch
from dspark.data.samples import Sample, SampleBatch
from dspark.drafters.base import DraftBatch
from dspark.drafters.checkpoints.checkpoint import load_drafter
from dspark.drafters.config import GEMMA4_PARTS, BackboneConfig, DSparkConfig
from dspark.drafters.dspark import DSparkDrafter
from dspark.drafters.eagle3 import Eagle3Config, Eagle3Drafter
from dspark.targets.forward import TargetParts
from dspark.training.losses.blocks import AnchorBlocks, sample_anchors
from tests.helpers.targets import lent_parts, parts_in

GOLDEN = Path(__file__).parents[1] / "golden" / "dspark_vanilla"


class Greedy:
    """A draw that takes the argmax, or given tokens, and remembers logits and their tokens."""

    def __init__(self, forced=None):
        self.logits, self.tokens, self.forced, self.known = [], [], forced, []

    def __call__(self, step: int, logits_RC: Tensor, tokens: Tensor | None = None) -> Tensor:
        assert step == len(self.tokens)
        self.logits.append(logits_RC)
        self.known.append(tokens)
        tokens_R = logits_RC.argmax(-1)
        if tokens is not None:
            known_RC = tokens.expand_as(logits_RC)
            tokens_R = known_RC.gather(1, tokens_R[:, None]).squeeze(1)
        if self.forced is not None:
            tokens_R = torch.full_like(tokens_R, self.forced[step])
        self.tokens.append(tokens_R)
        return self.tokens[-1]


@pytest.fixture
def one_block():
    """The layout of one block that sees all rows of its context."""

    def make(context: int, slots: int) -> BlockLayout:
        return BlockLayout(torch.tensor([0]), torch.tensor([context]), slots)

    return make


@pytest.fixture
def run_training():
    """Hidden states [M, K, H] of sampled blocks over a context each, and the blocks."""

    def run(drafter, features_TF, ids, lengths=(), anchors=6, seed=3):
        samples, first = [], 0
        for length in lengths or (len(ids),):
            own = tuple(ids[first : first + length])
            samples.append(Sample(own, (True,) * length))
            first += length
        batch = SampleBatch.of(samples)
        sources = [torch.Generator().manual_seed(seed + i) for i in range(len(samples))]
        blocks = AnchorBlocks.build(
            batch, sample_anchors(batch, anchors, sources), drafter.block_size
        )
        hidden = drafter(
            features_TF,
            batch.positions_T,
            blocks.tokens_M,
            blocks.positions_MK,
            blocks.layout(drafter.config.block_size),
        )
        return hidden, blocks

    return run


@pytest.fixture
def golden():
    return GOLDEN


@pytest.fixture
def golden_parts():
    return parts_in(GOLDEN / "target")


@pytest.fixture
def golden_drafter(golden_parts):
    drafter = load_drafter(GOLDEN / "draft")
    drafter.bind(golden_parts)
    return drafter


@pytest.fixture
def tiny_config():
    backbone = BackboneConfig(
        hidden_size=16,
        intermediate_size=24,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=6,
        num_taps=3,
        attention_bias=True,
    )
    return DSparkConfig(
        backbone=backbone,
        vocab_size=37,
        block_size=5,
        mask_token_id=36,
        target_layer_ids=(-1, 1, 4),
        num_target_layers=6,
        markov_rank=4,
    )


@pytest.fixture
def make_parts():
    def make(vocab: int = 37, width: int = 16, seed: int = 0, **changes: object) -> TargetParts:
        generator = torch.Generator().manual_seed(seed)
        table = torch.randn(vocab, width, generator=generator)
        head = torch.randn(vocab, width, generator=generator)
        norm = torch.rand(width, generator=generator)
        return replace(lent_parts(table, head, final_norm_H=norm), **changes)

    return make


def drafter_of(kind, parts, config, seed, draft_tokens):
    """A random drafter, bound."""
    generator = torch.Generator().manual_seed(seed)
    return kind.from_target(
        parts, config, generator=generator, init_std=0.3, draft_tokens=draft_tokens
    ).eval()


@pytest.fixture
def make_drafter(tiny_config, make_parts):
    def make(
        parts: TargetParts | None = None,
        seed: int = 1,
        draft_tokens: Tensor | None = None,
        **changes: object,
    ) -> DSparkDrafter:
        config = replace(tiny_config, **changes)
        return drafter_of(DSparkDrafter, parts or make_parts(), config, seed, draft_tokens)

    return make


@pytest.fixture
def make_eagle3(tiny_config, make_parts):
    def make(
        parts: TargetParts | None = None,
        seed: int = 1,
        draft_tokens: Tensor | None = None,
        **changes: object,
    ) -> Eagle3Drafter:
        config = Eagle3Config(
            replace(tiny_config.backbone, num_layers=1),
            vocab_size=37,
            target_layer_ids=(-1, 1, 4),
            num_target_layers=6,
            ttt_length=5,
        )
        config = replace(config, **changes)
        return drafter_of(Eagle3Drafter, parts or make_parts(), config, seed, draft_tokens)

    return make


@pytest.fixture
def make_eagle3_layer(make_eagle3, make_parts):
    """A drafter with the layer of a family, bound to such a target; norms and scalars random."""

    def make(kind: str, **changes: object) -> Eagle3Drafter:
        own = {"query_key_norms": not kind.startswith("llama")}
        own |= {"norm_before_residual": kind.endswith("normed")}
        parts = make_parts()
        if kind == "mtp":
            own |= {"input_projection": True, "num_taps": 1}
            changes |= {"target_layer_ids": (5,)}
        if kind.startswith("gemma4"):
            own |= GEMMA4_PARTS | {"rotary_fraction": 0.5, "head_dim": 8}
            own |= {"value_from_key": "k_eq_v" in kind}
            parts = make_parts(embedding_scale=4.0, logit_softcap=1.5)
        backbone = replace(make_eagle3().config.backbone, **own)
        drafter = make_eagle3(parts, backbone=backbone, **changes)
        source = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for name, tensor in drafter.state_dict().items():
                if "norm" in name or "scalar" in name:
                    tensor.copy_(0.5 + torch.rand(tensor.shape, generator=source))
        return drafter.eval()

    return make


@pytest.fixture
def draft():
    """Run one round: contexts [S_r, F] per request -> (draw, proposal).

    `tokens` are the committed tokens of each request before its anchor, all 0 by default.
    """

    def run(drafter, contexts, anchors, *, tokens=None, num_drafts=None, chunks=1, forced=None):
        if tokens is None:
            tokens = [[0] * len(features) for features in contexts]
        dtype = drafter.borrowed.embedding_VH.dtype
        cache = PagedCache(drafter.context_shapes, 4 * len(contexts) + 4, dtype=dtype)
        tables = tuple(BlockTable(range(4 * i, 4 * i + 4)) for i in range(len(contexts), 0, -1))
        for table, features, ids, anchor in zip(tables, contexts, tokens, anchors, strict=True):
            following = torch.tensor([*ids[1:], anchor])
            at = 0
            for part in features.tensor_split(chunks):
                rows = slice(at, at + len(part))
                batch = RaggedBatch.build([(table, at, ids[rows])])
                drafter.observe(cache, batch, part, following[rows])
                at += len(part)
        lengths = tuple(len(features) for features in contexts)
        batch = DraftBatch(
            tables=tables,
            anchors_R=torch.tensor(anchors),
            lengths=lengths,
            tokens=tuple([*ids, anchor] for ids, anchor in zip(tokens, anchors, strict=True)),
            num_drafts=num_drafts or drafter.block_size,
        )
        draw = Greedy(forced)
        return draw, drafter.propose(cache, batch, draw)

    return run
