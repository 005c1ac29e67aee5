"""DeepSeek-V4's decoder layers, which are transformers' own, as stages of a drafter.

The residual has several streams. In V4 each sublayer collapses them with a mix that it computes
itself, and a head collapses those that the last stage leaves. In V4.1 each sublayer collapses them
with the mix that the sublayer before it computed: the first takes stream 0, and the last mix takes
the head's place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspark.drafters.config import BackboneConfig
from dspark.drafters.heads import at_least_fp32
from dspark.errors import CompatibilityError

# Fields of the layers that have the same name in a config.json and in transformers.
SAME_INTEGERS = (
    "hidden_size",
    "head_dim",
    "sliding_window",
    "q_lora_rank",
    "o_lora_rank",
    "o_groups",
    "hc_mult",
    "hc_sinkhorn_iters",
)
SAME_NUMBERS = ("rms_norm_eps", "routed_scaling_factor", "swiglu_limit", "hc_eps")
_ATTENTION = "dspark_draft_block"
# Stored and computed in fp32, as in the published files.
_FP32 = ("_hc.", "hc_head.", "sinks", "e_score_correction_bias")


@dataclass(frozen=True)
class DeepseekV4Layers(BackboneConfig):
    """A backbone of DeepSeek-V4 layers; the defaults are V4-Flash's.

    Attributes:
        q_lora_rank: width of the query's low-rank projection.
        o_lora_rank: width per group of the output's low-rank projection.
        o_groups: groups of heads, each with an output projection of its own.
        rope_head_dim: last dimensions of a head that rotate with the position, in neighbouring
            pairs.
        num_experts: routed experts; one more is shared by all tokens.
        experts_per_token: routed experts of a token.
        routed_scaling_factor: factor on the routed experts' normalised weights.
        swiglu_limit: bound of the experts' gate and up projections before their product.
        hc_mult: residual streams.
        hc_sinkhorn_iters: Sinkhorn iterations that make a mix of streams doubly stochastic.
        hc_eps: added to the divisors of these iterations.
        carried_mix: whether a sublayer collapses the streams with the mix of the one before (V4.1).
    """

    q_lora_rank: int = 1024
    o_lora_rank: int = 1024
    o_groups: int = 8
    rope_head_dim: int = 64
    num_experts: int = 256
    experts_per_token: int = 6
    routed_scaling_factor: float = 1.5
    swiglu_limit: float = 10.0
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    carried_mix: bool = False

    def __post_init__(self) -> None:
        """Refuse parts that do not fit each other.

        Raises:
            CompatibilityError: naming the field and its value.
        """
        super().__post_init__()
        if self.num_kv_heads != 1 or len(self.sliding_layers) != self.num_layers:
            raise CompatibilityError(
                f"DeepSeek-V4's layers have 1 key head and a window in every layer, but "
                f"num_kv_heads is {self.num_kv_heads} and sliding_layers "
                f"{list(self.sliding_layers)}."
            )
        if not 1 <= self.experts_per_token <= self.num_experts:
            raise CompatibilityError(
                f"experts_per_token is {self.experts_per_token}, but there are {self.num_experts} "
                "experts."
            )
        if self.num_heads % self.o_groups:
            raise CompatibilityError(
                f"o_groups is {self.o_groups}, but must divide the {self.num_heads} heads."
            )
        if self.rope_head_dim % 2 or not 0 < self.rope_head_dim <= self.head_dim:
            raise CompatibilityError(
                f"rope_head_dim is {self.rope_head_dim}, but must be even and at most head_dim "
                f"({self.head_dim})."
            )

    @property
    def reach(self) -> int:
        """Context rows that a block sees."""
        assert self.sliding_window is not None, "every layer has a window"
        return self.sliding_window

    def rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine [.., rope_head_dim / 2] of positions [..], fp32."""
        pairs = torch.arange(0, self.rope_head_dim, 2, device=positions.device).float()
        angle = positions.unsqueeze(-1).float() / self.rope_theta ** (pairs / self.rope_head_dim)
        return angle.cos(), angle.sin()


def is_fp32(name: str) -> bool:
    """Whether the published files store a tensor of this name in fp32."""
    return any(part in name for part in _FP32)


def new_stages(config: DeepseekV4Layers) -> Iterator[nn.Module]:
    """Transformers' decoder layers."""
    stage_config = _stage_config(config)
    for number in range(config.num_layers):
        layer = _modules().DeepseekV4DecoderLayer(stage_config, number)
        _reset(layer)
        yield layer


