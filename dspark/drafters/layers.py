"""One draft layer: its parameters under their published names, and its arithmetic.

The arithmetic is written once, on `LayerWeights`, where projections that read the same input are
one matrix. The parallel backbone and Eagle3's layer share it; they differ in what the attention
reads and what it attends to. What differs between families is declared in `BackboneConfig`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspark.drafters.config import BackboneConfig

Product = Callable[[Tensor], Tensor]
"""x [.., inputs] -> [.., outputs], of weights that lie as a kernel wants them, bias included"""
Pack = Callable[..., Product]
"""(weights [outputs, inputs], biases, exact=...) -> their product"""


_FEWEST_POSITIONS = 1024


class RMSNorm(nn.Module):
    """Holds the weight of a root-mean-square norm over the last dimension."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


class Attention(nn.Module):
    """Holds one layer's attention projections and per-head norms.

    Args:
        config: shapes and parts.
        input_width: numbers that query, key and value are made of.
    """

    def __init__(self, config: BackboneConfig, input_width: int) -> None:
        super().__init__()
        query, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(input_width, query, bias=config.attention_bias)
        self.k_proj = nn.Linear(input_width, kv, bias=config.attention_bias)
        self.v_proj: nn.Linear | None = None
        if not config.value_from_key:
            self.v_proj = nn.Linear(input_width, kv, bias=config.attention_bias)
        self.o_proj = nn.Linear(query, config.hidden_size, bias=config.attention_bias)
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if config.query_key_norms:
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
    """Holds one draft layer.

    Args:
        config: shapes and parts.
        input_width: see `Attention`; None for the hidden size.
    """

    layer_scalar: Tensor | None

    def __init__(self, config: BackboneConfig, input_width: int | None = None) -> None:
        super().__init__()
        self.self_attn = Attention(config, input_width or config.hidden_size)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size)
        self.post_attention_layernorm = RMSNorm(config.hidden_size)
        self.pre_feedforward_layernorm: RMSNorm | None = None
        self.post_feedforward_layernorm: RMSNorm | None = None
        if config.sandwich_norms:
            self.pre_feedforward_layernorm = RMSNorm(config.hidden_size)
            self.post_feedforward_layernorm = RMSNorm(config.hidden_size)
        self.register_buffer("layer_scalar", torch.ones(1) if config.layer_scalar else None)


