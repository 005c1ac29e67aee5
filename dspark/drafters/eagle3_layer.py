"""Eagle3's single autoregressive layer (FORMAT_FACTS.md A.4).

A row is made of two parts: the hidden state h of a token (projected features, or what this layer
gave a step before) and the embedding of the token after it. Both are normed and laid side by side
as the input of the attention, so that the q, k and v projections read 2 H numbers; the residual is
h itself, before its norm. What comes out is the next step's h, and, normed, what the head reads.

Module names are the published state dict's keys. The arithmetic is written once, on
`Eagle3Weights`: training builds it from the parameters at every step (gradients flow through),
decoding once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspark.drafters.backbone import MLP, RMSNorm, rotate
from dspark.drafters.config import BackboneConfig

Mix = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(query [.., A, D], key [.., G, D], value [.., G, D]) -> mixed values [.., A, D]."""


class Eagle3Attention(nn.Module):
    """Holds projections from twice the width, and per-head norms."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        query, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        width, bias = 2 * config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(width, query, bias=bias)
        self.k_proj = nn.Linear(width, kv, bias=bias)
        self.v_proj = nn.Linear(width, kv, bias=bias)
        self.o_proj = nn.Linear(query, config.hidden_size, bias=bias)
        self.q_norm = RMSNorm(config.head_dim)
        self.k_norm = RMSNorm(config.head_dim)


class Eagle3Layer(nn.Module):
    """Holds the layer."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.self_attn = Eagle3Attention(config)
        self.mlp = MLP(config)
        self.hidden_norm = RMSNorm(config.hidden_size)
        self.input_layernorm = RMSNorm(config.hidden_size)
        self.post_attention_layernorm = RMSNorm(config.hidden_size)


class Eagle3Backbone(nn.Module):
    """The parameters of an Eagle3 drafter, under their published names."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.backbone_config = config
        self.fc = nn.Linear(config.num_taps * config.hidden_size, config.hidden_size, bias=False)
        self.layers = nn.ModuleList([Eagle3Layer(config)])
        self.norm = RMSNorm(config.hidden_size)


@dataclass(frozen=True)
class Eagle3Weights:
    """All weights, those with a common input side by side, and the computation."""

    config: BackboneConfig
    fc: Tensor
    input_norm_H: Tensor
    hidden_norm_H: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    query_key_norm: Tensor  # [A + G, D]
    output: Tensor
    output_bias: Tensor | None
    post_norm_H: Tensor
    gate_up: Tensor
    down: Tensor
    norm_H: Tensor

    @classmethod
    def of(cls, backbone: Eagle3Backbone) -> Eagle3Weights:
        """The weights of a backbone; gradients flow back to its parameters."""
        config, layer = backbone.backbone_config, backbone.layers[0]
        assert isinstance(layer, Eagle3Layer)
        attention, mlp = layer.self_attn, layer.mlp
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        norms = [attention.q_norm.weight.expand(config.num_heads, -1)]
        norms.append(attention.k_norm.weight.expand(config.num_kv_heads, -1))
        return cls(
            config=config,
            fc=backbone.fc.weight,
            input_norm_H=layer.input_layernorm.weight,
            hidden_norm_H=layer.hidden_norm.weight,
            qkv=torch.cat([p.weight for p in projections]),
            qkv_bias=torch.cat([p.bias for p in projections]) if config.attention_bias else None,
            query_key_norm=torch.cat(norms),
            output=attention.o_proj.weight,
            output_bias=attention.o_proj.bias,
            post_norm_H=layer.post_attention_layernorm.weight,
            gate_up=torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight)),
            down=mlp.down_proj.weight,
            norm_H=backbone.norm.weight,
        )

    def like(self, other: Tensor) -> Eagle3Weights:
        """The same in dtype and on the device of `other`."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {n: x.to(other) for n, x in named.items() if isinstance(x, Tensor)}
        return replace(self, **moved)

    def project(self, features: Tensor) -> Tensor:
        """The first hidden states [.., H] of captured features [.., F]."""
        return F.linear(features, self.fc)

    def key_value(
        self, embedded: Tensor, hidden: Tensor, rotary_rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Keys and values [.., G, D] of rows that are only looked at.

        Args:
            embedded: embeddings [.., H] of the tokens after the rows' own.
            hidden: hidden states [.., H] of the rows.
            rotary_rows: `backbone.rotary` of their positions.
        """
        config = self.config
        rows = config.num_heads * config.head_dim
        bias = None if self.qkv_bias is None else self.qkv_bias[rows:]
        both = F.linear(self._input(embedded, hidden), self.qkv[rows:], bias)
        both = both.view((*both.shape[:-1], -1, config.head_dim))
        key, value = both.chunk(2, dim=-2)
        return self._turn(key, self.query_key_norm[config.num_heads :], rotary_rows), value

    def step(self, embedded: Tensor, hidden: Tensor, rotary_rows: Tensor, mix: Mix) -> Tensor:
        """One pass through the layer.

        Args:
            embedded: embeddings [.., H] of the tokens after the rows' own.
            hidden: hidden states [.., H] of the rows.
            rotary_rows: `backbone.rotary` of their positions.
            mix: attends.

        Returns:
            The next hidden states [.., H], before the final norm.
        """
        config = self.config
        heads, groups = config.num_heads, config.num_kv_heads
        qkv = F.linear(self._input(embedded, hidden), self.qkv, self.qkv_bias)
        qkv = qkv.view((*qkv.shape[:-1], -1, config.head_dim))
        query_key, value = torch.split_with_sizes(qkv, (heads + groups, groups), -2)
        query_key = self._turn(query_key, self.query_key_norm, rotary_rows)
        query, key = torch.split_with_sizes(query_key, (heads, groups), -2)
        mixed = mix(query, key, value).flatten(-2)
        x = hidden + F.linear(mixed, self.output, self.output_bias)
        gate_up = F.linear(self._norm(x, self.post_norm_H), self.gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return x + F.linear(F.silu(gate) * up, self.down)

    def final(self, hidden: Tensor) -> Tensor:
        """Hidden states [.., H] as the head reads them."""
        return self._norm(hidden, self.norm_H)

    def _input(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        normed = self._norm(embedded, self.input_norm_H), self._norm(hidden, self.hidden_norm_H)
        return torch.cat(normed, dim=-1)

    def _turn(self, heads: Tensor, norm: Tensor, rotary_rows: Tensor) -> Tensor:
        cosine, sine = rotary_rows.unbind(-3)
        heads = torch.rms_norm(heads, (self.config.head_dim,), None, self.config.rms_norm_eps)
        return rotate(heads * norm, cosine, sine)

    def _norm(self, x: Tensor, weight_H: Tensor) -> Tensor:
        return torch.rms_norm(x, (x.shape[-1],), weight_H, self.config.rms_norm_eps)
