"""The parallel block backbone: one pass predicts every slot of a block (METHOD.md 2).

The context c = hidden_norm(fc(features)) is made once and gives every layer keys and values,
without an input norm; the block's slots attend to all of it and to each other in both directions
(FORMAT_FACTS.md A.5). Module names are the published state dict's keys (A.2).

The arithmetic is written once, on `BackboneWeights`, where projections that read the same input are
one matrix: query, key and value of a block; gate and up; and the context's keys and values of all
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


class RMSNorm(nn.Module):
    """Holds the weight of a root-mean-square norm over the last dimension."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


class Attention(nn.Module):
    """Holds one layer's attention projections and per-head norms."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        query, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv, bias=config.attention_bias)
        self.v_proj: nn.Linear | None = None
        if not config.value_from_key:
            self.v_proj = nn.Linear(config.hidden_size, kv, bias=config.attention_bias)
        self.o_proj = nn.Linear(query, config.hidden_size, bias=config.attention_bias)
        self.q_norm = RMSNorm(config.head_dim)
        self.k_norm = RMSNorm(config.head_dim)

    def projections(self) -> tuple[nn.Linear, ...]:
        """Of query, key and, where it has its own, value."""
        query_key = (self.q_proj, self.k_proj)
        return query_key if self.v_proj is None else (*query_key, self.v_proj)


class MLP(nn.Module):
    """Holds one layer's gated projections."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)


