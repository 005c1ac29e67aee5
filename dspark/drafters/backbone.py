"""The parallel block backbone: one pass predicts every slot of a block (eqs. 2, 3).

The context c = hidden_norm(fc(features)) is made once and gives every layer keys and values,
without an input norm; the block's slots attend to all of it and to each other in both directions
(docs/method.md, 2.1). Module names are the published state dict's keys.

The arithmetic is written once, on `BackboneWeights`, where projections that read the same input are
one matrix: those of a layer (`layers.LayerWeights`), and the context's keys and values of all
layers. Training builds these views of the parameters at every step (gradients flow through the
concatenation); decoding builds them once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from dspark.attention.blocks import BlockContext, block_attention
from dspark.attention.packed import BlockLayout, PackedRows, packed_attention
from dspark.attention.paged_cache import PagedCache
from dspark.attention.ragged_batch import RaggedBatch
from dspark.drafters.config import BackboneConfig
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
    rotary,
    turned,
    value_of,
)

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, query [.., A, D], key [.., G, D], value [.., G, D]) -> mixed values [.., A, D]."""


class BlockForward(Protocol):
    """The layers of a backbone, made ready for decoding."""

    def observe(self, context: PagedCache, batch: RaggedBatch, features_TF: Tensor) -> None:
        """Append the context rows of committed tokens."""
        ...

    def hidden(self, context: PagedCache, blocks: BlockContext, x_RKH: Tensor) -> Tensor:
        """Hidden states [R, K, H] of blocks from their input embeddings."""
        ...


class ParallelBackbone(nn.Module):
    """The parameters of a backbone, under their published names."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.backbone_config = config
        self.fc = nn.Linear(config.num_taps * config.hidden_size, config.hidden_size, bias=False)
        self.hidden_norm = RMSNorm(config.hidden_size)
        self.layers = nn.ModuleList(self.new_layers())
        self.norm = RMSNorm(config.hidden_size)

    def new_layers(self) -> Iterable[nn.Module]:
        """The layers that `backbone_config` describes."""
        return (Layer(self.backbone_config) for _ in range(self.backbone_config.num_layers))

    def decoding(self, like: Tensor, pack: Pack | None) -> BlockForward:
        """A copy for decoding.

        Args:
            like: gives dtype and device.
            pack: packs weights as the target's are, if they are.
        """
        weights = BackboneWeights.of(backbone_like(self, like))
        if pack is not None:
            weights = weights.packed(pack)
        return DecodingBackbone(weights, RotaryTable(self.backbone_config, like))

    def run_blocks(
        self,
        features_TF: Tensor,
        context_positions_T: Tensor,
        block_QH: Tensor,
        positions_Q: Tensor,
        layout: BlockLayout,
    ) -> Tensor:
        """The training pass: packed blocks over packed contexts.

        Args:
            features_TF: captured features of all contexts, one after the other.
            context_positions_T: their positions.
            block_QH: input embeddings of all blocks' slots.
            positions_Q: their positions.
            layout: which context rows each block sees.

        Returns:
            Hidden states [Q, H] after the final norm.
        """
        config, weights = self.backbone_config, BackboneWeights.of(self)
        dtype = features_TF.dtype
        context = weights.context(features_TF, rotary(context_positions_T, config, dtype))

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            window = config.window(layer)
            return packed_attention(
                PackedRows(query, *context[layer], key, value),
                layout,
                scale=config.attention_scale,
                window=window,
                causal=config.causal_windows and window is not None,
            )

        return weights.block(block_QH, rotary(positions_Q, config, block_QH.dtype), attend)


@dataclass(frozen=True)
class BackboneWeights:
    """All weights of a backbone in the form that computes fastest, and the computation."""

    config: BackboneConfig
    fc: Tensor | Product
    hidden_norm_H: Tensor
    context_kv: (
        Tensor | Product
    )  # rows: layer by layer, the key heads, then any value heads of their own
    context_kv_bias: Tensor | None
    context_key_norm: Tensor  # [L, 1, D]
    layers: tuple[LayerWeights, ...]
    norm_H: Tensor

    @classmethod
    def of(cls, backbone: ParallelBackbone) -> BackboneWeights:
        """The weights of a backbone; gradients flow back to its parameters."""
        config = backbone.backbone_config
        layers: list[Layer] = [layer for layer in backbone.layers if isinstance(layer, Layer)]
        key_norms = [a.self_attn.k_norm for a in layers if a.self_attn.k_norm is not None]
        pairs = [p for a in layers for p in a.self_attn.projections()[1:]]
        return cls(
            config=config,
            fc=backbone.fc.weight,
            hidden_norm_H=backbone.hidden_norm.weight,
            context_kv=torch.cat([p.weight for p in pairs]),
            context_kv_bias=torch.cat([p.bias for p in pairs]) if config.attention_bias else None,
            context_key_norm=torch.stack([n.weight for n in key_norms]).unsqueeze(1),
            layers=tuple(LayerWeights.of(layer, config) for layer in layers),
            norm_H=backbone.norm.weight,
        )

    def packed(self, pack: Pack) -> BackboneWeights:
        """The same with its projections packed, for decoding."""
        return replace(
            self,
            fc=packed(pack, self.fc),
            context_kv=packed(pack, self.context_kv, self.context_kv_bias),
            layers=tuple(layer.packed(pack) for layer in self.layers),
        )

    def context(self, features: Tensor, rotary_rows: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [.., G, D] of the context, per layer.

        Args:
            features: captured features [.., F].
            rotary_rows: `rotary` of their positions.
        """
        config = self.config
        projections = 1 if config.value_from_key else 2
        shape = (config.num_layers, projections, config.num_kv_heads, config.head_dim)
        context = norm(project(features, self.fc), self.hidden_norm_H, config)
        rows = project(context, self.context_kv, self.context_kv_bias)
        rows = rows.view(rows.shape[:-1] + shape)
        cosine_sine = rotary_rows.unsqueeze(-2).unbind(-4)
        key = turned(rows.select(-3, 0), self.context_key_norm, cosine_sine, config)
        value = value_of(rows.select(-3, -1), config)
        return list(zip(key.unbind(-3), value.unbind(-3), strict=True))

    def block(self, x: Tensor, rotary_rows: Tensor, attend: Attend) -> Tensor:
        """Hidden states [.., H] of a block's slots after the final norm.

        Args:
            x: input embeddings [.., H].
            rotary_rows: `rotary` of the slots' positions.
            attend: mixes values over context and block.
        """
        cosine_sine = rotary_rows.unbind(-3)
        for i, layer in enumerate(self.layers):
            read = norm(x, layer.input_norm_H, self.config)
            x = layer.finish(x, attend(i, *layer.heads(read, cosine_sine)))
        return norm(x, self.norm_H, self.config)


