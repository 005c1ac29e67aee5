"""The parallel block backbone: one pass predicts every slot of a block (METHOD.md 2).

The context c = hidden_norm(fc(features)) is made once and gives every layer keys and values,
without an input norm; the block's slots attend to all of it and to each other in both directions
(FORMAT_FACTS.md A.5). Module names are the published state dict's keys (A.2).

The arithmetic is written once, on `BackboneWeights`, where projections that read the same input are
one matrix: those of a layer (`layers.LayerWeights`), and the context's keys and values of all
layers. Training builds these views of the parameters at every step (gradients flow through the
concatenation); decoding builds them once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspark.drafters.config import BackboneConfig
from dspark.drafters.layers import Layer, LayerWeights, RMSNorm, norm, rotary, turned, value_of

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, query [.., A, D], key [.., G, D], value [.., G, D]) -> mixed values [.., A, D]."""


@dataclass(frozen=True)
class AttentionTile:
    """Neighbouring slots of packed blocks, and what they may look at.

    Attributes:
        start, stop: the slots' range among all slots of the sequence.
        context: number of context rows, from the first, that any of them sees.
        mask_BQP: True where a slot may look, over P = context rows, then the tile's own slots.
    """

    start: int
    stop: int
    context: int
    mask_BQP: Tensor


class ParallelBackbone(nn.Module):
    """The parameters of a backbone, under their published names."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.backbone_config = config
        self.fc = nn.Linear(config.num_taps * config.hidden_size, config.hidden_size, bias=False)
        self.hidden_norm = RMSNorm(config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size)

    def run_blocks(
        self,
        features_BSF: Tensor,
        block_BQH: Tensor,
        positions_BQ: Tensor,
        tiles: Sequence[AttentionTile],
    ) -> Tensor:
        """The training pass: many packed blocks over one context each.

        Args:
            features_BSF: captured features; row s has position s.
            block_BQH: input embeddings of Q = anchors * K slots.
            positions_BQ: their positions.
            tiles: what the slots may look at; together they cover all slots, in order.

        Returns:
            Hidden states [B, Q, H] after the final norm.
        """
        config, weights = self.backbone_config, BackboneWeights.of(self)
        context_positions = torch.arange(features_BSF.shape[1], device=features_BSF.device)
        context = weights.context(
            features_BSF, rotary(context_positions, config, features_BSF.dtype)
        )

        masks = layer_masks(tiles, config)

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            past_key, past_value = (x.transpose(1, 2) for x in context[layer])
            query, key, value = (x.transpose(1, 2) for x in (query, key, value))
            mixed = []
            for tile, mask_BQP in zip(tiles, masks[layer], strict=True):
                past, slots = slice(tile.context), slice(tile.start, tile.stop)
                out = F.scaled_dot_product_attention(
                    query[:, :, slots],
                    torch.cat((past_key[:, :, past], key[:, :, slots]), dim=2),
                    torch.cat((past_value[:, :, past], value[:, :, slots]), dim=2),
                    attn_mask=mask_BQP.unsqueeze(1),
                    scale=config.attention_scale,
                    enable_gqa=config.num_heads != config.num_kv_heads,
                )
                mixed.append(out)
            return torch.cat(mixed, dim=2).transpose(1, 2)

        return weights.block(block_BQH, rotary(positions_BQ, config, block_BQH.dtype), attend)


@dataclass(frozen=True)
class BackboneWeights:
    """All weights of a backbone in the form that computes fastest, and the computation."""

    config: BackboneConfig
    fc: Tensor
    hidden_norm_H: Tensor
    context_kv: Tensor  # rows: layer by layer, the key heads, then any value heads of their own
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

    def context(self, features: Tensor, rotary_rows: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [.., G, D] of the context, per layer.

        Args:
            features: captured features [.., F].
            rotary_rows: `rotary` of their positions.
        """
        config = self.config
        projections = 1 if config.value_from_key else 2
        shape = (config.num_layers, projections, config.num_kv_heads, config.head_dim)
        context = norm(F.linear(features, self.fc), self.hidden_norm_H, config)
        rows = F.linear(context, self.context_kv, self.context_kv_bias)
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


def layer_masks(tiles: Sequence[AttentionTile], config: BackboneConfig) -> list[list[Tensor]]:
    """Per draft layer, the mask of every tile: its own, narrowed by the layer's window."""
    whole = [tile.mask_BQP for tile in tiles]
    if not config.sliding_layers:
        return [whole] * config.num_layers
    narrowed = [_windowed(tile, config) for tile in tiles]
    return [whole if config.window(i) is None else narrowed for i in range(config.num_layers)]


def _windowed(tile: AttentionTile, config: BackboneConfig) -> Tensor:
    """A tile's mask without the context rows before the last `sliding_window` that it allows."""
    assert config.sliding_window is not None
    context = tile.mask_BQP[..., : tile.context]
    # Context is allowed from the first row on, so the number allowed is where it ends.
    ends_BQ1 = context.sum(dim=-1, keepdim=True)
    columns = torch.arange(tile.context, device=context.device)
    context = context & (columns >= ends_BQ1 - config.sliding_window)
    slots = tile.mask_BQP[..., tile.context :]
    return torch.cat((context, slots.tril() if config.causal_windows else slots), dim=-1)