class Layer(nn.Module):
    """Holds one draft layer."""

    layer_scalar: Tensor | None

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size)
        self.post_attention_layernorm = RMSNorm(config.hidden_size)
        self.pre_feedforward_layernorm: RMSNorm | None = None
        self.post_feedforward_layernorm: RMSNorm | None = None
        if config.sandwich_norms:
            self.pre_feedforward_layernorm = RMSNorm(config.hidden_size)
            self.post_feedforward_layernorm = RMSNorm(config.hidden_size)
        self.register_buffer("layer_scalar", torch.ones(1) if config.layer_scalar else None)


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
class LayerWeights:
    """One layer's weights, those with a common input side by side.

    A layer without sandwich norms has no norm after attention and MLP.
    """

    input_norm_H: Tensor
    qkv: Tensor  # the value's rows only where it has its own
    qkv_bias: Tensor | None
    query_key_norm: Tensor  # [A + G, D]
    output: Tensor
    output_bias: Tensor | None
    attention_out_norm_H: Tensor | None
    mlp_norm_H: Tensor
    gate_up: Tensor
    down: Tensor
    mlp_out_norm_H: Tensor | None
    scalar_1: Tensor | None

    @classmethod
    def of(cls, layer: Layer, config: BackboneConfig) -> LayerWeights:
        """The weights of a layer."""
        attention, mlp = layer.self_attn, layer.mlp
        projections = attention.projections()
        after_attention, before_mlp = (
            layer.post_attention_layernorm,
            layer.pre_feedforward_layernorm,
        )
        after_mlp = layer.post_feedforward_layernorm
        norms = [attention.q_norm.weight.expand(config.num_heads, -1)]
        norms.append(attention.k_norm.weight.expand(config.num_kv_heads, -1))
        return cls(
            input_norm_H=layer.input_layernorm.weight,
            qkv=torch.cat([p.weight for p in projections]),
            qkv_bias=torch.cat([p.bias for p in projections]) if config.attention_bias else None,
            query_key_norm=torch.cat(norms),
            output=attention.o_proj.weight,
            output_bias=attention.o_proj.bias,
            attention_out_norm_H=None if before_mlp is None else after_attention.weight,
            mlp_norm_H=(after_attention if before_mlp is None else before_mlp).weight,
            gate_up=torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight)),
            down=mlp.down_proj.weight,
            mlp_out_norm_H=None if after_mlp is None else after_mlp.weight,
            scalar_1=layer.layer_scalar,
        )


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
        pairs = [p for a in layers for p in a.self_attn.projections()[1:]]
        return cls(
            config=config,
            fc=backbone.fc.weight,
            hidden_norm_H=backbone.hidden_norm.weight,
            context_kv=torch.cat([p.weight for p in pairs]),
            context_kv_bias=torch.cat([p.bias for p in pairs]) if config.attention_bias else None,
            context_key_norm=torch.stack([a.self_attn.k_norm.weight for a in layers]).unsqueeze(1),
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
        context = self._norm(F.linear(features, self.fc), self.hidden_norm_H)
        rows = F.linear(context, self.context_kv, self.context_kv_bias)
        rows = rows.view(rows.shape[:-1] + shape)
        key, value = rows.select(-3, 0), self._value(rows.select(-3, -1))
        key = torch.rms_norm(key, (config.head_dim,), None, config.rms_norm_eps)
        cosine, sine = rotary_rows.unsqueeze(-2).unbind(-4)
        key = rotate(key * self.context_key_norm, cosine, sine)
        return list(zip(key.unbind(-3), value.unbind(-3), strict=True))

    def block(self, x: Tensor, rotary_rows: Tensor, attend: Attend) -> Tensor:
        """Hidden states [.., H] of a block's slots after the final norm.

        Args:
            x: input embeddings [.., H].
            rotary_rows: `rotary` of the slots' positions.
            attend: mixes values over context and block.
        """
        config = self.config
        sizes = (config.num_heads, config.num_kv_heads)
        # A key that is also the value is the last heads of the projection as much as a value is.
        own = 0 if config.value_from_key else config.num_kv_heads
        cosine, sine = rotary_rows.unbind(-3)
        for i, layer in enumerate(self.layers):
            qkv = F.linear(self._norm(x, layer.input_norm_H), layer.qkv, layer.qkv_bias)
            qkv = qkv.view((*qkv.shape[:-1], -1, config.head_dim))
            value = self._value(qkv.narrow(-2, sizes[0] + own, sizes[1]))
            query_key = qkv.narrow(-2, 0, sum(sizes))
            query_key = torch.rms_norm(query_key, (config.head_dim,), None, config.rms_norm_eps)
            query_key = rotate(query_key * layer.query_key_norm, cosine, sine)
            query, key = torch.split_with_sizes(query_key, sizes, -2)
            mixed = attend(i, query, key, value).flatten(-2)
            mixed = F.linear(mixed, layer.output, layer.output_bias)
            if layer.attention_out_norm_H is not None:
                mixed = self._norm(mixed, layer.attention_out_norm_H)
            x = x + mixed
            gate_up = F.linear(self._norm(x, layer.mlp_norm_H), layer.gate_up)
            gate, up = gate_up.chunk(2, dim=-1)
            mlp = F.linear(self._activate(gate) * up, layer.down)
            if layer.mlp_out_norm_H is not None:
                mlp = self._norm(mlp, layer.mlp_out_norm_H)
            x = x + mlp
            if layer.scalar_1 is not None:
                x = x * layer.scalar_1
        return self._norm(x, self.norm_H)

    def _activate(self, gate: Tensor) -> Tensor:
        if self.config.activation == "silu":
            return F.silu(gate)
        return F.gelu(gate, approximate="tanh")

    def _value(self, value: Tensor) -> Tensor:
        if not self.config.value_norm:
            return value
        return torch.rms_norm(value, (self.config.head_dim,), None, self.config.rms_norm_eps)

    def _norm(self, x: Tensor, weight_H: Tensor) -> Tensor:
        return torch.rms_norm(x, (x.shape[-1],), weight_H, self.config.rms_norm_eps)


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


def rotary(positions: Tensor, config: BackboneConfig, dtype: torch.dtype) -> Tensor:
    """Cosine and signed sine of positions [..], as [.., 2, 1, D], to broadcast over heads.

    The sine's first half is negated, so that `rotate` needs no negation of its own.
    """
    half = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32)
    frequency = config.rope_theta ** (-half / config.head_dim)
    turning = int(config.rotary_fraction * config.head_dim / 2)
    frequency = torch.where(half < 2 * turning, frequency, 0.0)
    angle = positions.unsqueeze(-1).float() * frequency
    cosine, sine = angle.cos(), angle.sin()
    pair = (torch.cat((cosine, cosine), dim=-1), torch.cat((-sine, sine), dim=-1))
    return torch.stack(pair, dim=-2).unsqueeze(-2).to(dtype)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary embedding of heads x [.., heads, D], with the two halves of `rotary`."""
    return torch.addcmul(x * cosine, x.roll(x.shape[-1] // 2, -1), sine)