@dataclass(frozen=True)
class DecodingBackbone:
    """Fused weights and `rotary` by position."""

    weights: BackboneWeights
    rotary: RotaryTable

    def observe(self, context: PagedCache, batch: RaggedBatch, features_TF: Tensor) -> None:
        """Append the context keys and values of committed tokens."""
        rotary_rows = self.rotary.upto(batch.longest)[batch.positions_T]
        rows = self.weights.context(features_TF, rotary_rows)
        for layer, (key_TGD, value_TGD) in enumerate(rows):
            context.write(layer, batch.rows_T, key_TGD, value_TGD)

    def hidden(self, context: PagedCache, blocks: BlockContext, x_RKH: Tensor) -> Tensor:
        """Hidden states [R, K, H] of blocks after the final norm."""
        config, slots = self.weights.config, x_RKH.shape[1]

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            window = config.window(layer)
            return block_attention(
                query,
                key,
                value,
                context,
                layer,
                blocks,
                scale=config.attention_scale,
                window=window,
                causal=config.causal_windows and window is not None,
            )

        table = self.rotary.upto(max(blocks.lengths) + slots)
        return self.weights.block(x_RKH, table[blocks.positions_RK(slots, x_RKH.device)], attend)


def backbone_like(source: ParallelBackbone, like: Tensor) -> ParallelBackbone:
    """The backbone alone (a drafter has more), in the dtype and on the device of `like`."""
    with torch.device("meta"):
        backbone = ParallelBackbone(source.backbone_config)
    state = source.state_dict()
    rows = {name: state[name].to(like) for name in backbone.state_dict()}
    backbone.load_state_dict(rows, assign=True)
    return backbone
