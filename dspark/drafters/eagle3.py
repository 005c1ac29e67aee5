"""The Eagle3 drafter: a layer, run once per draft token (Li et al. 2025; docs/method.md, 2.4).

A row of the layer is made of two parts: the hidden state h of a token (projected features, or what
the layer gave a step before) and the embedding of the token after it. Both are normed and laid side
by side as the input of the attention, so that the q, k and v projections read 2 H numbers; the
residual is h itself, before its norm (or, with `norm_before_residual`, after). What comes out is
the next step's h, and, normed, what the head reads. Module names are the published state dict's
keys; all else of the layer is `layers.Layer`, of whatever family. Drafters of the speculators
library may have plain layers behind it, which run with it.

Context row i holds the feature of token i and the embedding of token i + 1, and is turned to
position i; it is stored at position i + 1 (`Drafter.reads_next_token`). The last row's output
predicts the token after the anchor; each further draft is a row of its own behind it, made of the
output of the step before and the embedding of the token just drawn.

With one pass and the last layer as the only tap it is MTP-1, the production baseline: one extra
token per round, two tokens verified.

With an `input_projection` it is the layer of models' own MTP modules (Qwen3-Next's, and so the
speculators library's `mtp`): h is the one captured layer as it is; its norm and the token's, side
by side, are projected to width H, and a whole decoder layer reads that projection, which is also
its residual. What the final norm gives is both what the head reads and the next step's h.

With a `mask_token_id` it is P-EAGLE, read from files and not trained here: all rows of a round in
one pass, those behind the first made of a learned feature (`mask_hidden`) and the mask
token's embedding in place of what is not known yet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from dspark.attention.backends import Rule, ragged_attention
from dspark.attention.paged_cache import CacheShape, PagedCache
from dspark.attention.ragged_batch import Part, RaggedBatch, with_trees
from dspark.drafters.base import DraftBatch, DrafterKind, Draw, Expand, Proposal
from dspark.drafters.config import BackboneConfig, check_draft_vocabulary, check_taps
from dspark.drafters.layers import (
    Layer,
    LayerWeights,
    Pack,
    Product,
    RMSNorm,
    RotaryTable,
    norm,
    packed,
    project,
)
from dspark.drafters.target_bound import Borrowed, TargetBound
from dspark.errors import CompatibilityError

# Rows stand one position behind their token's.
_SHIFT = 1


@dataclass(frozen=True)
class Eagle3Config:
    """What an Eagle3 drafter is.

    Attributes:
        backbone: shapes of the layer, and of plain ones behind it; its `num_taps` is the number of
            `target_layer_ids`.
        vocab_size: V, the target's.
        target_layer_ids: captured layers, strictly increasing; -1 is the embedding output.
        num_target_layers: decoder layers of the target it was made for.
        ttt_length: passes of the training-time test, and so most drafts per round.
        step_loss_decay: factor from one pass's weight in the loss to the next's, recorded in the
            published config.
        max_position_embeddings: longest context, in tokens; the target's.
        draft_vocab_size: tokens that it can propose, at most V - 1; None for all.
        mask_token_id: token of the rows behind the first, where all drafts are made in one pass;
            None for a pass each.
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
    mask_token_id: int | None = None
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
        if self.mask_token_id is not None and not 0 <= self.mask_token_id < self.vocab_size:
            raise CompatibilityError(
                f"mask_token_id is {self.mask_token_id}, but must be a token of the vocabulary (0 "
                f"to {self.vocab_size - 1})."
            )
        if backbone.input_projection and (
            backbone.num_taps > 1 or backbone.norm_before_residual or self.mask_token_id is not None
        ):
            raise CompatibilityError(
                f"input_projection is true, so target_layer_ids ({list(self.target_layer_ids)}) "
                "must be one layer, norm_before_residual false, and mask_token_id absent."
            )
        if self.ttt_length < 1 or backbone.head_dim % 2:
            raise CompatibilityError(
                f"ttt_length is {self.ttt_length} and head_dim {backbone.head_dim}, but they "
                "must be at least 1 and even."
            )


Mix = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, query [.., A, D], key [.., G, D], value [.., G, D]) -> mixed values [.., A, D]."""


class Eagle3Layer(Layer):
    """Holds the layer that reads token and state."""

    def __init__(self, config: BackboneConfig) -> None:
        width, projected = config.hidden_size, config.input_projection
        super().__init__(config, input_width=width if projected else 2 * width)
        self.hidden_norm = RMSNorm(width)
        self.token_norm = RMSNorm(width) if projected else None
        self.input_proj = nn.Linear(2 * width, width, bias=False) if projected else None


class Eagle3Backbone(nn.Module):
    """The parameters of an Eagle3 drafter, under their published names."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.backbone_config = config
        self.fc: nn.Linear | None = None
        if not config.input_projection:
            width = config.hidden_size
            self.fc = nn.Linear(config.num_taps * width, width, bias=False)
        plain = [Layer(config) for _ in range(1, config.num_layers)]
        self.layers = nn.ModuleList([Eagle3Layer(config), *plain])
        self.norm = RMSNorm(config.hidden_size)


