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

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, query [.., A, D], key [.., G, D], value [.., G, D]) -> mixed values [.., A, D]."""


@dataclass(frozen=True)
class BackboneConfig:
    """The declared parts of a backbone, Qwen3's layer.

    A family whose layer differs (Gemma4: four norms, values taken from the keys, a layer scalar,
    softmax scale 1) declares the difference as a field here and acts on it in `LayerWeights`.

    Attributes:
        hidden_size: width H, the target's.
        intermediate_size: width of the gated MLP.
        num_layers: draft layers L.
        num_heads: query heads A.
        num_kv_heads: key and value heads G.
        head_dim: D, even.
        num_taps: captured target layers; features have width num_taps * H.
        rms_norm_eps: epsilon of every norm.
        rope_theta: base of the rotary embedding.
        attention_bias: whether q, k, v and o projections have a bias.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_taps: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    attention_bias: bool = False

    @property
    def attention_scale(self) -> float:
        """Factor on query-key products before the softmax."""
        return float(self.head_dim**-0.5)


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
        self.v_proj = nn.Linear(config.hidden_size, kv, bias=config.attention_bias)
        self.o_proj = nn.Linear(query, config.hidden_size, bias=config.attention_bias)
        self.q_norm = RMSNorm(config.head_dim)
        self.k_norm = RMSNorm(config.head_dim)


class MLP(nn.Module):
    """Holds one layer's SwiGLU projections."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)


class Layer(nn.Module):
    """Holds one draft layer."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size)
        self.post_attention_layernorm = RMSNorm(config.hidden_size)


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

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            past_key, past_value = (x.transpose(1, 2) for x in context[layer])
            query, key, value = (x.transpose(1, 2) for x in (query, key, value))
            mixed = []
            for tile in tiles:
                past, slots = slice(tile.context), slice(tile.start, tile.stop)
                out = F.scaled_dot_product_attention(
                    query[:, :, slots],
                    torch.cat((past_key[:, :, past], key[:, :, slots]), dim=2),
                    torch.cat((past_value[:, :, past], value[:, :, slots]), dim=2),
                    attn_mask=tile.mask_BQP.unsqueeze(1),
                    scale=config.attention_scale,
                    enable_gqa=config.num_heads != config.num_kv_heads,
                )
                mixed.append(out)
            return torch.cat(mixed, dim=2).transpose(1, 2)

        return weights.block(block_BQH, rotary(positions_BQ, config, block_BQH.dtype), attend)


@dataclass(frozen=True)
class LayerWeights:
    """One layer's weights, those with a common input side by side."""

    input_norm_H: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    query_key_norm: Tensor  # [A + G, D]
    output: Tensor
    output_bias: Tensor | None
    post_norm_H: Tensor
    gate_up: Tensor
    down: Tensor

    @classmethod
    def of(cls, layer: Layer, config: BackboneConfig) -> LayerWeights:
        """The weights of a layer."""
        attention, mlp = layer.self_attn, layer.mlp
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        norms = [attention.q_norm.weight.expand(config.num_heads, -1)]
        norms.append(attention.k_norm.weight.expand(config.num_kv_heads, -1))
        return cls(
            input_norm_H=layer.input_layernorm.weight,
            qkv=torch.cat([p.weight for p in projections]),
            qkv_bias=torch.cat([p.bias for p in projections]) if config.attention_bias else None,
            query_key_norm=torch.cat(norms),
            output=attention.o_proj.weight,
            output_bias=attention.o_proj.bias,
            post_norm_H=layer.post_attention_layernorm.weight,
            gate_up=torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight)),
            down=mlp.down_proj.weight,
        )


@dataclass(frozen=True)
class BackboneWeights:
    """All weights of a backbone in the form that computes fastest, and the computation."""

    config: BackboneConfig
    fc: Tensor
    hidden_norm_H: Tensor
    context_kv: Tensor  # rows: layer by layer, the key heads, then the value heads
    context_kv_bias: Tensor | None
    context_key_norm: Tensor  # [L, 1, D]
    layers: tuple[LayerWeights, ...]
    norm_H: Tensor

    @classmethod
    def of(cls, backbone: ParallelBackbone) -> BackboneWeights:
        """The weights of a backbone; gradients flow back to its parameters."""
        config = backbone.backbone_config
        layers: list[Layer] = [layer for layer in backbone.layers if isinstance(layer, Layer)]
        pairs = [p for a in layers for p in (a.self_attn.k_proj, a.self_attn.v_proj)]
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
        shape = (config.num_layers, 2, config.num_kv_heads, config.head_dim)
        context = self._norm(F.linear(features, self.fc), self.hidden_norm_H)
        rows = F.linear(context, self.context_kv, self.context_kv_bias)
        key, value = rows.view(rows.shape[:-1] + shape).unbind(-3)
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
        heads = sum(sizes)
        cosine, sine = rotary_rows.unbind(-3)
        for i, layer in enumerate(self.layers):
            qkv = F.linear(self._norm(x, layer.input_norm_H), layer.qkv, layer.qkv_bias)
            qkv = qkv.view((*qkv.shape[:-1], -1, config.head_dim))
            query_key, value = torch.split_with_sizes(qkv, (heads, config.num_kv_heads), -2)
            query_key = torch.rms_norm(query_key, (config.head_dim,), None, config.rms_norm_eps)
            query_key = rotate(query_key * layer.query_key_norm, cosine, sine)
            query, key = torch.split_with_sizes(query_key, sizes, -2)
            mixed = attend(i, query, key, value).flatten(-2)
            x = x + F.linear(mixed, layer.output, layer.output_bias)
            gate_up = F.linear(self._norm(x, layer.post_norm_H), layer.gate_up)
            gate, up = gate_up.chunk(2, dim=-1)
            x = x + F.linear(F.silu(gate) * up, layer.down)
        return self._norm(x, self.norm_H)

    def _norm(self, x: Tensor, weight_H: Tensor) -> Tensor:
        return torch.rms_norm(x, (x.shape[-1],), weight_H, self.config.rms_norm_eps)


def rotary(positions: Tensor, config: BackboneConfig, dtype: torch.dtype) -> Tensor:
    """Cosine and signed sine of positions [..], as [.., 2, 1, D], to broadcast over heads.

    The sine's first half is negated, so that `rotate` needs no negation of its own.
    """
    half = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32)
    frequency = config.rope_theta ** (-half / config.head_dim)
    angle = positions.unsqueeze(-1).float() * frequency
    cosine, sine = angle.cos(), angle.sin()
    pair = (torch.cat((cosine, cosine), dim=-1), torch.cat((-sine, sine), dim=-1))
    return torch.stack(pair, dim=-2).unsqueeze(-2).to(dtype)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary embedding of heads x [.., heads, D], with the two halves of `rotary`."""
    return torch.addcmul(x * cosine, x.roll(x.shape[-1] // 2, -1), sine)