@dataclass(frozen=True)
class LayerWeights:
    """One layer's weights, those with a common input side by side, and the computation.

    A layer without sandwich norms has no norm after attention and MLP.
    """

    config: BackboneConfig
    input_norm_H: Tensor
    qkv: Tensor | Product  # the value's rows only where it has its own
    qkv_bias: Tensor | None
    key_value_rows: Product | None  # those of `qkv` behind the query's, where they are packed too
    query_key_norm: Tensor | None  # [A + G, D]
    output: Tensor | Product
    output_bias: Tensor | None
    attention_out_norm_H: Tensor | None
    mlp_norm_H: Tensor
    gate_up: Tensor | Product
    down: Tensor | Product
    mlp_out_norm_H: Tensor | None
    scalar_1: Tensor | None

    @classmethod
    def of(cls, layer: Layer, config: BackboneConfig) -> LayerWeights:
        """The weights of a layer; gradients flow back to its parameters."""
        attention, mlp = layer.self_attn, layer.mlp
        projections = attention.projections()
        after_attention, before_mlp = (
            layer.post_attention_layernorm,
            layer.pre_feedforward_layernorm,
        )
        after_mlp = layer.post_feedforward_layernorm
        query_key_norm: Tensor | None = None
        if attention.q_norm is not None and attention.k_norm is not None:
            query_norm = attention.q_norm.weight.expand(config.num_heads, -1)
            key_norm = attention.k_norm.weight.expand(config.num_kv_heads, -1)
            query_key_norm = torch.cat((query_norm, key_norm))
        return cls(
            config=config,
            input_norm_H=layer.input_layernorm.weight,
            qkv=torch.cat([p.weight for p in projections]),
            qkv_bias=torch.cat([p.bias for p in projections]) if config.attention_bias else None,
            key_value_rows=None,
            query_key_norm=query_key_norm,
            output=attention.o_proj.weight,
            output_bias=attention.o_proj.bias,
            attention_out_norm_H=None if before_mlp is None else after_attention.weight,
            mlp_norm_H=(after_attention if before_mlp is None else before_mlp).weight,
            gate_up=torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight)),
            down=mlp.down_proj.weight,
            mlp_out_norm_H=None if after_mlp is None else after_mlp.weight,
            scalar_1=layer.layer_scalar,
        )

    def like(self, other: Tensor) -> LayerWeights:
        """The same in dtype and on the device of `other`."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {n: x.to(other) for n, x in named.items() if isinstance(x, Tensor)}
        return replace(self, **moved)

    def packed(self, pack: Pack, *, looks: bool = False) -> LayerWeights:
        """The same with its projections packed, for decoding.

        Args:
            pack: lays weights out as the target's are.
            looks: `key_value` is needed too.
        """
        return replace(
            self,
            key_value_rows=packed(pack, *self._key_value_rows()) if looks else None,
            qkv=packed(pack, self.qkv, self.qkv_bias),
            output=packed(pack, self.output, self.output_bias),
            gate_up=packed(pack, self.gate_up),
            down=packed(pack, self.down),
        )

    def heads(self, x: Tensor, cosine_sine: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Query [.., A, D], key and value [.., G, D] of what the attention reads.

        Args:
            x: the attention's input, normed.
            cosine_sine: the two halves of `rotary` of the rows' positions.
        """
        config, sizes = self.config, (self.config.num_heads, self.config.num_kv_heads)
        # A key that is also the value is the last heads of the projection as much as a value is.
        own = 0 if config.value_from_key else config.num_kv_heads
        qkv = project(x, self.qkv, self.qkv_bias)
        qkv = qkv.view((*qkv.shape[:-1], -1, config.head_dim))
        value = value_of(qkv.narrow(-2, sizes[0] + own, sizes[1]), config)
        query_key = turned(qkv.narrow(-2, 0, sum(sizes)), self.query_key_norm, cosine_sine, config)
        query, key = torch.split_with_sizes(query_key, sizes, -2)
        return query, key, value

    def key_value(self, x: Tensor, cosine_sine: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Key and value [.., G, D] of rows that are only looked at; args as `heads`."""
        config, first = self.config, self.config.num_heads
        if self.key_value_rows is None:
            rows = F.linear(x, *self._key_value_rows())
        else:
            rows = self.key_value_rows(x)
        rows = rows.view((*rows.shape[:-1], -1, config.head_dim))
        key, value = rows[..., : config.num_kv_heads, :], rows[..., -config.num_kv_heads :, :]
        key_norm = None if self.query_key_norm is None else self.query_key_norm[first:]
        key = turned(key, key_norm, cosine_sine, config)
        return key, value_of(value, config)

    def _key_value_rows(self) -> tuple[Tensor, Tensor | None]:
        """The rows of weight and bias that make keys and values."""
        assert isinstance(self.qkv, Tensor), "packed weights have no rows"
        first = self.config.num_heads * self.config.head_dim
        return self.qkv[first:], None if self.qkv_bias is None else self.qkv_bias[first:]

    def finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        """The layer's output [.., H].

        Args:
            x: the residual stream [.., H] before the layer.
            mixed: mixed values [.., A, D].
        """
        mixed = project(mixed.flatten(-2), self.output, self.output_bias)
        if self.attention_out_norm_H is not None:
            mixed = norm(mixed, self.attention_out_norm_H, self.config)
        x = x + mixed
        gate, up = project(norm(x, self.mlp_norm_H, self.config), self.gate_up).chunk(2, dim=-1)
        mlp = project(self._activate(gate) * up, self.down)
        if self.mlp_out_norm_H is not None:
            mlp = norm(mlp, self.mlp_out_norm_H, self.config)
        x = x + mlp
        return x if self.scalar_1 is None else x * self.scalar_1

    def _activate(self, gate: Tensor) -> Tensor:
        if self.config.activation == "silu":
            return F.silu(gate)
        return F.gelu(gate, approximate="tanh")


def project(x: Tensor, weight: Tensor | Product, bias: Tensor | None = None) -> Tensor:
    """`linear`, by a weight [outputs, inputs] or by a packed one, whose bias is in its product."""
    return F.linear(x, weight, bias) if isinstance(weight, Tensor) else weight(x)


def packed(pack: Pack, weight: Tensor | Product, bias: Tensor | None = None) -> Product:
    """The product of one weight; values may be rounded, since drafts are verified."""
    assert isinstance(weight, Tensor), "weights are packed once"
    return pack([weight], [bias], exact=False)


def norm(x: Tensor, weight: Tensor | None, config: BackboneConfig) -> Tensor:
    """Root-mean-square norm over the last dimension."""
    return torch.rms_norm(x, x.shape[-1:], weight, config.rms_norm_eps)


def value_of(value: Tensor, config: BackboneConfig) -> Tensor:
    """Value heads [.., D] as the attention mixes them."""
    return norm(value, None, config) if config.value_norm else value


def turned(
    heads: Tensor, norm_weight: Tensor | None, cosine_sine: Sequence[Tensor], config: BackboneConfig
) -> Tensor:
    """Query or key heads [.., heads, D], normed where they have norms, turned to their positions.

    Args:
        heads: as projected.
        norm_weight: [heads, D]; None for no norm.
        cosine_sine: the two halves of `rotary` of their positions.
        config: for epsilon.
    """
    if norm_weight is not None:
        heads = norm(heads, None, config) * norm_weight
    return rotate(heads, *cosine_sine)


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


class RotaryTable:
    """Rows of `rotary` by position, computed as far as anyone has asked.

    Args:
        config: of the backbone.
        like: gives dtype and device.
    """

    def __init__(self, config: BackboneConfig, like: Tensor) -> None:
        self._config, self._like = config, like
        self._table = self._compute(_FEWEST_POSITIONS)

    def upto(self, positions: int) -> Tensor:
        """At least so many rows, [positions or more, 2, 1, D]."""
        if len(self._table) < positions:
            self._table = self._compute(1 << (positions - 1).bit_length())
        return self._table

    @torch.inference_mode(False)
    def _compute(self, positions: int) -> Tensor:
        numbers = torch.arange(positions, device=self._like.device)
        return rotary(numbers, self._config, self._like.dtype)