def final_states(hidden: Tensor, norm_H: Tensor, config: BackboneConfig) -> Tensor:
    """Hidden states [.., H] that a pass gave as the head reads them."""
    return hidden if config.input_projection else norm(hidden, norm_H, config)


@dataclass(frozen=True)
class Eagle3Weights:
    """All weights, and the computation.

    Training builds them from the parameters at every step (gradients flow through), decoding once.
    """

    config: BackboneConfig
    fc: Tensor | Product | None  # None where the one captured layer is read as it is
    hidden_norm_H: Tensor
    token_norm_H: Tensor | None  # None where the layer's input norm is the token's
    input_proj: Tensor | Product | None
    layers: tuple[LayerWeights, ...]
    norm_H: Tensor

    @classmethod
    def of(cls, backbone: Eagle3Backbone) -> Eagle3Weights:
        """The weights of a backbone; gradients flow back to its parameters."""
        config, layer = backbone.backbone_config, backbone.layers[0]
        assert isinstance(layer, Eagle3Layer)
        layers = [own for own in backbone.layers if isinstance(own, Layer)]
        return cls(
            config=config,
            fc=None if backbone.fc is None else backbone.fc.weight,
            hidden_norm_H=layer.hidden_norm.weight,
            token_norm_H=None if layer.token_norm is None else layer.token_norm.weight,
            input_proj=None if layer.input_proj is None else layer.input_proj.weight,
            layers=tuple(LayerWeights.of(own, config) for own in layers),
            norm_H=backbone.norm.weight,
        )

    def like(self, other: Tensor) -> Eagle3Weights:
        """The same in dtype and on the device of `other`."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {n: x.to(other) for n, x in named.items() if isinstance(x, Tensor)}
        return replace(self, layers=tuple(own.like(other) for own in self.layers), **moved)

    def packed(self, pack: Pack) -> Eagle3Weights:
        """The same with its projections packed, for decoding."""
        fc, proj = (None if x is None else packed(pack, x) for x in (self.fc, self.input_proj))
        *before, last = self.layers
        layers = (*(own.packed(pack) for own in before), last.packed(pack, looks=True))
        return replace(self, fc=fc, input_proj=proj, layers=layers)

    def project(self, features: Tensor) -> Tensor:
        """The first hidden states [.., H] of captured features [.., F]."""
        return features if self.fc is None else project(features, self.fc)

    def key_value(
        self, embedded: Tensor, hidden: Tensor, rotary_rows: Tensor, mix: Mix
    ) -> tuple[Tensor, Tensor]:
        """The last layer's keys and values [.., G, D] of rows that are only looked at.

        Args:
            embedded: embeddings [.., H] of the tokens after the rows' own.
            hidden: hidden states [.., H] of the rows.
            rotary_rows: `layers.rotary` of their positions.
            mix: attends, in the layers before.
        """
        read, _ = self._to_the_last(embedded, hidden, rotary_rows, mix)
        return self.layers[-1].key_value(read, rotary_rows.unbind(-3))

    def step(self, embedded: Tensor, hidden: Tensor, rotary_rows: Tensor, mix: Mix) -> Tensor:
        """One pass through the layers.

        Args:
            embedded: embeddings [.., H] of the tokens after the rows' own.
            hidden: hidden states [.., H] of the rows.
            rotary_rows: `layers.rotary` of their positions.
            mix: attends.

        Returns:
            The next hidden states [.., H], which `final_states` makes ready for the head.
        """
        read, residual = self._to_the_last(embedded, hidden, rotary_rows, mix)
        last = self.layers[-1]
        mixed = mix(len(self.layers) - 1, *last.heads(read, rotary_rows.unbind(-3)))
        after = last.finish(residual, mixed)
        return after if self.input_proj is None else norm(after, self.norm_H, self.config)

    def final(self, hidden: Tensor) -> Tensor:
        """Hidden states [.., H] as the head reads them."""
        return final_states(hidden, self.norm_H, self.config)

    def _to_the_last(
        self, embedded: Tensor, hidden: Tensor, rotary_rows: Tensor, mix: Mix
    ) -> tuple[Tensor, Tensor]:
        """What the last layer's attention reads, and its residual [.., H]."""
        read, residual = self._input(embedded, hidden)
        for i, following in enumerate(self.layers[1:]):
            layer = self.layers[i]
            mixed = mix(i, *layer.heads(read, rotary_rows.unbind(-3)))
            residual = layer.finish(residual, mixed)
            read = norm(residual, following.input_norm_H, self.config)
        return read, residual

    def _input(self, embedded: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """What the first layer's attention reads, and its residual [.., H]."""
        config, own_norm_H = self.config, self.layers[0].input_norm_H
        token_norm_H = own_norm_H if self.token_norm_H is None else self.token_norm_H
        normed = norm(hidden, self.hidden_norm_H, config)
        both = torch.cat((norm(embedded, token_norm_H, config), normed), dim=-1)
        if self.input_proj is None:
            return both, normed if config.norm_before_residual else hidden
        projected = project(both, self.input_proj)
        return norm(projected, own_norm_H, config), projected


@dataclass(frozen=True)
class _DecodePlan:
    """What decoding computes once.

    Attributes:
        weights: in the right dtype and layout.
        borrowed: embedding and head.
        rotary: by position.
        mask_1H: hidden state of rows behind the first, where all are made in one pass.
    """

    weights: Eagle3Weights
    borrowed: Borrowed
    rotary: RotaryTable
    mask_1H: Tensor | None


class Eagle3Drafter(TargetBound[Eagle3Config], Eagle3Backbone):
    """A drafter as a module; its state dict is the published one without embedding and head.

    Args:
        config: what to build.
    """

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__(config)
        width = config.backbone.num_taps * config.backbone.hidden_size
        masked = None if config.mask_token_id is None else nn.Parameter(torch.zeros(1, 1, width))
        self.mask_hidden = masked
        self._plan: _DecodePlan | None = None

    @property
    def block_size(self) -> int:
        """Most drafts of a round: as many as there were passes in training."""
        return self.config.ttt_length

    @property
    def context_shapes(self) -> tuple[CacheShape, ...]:
        """The layers' keys and values, and a row's projected features, which start its drafts."""
        backbone = self.config.backbone
        own = CacheShape(backbone.num_kv_heads, backbone.head_dim, backbone.head_dim)
        return (*[own] * backbone.num_layers, CacheShape(1, backbone.hidden_size, 0))

    @property
    def _features(self) -> int:
        """The cache layer of the projected features, which are keys of width H."""
        return self.config.backbone.num_layers

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
        self, context: PagedCache, batch: RaggedBatch, features_TF: Tensor, next_tokens_T: Tensor
    ) -> None:
        """Append the rows of committed tokens, each made with the token after it."""
        plan = self._decode_plan()
        hidden_TH = plan.weights.project(features_TF)
        rotary_rows = plan.rotary.upto(batch.longest)[batch.positions_T]
        rows = batch.shifted(_SHIFT)
        key_TGD, value_TGD = plan.weights.key_value(
            self.borrowed.embed(next_tokens_T), hidden_TH, rotary_rows, self._mix(context, rows)
        )
        context.write(self._features - 1, rows.rows_T, key_TGD, value_TGD)
        hidden_T1H = hidden_TH.unsqueeze(1)
        context.write(self._features, rows.rows_T, hidden_T1H, hidden_T1H[..., :0])

    @torch.no_grad()
    def propose(self, context: PagedCache, batch: DraftBatch, draw: Draw) -> Proposal:
        """A chain of drafts: one pass over all requests per token, or one for all tokens.

        The first pass runs the last context row again, for its output. Rows of later passes are
        written behind the context, where the next round's rows replace them.
        """
        plan = self._decode_plan()
        if plan.mask_1H is not None and batch.num_drafts:
            return self._propose_at_once(context, batch, draw, plan.mask_1H)
        tokens_R, hidden_RH = batch.anchors_R, None
        for step in range(batch.num_drafts):
            rows = self._rows(batch, step, 1)
            if hidden_RH is None:
                hidden_RH = context.read(self._features, rows.rows_T)[0].squeeze(1)
            hidden_RH = self._pass(context, rows, self.borrowed.embed(tokens_R), hidden_RH)
            logits = plan.borrowed.logits_by_rows(plan.weights.final(hidden_RH))
            tokens_R = draw(step, logits, self.draft_tokens)
        return Proposal()

    def _propose_at_once(
        self, context: PagedCache, batch: DraftBatch, draw: Draw, mask_1H: Tensor
    ) -> Proposal:
        """All drafts of P-EAGLE: a row each, of which only the first knows token and feature."""
        plan, count, requests = self._decode_plan(), batch.num_drafts, len(batch.lengths)
        rows = self._rows(batch, 0, count)
        masks_RK = batch.anchors_R.new_full((requests, count), self.config.mask_token_id or 0)
        masks_RK[:, 0] = batch.anchors_R
        hidden_RKH = mask_1H.expand(requests, count, -1).clone()
        hidden_RKH[:, 0] = context.read(self._features, rows.rows_T[::count])[0].squeeze(1)
        embedded_TH = self.borrowed.embed(masks_RK.flatten())
        hidden_TH = self._pass(context, rows, embedded_TH, hidden_RKH.flatten(0, 1))
        states = plan.weights.final(hidden_TH).view(requests, count, -1)
        logits_RKV = plan.borrowed.logits_by_rows(states)
        for step in range(count):
            draw(step, logits_RKV[:, step], self.draft_tokens)
        return Proposal()

    def check_levels(self) -> None:
        """Refuse P-EAGLE, whose rows behind the first know of no token.

        Raises:
            CompatibilityError: all drafts are made in one pass.
        """
        if self.config.mask_token_id is not None:
            raise CompatibilityError(
                "Draft trees need a pass for each draft token, but this P-EAGLE drafter "
                f"(mask_token_id {self.config.mask_token_id}) makes all drafts in one. Leave out "
                "tree_nodes."
            )

    @torch.no_grad()
    def levels(self, context: PagedCache, batch: DraftBatch, expand: Expand) -> None:
        """Trees of drafts: one pass over all requests per level (EAGLE-2, Li et al. 2024).

        Every node has a row of its own behind the anchor's, which sees its ancestors' rows; the
        next round's rows replace them.
        """
        plan = self._decode_plan()
        rows = self._rows(batch, 0, 1)
        hidden_TH = context.read(self._features, rows.rows_T)[0].squeeze(1)
        hidden_TH = self._pass(context, rows, self.borrowed.embed(batch.anchors_R), hidden_TH)
        parents: list[list[int]] = [[] for _ in batch.lengths]
        begins = [-1] * len(parents)  # the first node of the level before; -1 is the anchor
        while True:
            logits_TV = plan.borrowed.logits_by_rows(plan.weights.final(hidden_TH))
            nodes = expand(logits_TV, self.draft_tokens)
            if not any(nodes):
                return
            parts, above = list[Part](), list[int]()
            for r, (table, length) in enumerate(zip(batch.tables, batch.lengths, strict=True)):
                begin, before = begins[r], len(parents[r])
                above += [rows.offsets[r] + row for row, _ in nodes[r]]
                parents[r] += [begin + row for row, _ in nodes[r]]
                begins[r] = before
                parts.append((table, length + _SHIFT + before, [token for _, token in nodes[r]]))
            rows = with_trees(RaggedBatch.build(parts, batch.anchors_R.device), parents)
            embedded_TH = self.borrowed.embed(rows.input_ids_T)
            hidden_TH = self._pass(context, rows, embedded_TH, hidden_TH[above])

    def _rows(self, batch: DraftBatch, step: int, count: int) -> RaggedBatch:
        """`count` rows of each request, the first at its pass `step`."""
        starts = [length - 1 + step + _SHIFT for length in batch.lengths]
        return RaggedBatch.build(
            [(t, start, (0,) * count) for t, start in zip(batch.tables, starts, strict=True)],
            batch.anchors_R.device,
        )

    def _pass(
        self, context: PagedCache, rows: RaggedBatch, embedded_TH: Tensor, hidden_TH: Tensor
    ) -> Tensor:
        """The next hidden states [T, H] of rows, whose keys and values are written."""
        plan = self._decode_plan()
        rotary_rows = plan.rotary.upto(rows.longest)[rows.positions_T - _SHIFT]
        return plan.weights.step(embedded_TH, hidden_TH, rotary_rows, self._mix(context, rows))

    def _mix(self, context: PagedCache, rows: RaggedBatch) -> Mix:
        """Attention of rows over their requests' cached ones, and over their own."""
        rule = Rule(self.config.backbone.attention_scale, first=_SHIFT)

        def mix(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            context.write(layer, rows.rows_T, key, value)
            return ragged_attention(query, context, layer, rows, rule)

        return mix

    def _decode_plan(self) -> _DecodePlan:
        if self._plan is None:
            like = self.borrowed.embedding_VH
            # Even in inference mode these are plain tensors: some are the parameters themselves.
            with torch.inference_mode(False), torch.no_grad():
                weights = Eagle3Weights.of(self).like(like)
                if self.borrowed.pack is not None:
                    weights = weights.packed(self.borrowed.pack)
                masked = self.mask_hidden
                mask_1H = None if masked is None else weights.project(masked.to(like).view(1, -1))
                table = RotaryTable(self.config.backbone, like)
                self._plan = _DecodePlan(weights, self.borrowed.packed(), table, mask_1H)
        return self._plan


def _build(config: Eagle3Config, names: Set[str], where: str) -> Eagle3Drafter:  # noqa: ARG001
    return Eagle3Drafter(config)


KIND = DrafterKind(
    drafter=Eagle3Drafter, config=Eagle3Config, build=_build, renamed={"midlayer.": "layers.0."}
)
