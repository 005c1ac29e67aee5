"""A small target with a real drafter: DSpark's forward, heads and confidences, in float64.

The target is a table of random logits over every prefix. The drafter is a `DSparkDrafter` with
random weights that observes random features; its draws are dictated, path by path, to obtain its
distributions and confidences over every prefix. Both sides use the engine's processors.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from dspark.attention.paged_cache import BlockTable, PagedCache
from dspark.attention.ragged_batch import RaggedBatch
from dspark.drafters.base import DraftBatch
from dspark.drafters.config import BackboneConfig, DSparkConfig
from dspark.drafters.dspark import DSparkDrafter
from dspark.drafters.heads import MarkovKind
from dspark.engine.speculation.trees.growth import rows_of_columns
from dspark.errors import NumericsError
from dspark.evaluation.proof.worlds import Distributions, Prefix, World, all_paths
from dspark.request import SamplingParams
from dspark.sampling import logits_processors as processors
from dspark.sampling.logits_processors import Chain, Known
from dspark.sampling.token_counts import TokenCounts

WIDTH, RANK = 8, 3
Table = npt.NDArray[Any]
CERTAIN = 40.0
"""A confidence logit whose sigmoid is exactly 1, even in float64."""


@dataclass(frozen=True)
class _Parts:
    """What the small target lends its drafter."""

    embedding_VH: Tensor
    head_VH: Tensor
    vocab_size: int
    hidden_size: int = WIDTH
    embedding_scale: float = 1.0
    head_bias_V: Tensor | None = None
    logit_softcap: float | None = None
    final_norm_H: Tensor | None = None
    head: None = None
    pack: None = None


@dataclass(frozen=True)
class SmallLattice:
    """A drafter's lattice after some prefix; every token is a candidate, and may be a parent.

    Attributes:
        tokens_KC: candidates of each slot.
        rows_KC: the row of each in the next slot.
        law_KPC: draft distributions.
        logits_KP: confidence logits.
    """

    tokens_KC: Table
    rows_KC: Table
    law_KPC: Table
    logits_KP: Table


@dataclass
class SmallPair:
    """A target and a drafter, after a prompt of one token.

    Attributes:
        seed: of all weights and tables.
        vocab_size: V.
        block_size: K.
        head: the drafter's sequential head.
        horizon: tokens that the target reaches, T; every round but the last takes up to K + 1.
        params: of the request.
        tied: round the confidence logits to a few values, one of them `CERTAIN`, so that
            survivals tie, within a request and between requests.
        stale: judge every row with the token counts of the anchor's row (a wrong variant).
        draft_top_k: candidates that the drafter draws from; None for all.
        unrestricted: report what it would have drawn from without (a wrong variant).
    """

    seed: int
    vocab_size: int
    block_size: int
    head: MarkovKind = "vanilla"
    horizon: int = 0
    params: SamplingParams = field(default_factory=lambda: SamplingParams(temperature=0.8))
    tied: bool = False
    stale: bool = False
    draft_top_k: int | None = None
    unrestricted: bool = False
    _worlds: dict[Prefix, World] = field(default_factory=dict)
    _lattices: dict[Prefix, SmallLattice] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Draw the tables and the drafter's weights."""
        generator = torch.Generator().manual_seed(self.seed)
        self.horizon = self.horizon or self.block_size + 1

        def table(rows: int, columns: int) -> Tensor:
            return torch.randn(rows, columns, generator=generator, dtype=torch.float64)

        depths = range(self.horizon)
        self._logits = tuple(1.2 * table(self.vocab_size**d, self.vocab_size) for d in depths)
        self._features = tuple(table(self.vocab_size**d, WIDTH) for d in depths)
        parts = _Parts(
            table(self.vocab_size, WIDTH), 0.5 * table(self.vocab_size, WIDTH), self.vocab_size
        )
        self._drafter = DSparkDrafter.from_target(
            parts, self._config(), generator=generator, init_std=0.6
        )
        _sharpen(self._drafter)

    def __call__(self, prefix: Prefix) -> World:
        """The round after a committed prefix; it reaches as far as the horizon."""
        if prefix not in self._worlds:
            self._worlds[prefix] = self._world(prefix)
        return self._worlds[prefix]

    def lattice(self, prefix: Prefix) -> SmallLattice:
        """The drafter's lattice of the round after a prefix."""
        if prefix not in self._lattices:
            self._lattices[prefix] = self._lattice(prefix)
        return self._lattices[prefix]

    def _lattice(self, prefix: Prefix) -> SmallLattice:
        context, batch = self._asked(prefix, 1)
        found = self._drafter.lattice(context, batch, self.vocab_size, self.vocab_size)
        assert found.confidence_logits_RKP is not None  # the configuration has the head
        tokens_KC, logits_KPC = found.tokens_RKC[0], found.logits_RKPC[0]
        rows_NC = logits_KPC.flatten(0, 1)
        law_NC = processors.token_distribution(rows_NC, self._chain(len(rows_NC))).dense()
        parents_KP = found.parents_RKP[0].numpy()
        return SmallLattice(
            tokens_KC.numpy(),
            rows_of_columns(parents_KP, self.vocab_size),
            law_NC.view_as(logits_KPC).numpy(),
            found.confidence_logits_RKP[0].numpy(),
        )

    @property
    def telling(self) -> bool:
        """Whether schedules have something to decide: c_2 depends on x_1, and c_1 reaches up to it.

        A world without that would prove nothing.
        """
        c_NK = self(()).path_logits().sigmoid()
        first, least, most = c_NK[0, 0], c_NK[:, 1].min(), c_NK[:, 1].max()
        return bool(most - least > 0.05) and bool(first > (least + most) / 2)

    def _config(self) -> DSparkConfig:
        backbone = BackboneConfig(
            hidden_size=WIDTH,
            intermediate_size=WIDTH,
            num_layers=1,
            num_heads=2,
            num_kv_heads=1,
            head_dim=4,
            num_taps=1,
        )
        return DSparkConfig(
            backbone=backbone,
            vocab_size=self.vocab_size,
            block_size=self.block_size,
            mask_token_id=None,
            target_layer_ids=(0,),
            num_target_layers=1,
            markov_rank=RANK,
            markov_head_type=self.head,
            max_position_embeddings=self.horizon + self.block_size + 1,
        )

    def _world(self, prefix: Prefix) -> World:
        target = tuple(self._plain(prefix, depth) for depth in range(self.horizon - len(prefix)))
        drawn, logits = self._drafted(prefix, self.draft_top_k)
        draft = self._drafted(prefix, None)[0] if self.unrestricted else drawn
        return World(target, draft, logits, drawn, self._judged(prefix))

    def _table(self, prefix: Prefix, depth: int) -> Tensor:
        """The target's logits `depth` tokens after a prefix, [V**depth, V]."""
        rows = self._logits[len(prefix) + depth].view(-1, self.vocab_size**depth, self.vocab_size)
        return rows[self._place(prefix)]

    def _place(self, prefix: Prefix) -> int:
        place = 0
        for token in prefix:
            place = place * self.vocab_size + token
        return place

    def _plain(self, prefix: Prefix, depth: int) -> Tensor:
        """The target's distributions in plain decoding: every row with its own output so far."""
        after = all_paths(self.vocab_size, depth).tolist()
        outputs = [[*prefix, *x] for x in after]
        counts = TokenCounts.of([[0]] * len(after), outputs, self.vocab_size)
        return processors.token_distribution(
            self._table(prefix, depth), self._chain(len(after)), counts
        ).dense()

    @cached_property
    def _paths(self) -> Tensor:
        return all_paths(self.vocab_size, self.block_size)

    def _chain(self, rows: int) -> Chain:
        return Chain.of([self.params] * rows)

    def _counts(self, prefix: Prefix, step: int) -> TokenCounts:
        """Counts of the row after `step` drafts of every path, as the engine makes them."""
        count = len(self._paths)
        counts = TokenCounts.of([[0]] * count, [list(prefix)] * count, self.vocab_size)
        steps = torch.full((count,), 0 if self.stale else step)
        return counts.after_drafts(torch.arange(count), steps, self._paths)

    def _by_prefix(self, rows: Tensor, depth: int) -> Tensor:
        """Rows of all paths as rows of all prefixes of `depth` tokens.

        One row represents all paths with its prefix, so that no last bit depends on later drafts.
        """
        return rows[:: self.vocab_size ** (self.block_size - depth)]

    def _judged(self, prefix: Prefix) -> Distributions:
        laws = []
        for step in range(min(self.block_size + 1, self.horizon - len(prefix))):
            table = self._table(prefix, step)
            rows = table.repeat_interleave(len(self._paths) // len(table), dim=0)
            whole = processors.token_distribution(
                rows, self._chain(len(rows)), self._counts(prefix, step)
            )
            laws.append(self._by_prefix(whole.dense(), step))
        return tuple(laws)

    def _drafted(self, prefix: Prefix, top_k: int | None) -> tuple[Distributions, Distributions]:
        """The drafter's distributions and confidence logits, from one proposal along every path."""
        count = len(self._paths)
        context, batch = self._asked(prefix, count)
        laws = []

        def draw(step: int, logits_RC: Tensor, tokens: Tensor | None = None) -> Tensor:
            known = None if tokens is None else Known(tokens, self.vocab_size)
            counts = self._counts(prefix, step)
            whole = processors.token_distribution(
                logits_RC, self._chain(count), counts, None, known
            )
            laws.append(self._by_prefix(whole.dense(), step))
            return self._paths[:, step]

        self._drafter.draft_top_k = top_k
        proposal = self._drafter.propose(context, batch, draw)
        assert proposal.confidence_logits_RK is not None  # the configuration has the head
        columns = proposal.confidence_logits_RK.unbind(1)
        scores = tuple(self._by_prefix(column, step) for step, column in enumerate(columns))
        return tuple(laws), _tied(scores) if self.tied else scores

    def _asked(self, prefix: Prefix, count: int) -> tuple[PagedCache, DraftBatch]:
        """What the drafter is asked after a prefix, `count` times, and the context it has then."""
        tokens, rows = (0, *prefix), len(prefix) + 1
        table = BlockTable((0,), page_size=self.horizon + self.block_size + 1)
        context = PagedCache(self._drafter.context_shapes, 1, table.page_size, torch.float64, "cpu")
        features = torch.stack(
            [self._features[d][self._place(prefix[:d])] for d in range(len(prefix) + 1)]
        )
        # Row i is the context of the token before position i + 1; the first is the prompt's.
        batch_of_rows = RaggedBatch.build([(table, 0, tokens)])
        self._drafter.observe(context, batch_of_rows, features, batch_of_rows.input_ids_T)
        batch = DraftBatch(
            tables=(table,) * count,
            anchors_R=torch.full((count,), tokens[-1]),
            lengths=(rows,) * count,
            tokens=(tokens,) * count,
            num_drafts=self.block_size,
        )
        return context, batch


@torch.no_grad()
def _sharpen(drafter: DSparkDrafter) -> None:
    """Let confidences be high, and make them and the distributions depend on the previous token."""
    markov, confidence = drafter.markov_head, drafter.confidence_head
    assert markov is not None
    assert confidence is not None
    markov.markov_w1.weight.mul_(3)
    confidence.proj.weight.mul_(2)
    confidence.proj.bias.fill_(1.5)


def telling_pair(
    seed: int, vocab_size: int, block_size: int, head: MarkovKind, horizon: int, *, tied: bool
) -> SmallPair:
    """The first telling pair of a row of seeds of its own.

    Raises:
        NumericsError: there is none among a hundred, as if confidences were constant.
    """
    for candidate in range(100 * seed, 100 * seed + 100):
        pair = SmallPair(candidate, vocab_size, block_size, head, horizon, tied=tied)
        if pair.telling:
            return pair
    raise NumericsError(
        f"No drafter with a {head} head has confidences that depend on its drafts; "
        "its confidence head does not read the token before."
    )


def _tied(logits: Distributions) -> Distributions:
    """Confidence logits of few values, so that survivals tie wherever they can.

    All first ones are the same; of the later ones the highest are `CERTAIN`, so that their
    survival is the one before, and the others -1, 0 or 1.
    """
    first, *later = logits
    rounded = [
        torch.where(row == row.max(), CERTAIN, row.round().clamp(-1.0, 1.0)) for row in later
    ]
    return torch.full_like(first, 2.0), *rounded