def new_hyper_head(config: DeepseekV4Layers) -> nn.Module:
    """The head that collapses the streams after the last stage."""
    head: nn.Module = _modules().DeepseekV4HyperHead(_stage_config(config))
    _reset(head)
    return head


def rotated(rows_T1D: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rows [T, 1, D], their last dimensions rotated by their positions."""
    rows: Tensor = _modules().apply_rotary_pos_emb(rows_T1D, cosine, sine)
    return rows


def carried_stage(
    layer: Any, streams: Tensor, mix: Tensor | None, reads: Mapping[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """Run a V4.1 layer; streams [B, K, S, H] and the mix [B, K, S] for the next sublayer."""
    for connection, before, sublayer in (
        (layer.attn_hc, layer.input_layernorm, lambda x: layer.self_attn(x, **reads)[0]),
        (layer.ffn_hc, layer.post_attention_layernorm, layer.mlp),
    ):
        post, comb, _ = connection(streams)
        out = sublayer(before(collapsed(streams, mix)))
        mix = _mix(connection, streams)
        spread = post.to(streams.dtype).unsqueeze(-1) * out.unsqueeze(-2)
        streams = spread + comb.to(streams.dtype).mT @ streams
    return streams, mix


def collapsed(streams: Tensor, mix: Tensor | None) -> Tensor:
    """Streams [B, K, S, H] collapsed into one by a mix; stream 0 where there is none yet."""
    if mix is None:
        return streams[..., 0, :]
    return (mix.unsqueeze(-1) * streams).sum(-2).to(streams.dtype)


def _mix(connection: Any, streams: Tensor) -> Tensor:
    """A hyper-connection's weights of the streams, by which they are collapsed, fp32."""
    count = connection.hc_mult
    read = connection.input_norm(at_least_fp32(streams.flatten(-2)))
    weights = F.linear(read, at_least_fp32(connection.fn[:count]))
    mix: Tensor = torch.sigmoid(weights * connection.scale[0] + connection.base[:count])
    return mix + float(connection.hc_eps)


def _attend(
    module: Any,
    query_BAKD: Tensor,
    key_B1KD: Tensor,
    value_B1KD: Tensor,  # noqa: ARG001 - keys are values
    mask_B11P: Tensor,
    *,
    scaling: float,
    s_aux: Tensor,
    context: Sequence[Tensor],
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of a stage: context and block, in both directions, with a sink per head.

    The one key head is read once for all query heads.
    """
    rows_BPD = torch.cat((context[module.layer_idx], key_B1KD[:, 0]), 1)
    shape = query_BAKD.shape
    query_BND = query_BAKD.reshape(shape[0], -1, shape[-1])
    scores = at_least_fp32(query_BND @ rows_BPD.mT).view(*shape[:-1], -1) * scaling + mask_B11P
    sinks = s_aux.to(scores).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
    weights = torch.cat((scores, sinks), -1).softmax(-1)[..., :-1]
    mixed_BND = weights.to(rows_BPD).view(*query_BND.shape[:-1], -1) @ rows_BPD
    return mixed_BND.view(shape).transpose(1, 2), None


def _modules() -> Any:
    """Transformers' DeepSeek-V4 module, imported late since no other drafter needs it."""
    from transformers.models.deepseek_v4 import modeling_deepseek_v4

    return modeling_deepseek_v4


def _stage_config(config: DeepseekV4Layers) -> Any:
    from transformers import AttentionInterface
    from transformers.models.deepseek_v4 import DeepseekV4Config as Stages

    AttentionInterface.register(_ATTENTION, _attend)
    return Stages(
        **{name: getattr(config, name) for name in (*SAME_INTEGERS, *SAME_NUMBERS)},
        moe_intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        partial_rotary_factor=config.rope_head_dim / config.head_dim,
        rope_theta=config.rope_theta,
        layer_types=["sliding_attention"] * config.num_layers,
        mlp_layer_types=["moe"] * config.num_layers,
        n_routed_experts=config.num_experts,
        num_experts_per_tok=config.experts_per_token,
        attn_implementation=_ATTENTION,
        experts_implementation="eager",
    )


@torch.no_grad()
def _reset(module: nn.Module) -> None:
    """Fill the vectors that transformers initialises with the whole model only."""
    for name, parameter in module.named_parameters():
        if name.endswith("scale"):
            parameter.fill_(1.0)
        elif name.endswith(("base", "sinks")):
            parameter.zero_()
