"""The Eagle3 drafter: one layer, run once per draft token (Li et al. 2025; FORMAT_FACTS.md A.4).

Context row i holds the feature of token i and the embedding of token i + 1, and is turned to
position i; it is stored at position i + 1 (`Drafter.reads_next_token`). The last row's output
predicts the token after the anchor; each further draft is a row of its own behind it, made of the
output of the step before and the embedding of the token just drawn.

With one pass and the last layer as the only tap it is MTP-1, the production baseline: one extra
token per round, two tokens verified.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dspark.attention.backends import ragged_attention
from dspark.attention.layout import RaggedBatch
from dspark.attention.pages import CacheShape, PagedCache
from dspark.drafters.base import DraftBatch, Draw, Proposal
from dspark.drafters.borrowed import Borrowed
from dspark.drafters.config import BackboneConfig, check_draft_vocabulary, check_taps
from dspark.drafters.decoding import RotaryTable
from dspark.drafters.eagle3_layer import Eagle3Backbone, Eagle3Weights
from dspark.drafters.target_bound import TargetBound
from dspark.errors import CompatibilityError

# Cache layers: the layer's keys and values, and the projected features as keys of width H.
_ATTENTION, _FEATURES = 0, 1
# Rows stand one position behind their token's.
_SHIFT = 1


@dataclass(frozen=True)
class Eagle3Config:
    """What an Eagle3 drafter is.

    Attributes:
        backbone: shapes of the single layer; its `num_taps` is the number of `target_layer_ids`.
        vocab_size: V, the target's.
        target_layer_ids: captured layers, strictly increasing; -1 is the embedding output.
        num_target_layers: decoder layers of the target it was made for.
        ttt_length: passes of the training-time test, and so most drafts per round.
        step_loss_decay: factor from one pass's weight in the loss to the next's, recorded in the
            published config.
        max_position_embeddings: longest context, in tokens; the target's.
        draft_vocab_size: tokens that it can propose, at most V - 1; None for all.
        extra: fields of a published config that change nothing here, written back unchanged.
    """

    backbone: BackboneConfig
    vocab_size: int
    target_layer_ids: tuple[int, ...]
    num_target_layers: int
    ttt_length: int = 7
    step_loss_decay: float = 0.8
    max_position_embeddings: int = 40960
    draft_vocab_size: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse parts that do not fit each other.

        Raises:
            CompatibilityError: naming the field, its value and what it must be.
        """
        backbone = self.backbone
        check_taps(self.target_layer_ids, self.num_target_layers, backbone)
        check_draft_vocabulary(self.draft_vocab_size, self.vocab_size)
        if backbone.sliding_layers:
            raise CompatibilityError(
                f"The Eagle3 drafter's layer has a sliding_window of {backbone.sliding_window}, "
                "which is not supported yet; use a drafter with full attention."
            )
        if backbone.num_layers != 1:
            raise CompatibilityError(
                f"num_hidden_layers is {backbone.num_layers}, but an Eagle3 drafter has 1 layer."
            )
        if self.ttt_length < 1 or backbone.head_dim % 2:
            raise CompatibilityError(
                f"ttt_length is {self.ttt_length} and head_dim {backbone.head_dim}, but they "
                "must be at least 1 and even."
            )


@dataclass(frozen=True)
class _DecodePlan:
    """What decoding computes once: weights in the right dtype and layout, `rotary` by position."""

    weights: Eagle3Weights
    borrowed: Borrowed
    rotary: RotaryTable


class Eagle3Drafter(TargetBound[Eagle3Config], Eagle3Backbone):
    """A drafter as a module; its state dict is the published one without embedding and head.

    Args:
        config: what to build.
    """

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__(config)
        self._plan: _DecodePlan | None = None

    @property
    def block_size(self) -> int:
        """Most drafts of a round: as many as there were passes in training."""
        return self.config.ttt_length

    @property
    def context_shapes(self) -> tuple[CacheShape, ...]:
        """The layer's keys and values, and a row's projected features, which start its drafts."""
        backbone = self.config.backbone
        return (
            CacheShape(backbone.num_kv_heads, backbone.head_dim, backbone.head_dim),
            CacheShape(1, backbone.hidden_size, 0),
        )

    @property
    def reads_next_token(self) -> bool:
        """A row is made with the embedding of the token after its own."""
        return True

    @property
    def rows_ahead(self) -> int:
        """Every pass but the first writes a row of its own behind the anchor's."""
        return self.block_size - 1

    def _drop_plan(self) -> None:
        self._plan = None

    # Decoding

    @torch.no_grad()
    def observe(
        self,
        context: PagedCache,
        batch: RaggedBatch,
        features_TF: Tensor,
        next_tokens_T: Tensor,
    ) -> None:
        """Append the rows of committed tokens, each made with the token after it."""
        plan = self._decode_plan()
        hidden_TH = plan.weights.project(features_TF)
        rotary_rows = plan.rotary.upto(batch.longest)[batch.positions_T]
        key_TGD, value_TGD = plan.weights.key_value(
            self.borrowed.embed(next_tokens_T), hidden_TH, rotary_rows
        )
        rows_T = batch.shifted_rows_T(_SHIFT)
        context.write(_ATTENTION, rows_T, key_TGD, value_TGD)
        hidden_T1H = hidden_TH.unsqueeze(1)
        context.write(_FEATURES, rows_T, hidden_T1H, hidden_T1H[..., :0])

    @torch.no_grad()
    def propose(self, context: PagedCache, batch: DraftBatch, draw: Draw) -> Proposal:
        """A chain of drafts: one pass over all requests per token.

        The first pass runs the last context row again, for its output. Rows of later passes are
        written behind the context, where the next round's rows replace them.
        """
        plan = self._decode_plan()
        rotary_table = plan.rotary.upto(max(batch.lengths) + batch.num_drafts)
        scale = self.config.backbone.attention_scale
        tokens_R, hidden_RH = batch.anchors_R, None
        for step in range(batch.num_drafts):
            starts = [length - 1 + step + _SHIFT for length in batch.lengths]
            rows = RaggedBatch.build(
                [(t, start, (0,)) for t, start in zip(batch.tables, starts, strict=True)],
                tokens_R.device,
            )
            if hidden_RH is None:
                stored_R1H, _ = context.read(_FEATURES, rows.rows_T)
                hidden_RH = stored_R1H.squeeze(1)

            def mix(query: Tensor, key: Tensor, value: Tensor, rows: RaggedBatch = rows) -> Tensor:
                context.write(_ATTENTION, rows.rows_T, key, value)
                return ragged_attention(query, context, _ATTENTION, rows, scale=scale, first=_SHIFT)

            embedded_RH = self.borrowed.embed(tokens_R)
            rotary_rows = rotary_table[rows.positions_T - _SHIFT]
            hidden_RH = plan.weights.step(embedded_RH, hidden_RH, rotary_rows, mix)
            logits = plan.borrowed.logits_by_rows(plan.weights.final(hidden_RH))
            tokens_R = draw(step, logits, self.draft_tokens)
        return Proposal()

    def _decode_plan(self) -> _DecodePlan:
        if self._plan is None:
            like = self.borrowed.embedding_VH
            # Even in inference mode these are plain tensors: some are the parameters themselves.
            with torch.inference_mode(False), torch.no_grad():
                weights = Eagle3Weights.of(self).like(like)
                if self.borrowed.pack is not None:
                    weights = weights.packed(self.borrowed.pack)
                table = RotaryTable(self.config.backbone, like)
                self._plan = _DecodePlan(weights, self.borrowed.packed(), table)
        return self._plan
