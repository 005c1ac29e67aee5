"""DeepSeek-V4's draft module: stages of DeepSeek-V4 layers over projected features.

A stage is transformers' decoder layer as it is: hyper-connections, multi-query attention with sinks
and a low-rank output, routed experts. Only what its attention reads is given to it: the rows that
the stage's own `kv_proj` makes of the projected features of the last `sliding_window` context
tokens, which are keys and values in one, and the whole block. The streams are collapsed by a head
of their own; the output head reads the result after the final norm, the confidence head before it.

DeepSeek-V4.1 has no such head: each sublayer collapses the streams with the mix that the sublayer
before it computed, the first takes stream 0, and what is left over collapses the last ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspark.attention.blocks import BlockContext
from dspark.attention.packed import BlockLayout
from dspark.attention.paged_cache import CacheShape, PagedCache
from dspark.attention.ragged_batch import RaggedBatch
from dspark.drafters.backbone import BlockForward, ParallelBackbone
from dspark.drafters.base import DraftBatch, DrafterKind
from dspark.drafters.config import BackboneConfig, DSparkConfig
from dspark.drafters.dspark import MASK_EMBEDDING, DecodePlan, DSparkDrafter
from dspark.drafters.heads import at_least_fp32
from dspark.drafters.layers import Pack, norm
from dspark.errors import CheckpointError, CompatibilityError

STAGES = "n_mtp_layers"
"""The field of a config.json that counts the stages, where it is there."""
_ATTENTION = "dspark_draft_block"
# Stored and computed in fp32, as in the published files.
_FP32 = ("_hc.", "hc_head.", "sinks", "e_score_correction_bias")


@dataclass(frozen=True)
class DeepseekV4Layers(BackboneConfig):
    """A backbone of DeepSeek-V4 layers; the defaults are V4-Flash's.

    Attributes:
        q_lora_rank: width of the query's low-rank projection.
        o_lora_rank: width per group of the output's.
        o_groups: groups of heads that are projected each by itself.
        rope_head_dim: last dimensions of a head that turn with the position, in neighbouring pairs.
        num_experts: routed experts; one more is shared by all tokens.
        experts_per_token: routed experts of a token.
        routed_scaling_factor: factor on the routed experts' normalised weights.
        swiglu_limit: bound of what the experts' gates and products read.
        hc_mult: streams of the residual.
        hc_sinkhorn_iters: rounds in which a mix of streams is made doubly stochastic.
        hc_eps: added to what they divide by.
        carried_mix: whether a sublayer collapses with the mix of the one before (V4.1).
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

    def turn(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine [.., rope_head_dim / 2] of positions [..], fp32."""
        pairs = torch.arange(0, self.rope_head_dim, 2, device=positions.device).float()
        angle = positions.unsqueeze(-1).float() / self.rope_theta ** (pairs / self.rope_head_dim)
        return angle.cos(), angle.sin()


@dataclass(frozen=True)
class DeepseekV4Config(DSparkConfig):
    """What such a drafter is: a `DSparkConfig` with these layers."""

    backbone: DeepseekV4Layers


@dataclass(frozen=True)
class _Seen:
    """What the blocks of a pass attend to.

    Attributes:
        rows: per stage the context rows [B, W, D] of each block, padded.
        mask_B11P: 0, or minus infinity where a column (W + K) is padding.
        positions_BK: of the blocks' own rows.
    """

    rows: Sequence[Tensor]
    mask_B11P: Tensor
    positions_BK: Tensor

    @classmethod
    def of(cls, rows: Sequence[Tensor], sizes_B: Tensor, positions_BK: Tensor) -> _Seen:
        width, slots = rows[0].shape[1], positions_BK.shape[1]
        columns_P = torch.arange(width + slots, device=sizes_B.device)
        hidden_BP = (columns_P >= sizes_B.unsqueeze(1)) & (columns_P < width)
        mask_BP = torch.zeros(hidden_BP.shape, device=sizes_B.device)
        return cls(rows, mask_BP.masked_fill_(hidden_BP, -torch.inf)[:, None, None], positions_BK)


class DeepseekV4Backbone(ParallelBackbone):
    """The parameters of the stages, under transformers' names, and their forward."""

    backbone_config: DeepseekV4Layers

    def __init__(self, config: DeepseekV4Layers) -> None:
        super().__init__(config)
        self.hc_head: nn.Module | None = None
        if not config.carried_mix:
            self.hc_head = _modules().DeepseekV4HyperHead(_stage_config(config))
            _reset(self.hc_head)

    def new_layers(self) -> Iterable[nn.Module]:
        """Transformers' decoder layers."""
        config = _stage_config(self.backbone_config)
        for number in range(self.backbone_config.num_layers):
            layer = _modules().DeepseekV4DecoderLayer(config, number)
            _reset(layer)
            yield layer

    def decoding(self, like: Tensor, pack: Pack | None) -> BlockForward:  # noqa: ARG002
        """A copy in the dtype and on the device of `like`; its weights are not packed."""
        with torch.device("meta"):
            backbone = DeepseekV4Backbone(self.backbone_config)
        state = self.state_dict()
        rows = {
            name: state[name].to(like.device, torch.float32 if is_fp32(name) else like.dtype)
            for name in backbone.state_dict()
        }
        backbone.load_state_dict(rows, assign=True)
        return _Decoding(backbone.eval())

    def context_rows(self, features_TF: Tensor, positions_T: Tensor) -> list[Tensor]:
        """Per stage the rows [T, 1, D] that the features give, keys and values in one."""
        config = self.backbone_config
        main_TH = norm(self.fc(features_TF), self.hidden_norm.weight, config)
        cosine_sine = config.turn(positions_T)
        found = []
        for layer in self.layers:
            attention: Any = layer.self_attn
            row_TD = attention.kv_norm(attention.kv_proj(main_TH))
            found.append(_modules().apply_rotary_pos_emb(row_TD.unsqueeze(1), *cosine_sine))
        return found

    def run_stages(self, x_BKH: Tensor, seen: _Seen) -> Tensor:
        """States [B, K, H] of blocks before the final norm, from their input embeddings."""
        config = self.backbone_config
        streams = x_BKH.unsqueeze(2).expand(-1, -1, config.hc_mult, -1).contiguous()
        reads = {
            "position_embeddings": {"main": config.turn(seen.positions_BK)},
            "position_ids": seen.positions_BK,
            "attention_mask": seen.mask_B11P,
            "context": seen.rows,
        }
        if self.hc_head is not None:
            for layer in self.layers:
                streams = layer(streams, **reads)
            collapsed: Tensor = self.hc_head(streams)
            return collapsed
        mix: Tensor | None = None
        for layer in self.layers:
            streams, mix = _carried(layer, streams, mix, reads)
        return _collapsed(streams, mix)

    def run_blocks(
        self,
        features_TF: Tensor,
        context_positions_T: Tensor,
        block_QH: Tensor,
        positions_Q: Tensor,
        layout: BlockLayout,
    ) -> Tensor:
        """The training pass; see `ParallelBackbone.run_blocks`. States before the final norm."""
        if not block_QH.shape[0]:
            # Nothing to draft, yet every parameter gets a gradient, as it does on other ranks.
            return block_QH + 0 * sum(p.sum() for p in self.parameters())
        device, window = block_QH.device, self.backbone_config.reach
        low_M = layout.lowest_M(window)
        sizes_M = layout.reach_M - low_M
        widest = int(sizes_M.max())
        rows_MW = (low_M.unsqueeze(1) + torch.arange(widest)).clamp(max=len(features_TF) - 1)
        rows_MW = rows_MW.to(device)
        context = self.context_rows(features_TF, context_positions_T)
        shape = (len(low_M), layout.slots)
        seen = _Seen.of(
            [row_T1D[:, 0][rows_MW] for row_T1D in context],
            sizes_M.to(device),
            positions_Q.view(shape),
        )
        return self.run_stages(block_QH.view(*shape, -1), seen).flatten(0, 1)


@dataclass(frozen=True)
class _Decoding:
    """A backbone in evaluation mode, in the target's dtype and on its device."""

    backbone: DeepseekV4Backbone

    def observe(self, context: PagedCache, batch: RaggedBatch, features_TF: Tensor) -> None:
        rows = self.backbone.context_rows(features_TF, batch.positions_T)
        for layer, row_T1D in enumerate(rows):
            context.write(layer, batch.rows_T, row_T1D, row_T1D[..., :0])

    def hidden(self, context: PagedCache, blocks: BlockContext, x_RKH: Tensor) -> Tensor:
        device, config = x_RKH.device, self.backbone.backbone_config
        spans = list(zip(blocks.tables, blocks.begins(config.reach), blocks.lengths, strict=True))
        widest = max(end - begin for _, begin, end in spans)
        # Behind a request's context its first row stands in, hidden by the mask.
        rows = [
            [*table.rows(begin, end), *[*table.rows(0, 1)] * (widest - end + begin)]
            for table, begin, end in spans
        ]
        rows_RW = torch.tensor(rows, dtype=torch.long, device=device)
        seen = _Seen.of(
            [context.gather(layer, rows_RW)[0][:, 0] for layer in range(config.num_layers)],
            torch.tensor([end - begin for _, begin, end in spans], device=device),
            blocks.positions_RK(x_RKH.shape[1], device),
        )
        return self.backbone.run_stages(x_RKH, seen)


class DeepseekV4Drafter(DSparkDrafter, DeepseekV4Backbone):
    """A DSpark drafter of DeepSeek-V4 stages; a block always runs whole, as it was trained."""

    confidence_bias = False
    config: DeepseekV4Config

    @property
    def context_shapes(self) -> tuple[CacheShape, ...]:
        """One row per stage: keys and values are the same."""
        backbone = self.backbone_config
        return (CacheShape(1, backbone.head_dim, 0),) * backbone.num_layers

    def head_states(self, hidden: Tensor) -> Tensor:
        """Hidden states [.., H] after the final norm."""
        return norm(hidden, self.norm.weight.to(hidden), self.backbone_config)

    def keeps_fp32(self, name: str) -> bool:
        """Whether a tensor stays in fp32 whatever the dtype of the others."""
        return is_fp32(name)

    def _block_hidden(self, plan: DecodePlan, context: PagedCache, batch: DraftBatch) -> Tensor:
        return super()._block_hidden(plan, context, replace(batch, depth=None))


def is_fp32(name: str) -> bool:
    """Whether the published files store a tensor of this name in fp32."""
    return any(part in name for part in _FP32)


def _carried(
    layer: Any, streams: Tensor, mix: Tensor | None, reads: Mapping[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """A V4.1 layer: streams [B, K, S, H] and the mix [B, K, S] that the next sublayer uses."""
    for connection, before, sublayer in (
        (layer.attn_hc, layer.input_layernorm, lambda x: layer.self_attn(x, **reads)[0]),
        (layer.ffn_hc, layer.post_attention_layernorm, layer.mlp),
    ):
        post, comb, _ = connection(streams)
        out = sublayer(before(_collapsed(streams, mix)))
        mix = _mix(connection, streams)
        spread = post.to(streams.dtype).unsqueeze(-1) * out.unsqueeze(-2)
        streams = spread + comb.to(streams.dtype).mT @ streams
    return streams, mix


def _mix(connection: Any, streams: Tensor) -> Tensor:
    """How a hyper-connection weighs the streams before it collapses them, fp32."""
    count = connection.hc_mult
    read = connection.input_norm(at_least_fp32(streams.flatten(-2)))
    weights = F.linear(read, at_least_fp32(connection.fn[:count]))
    mix: Tensor = torch.sigmoid(weights * connection.scale[0] + connection.base[:count])
    return mix + float(connection.hc_eps)


def _collapsed(streams: Tensor, mix: Tensor | None) -> Tensor:
    """Streams [B, K, S, H] as one; stream 0 before there is a mix."""
    if mix is None:
        return streams[..., 0, :]
    return (mix.unsqueeze(-1) * streams).sum(-2).to(streams.dtype)


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
    """Transformers' DeepSeek-V4; here, since no other drafter needs it."""
    from transformers.models.deepseek_v4 import modeling_deepseek_v4

    return modeling_deepseek_v4


def _stage_config(config: DeepseekV4Layers) -> Any:
    from transformers import AttentionInterface
    from transformers.models.deepseek_v4 import DeepseekV4Config as Stages

    AttentionInterface.register(_ATTENTION, _attend)
    return Stages(
        hidden_size=config.hidden_size,
        moe_intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        head_dim=config.head_dim,
        q_lora_rank=config.q_lora_rank,
        o_lora_rank=config.o_lora_rank,
        o_groups=config.o_groups,
        partial_rotary_factor=config.rope_head_dim / config.head_dim,
        rope_theta=config.rope_theta,
        layer_types=["sliding_attention"] * config.num_layers,
        mlp_layer_types=["moe"] * config.num_layers,
        sliding_window=config.reach,
        n_routed_experts=config.num_experts,
        num_experts_per_tok=config.experts_per_token,
        routed_scaling_factor=config.routed_scaling_factor,
        swiglu_limit=config.swiglu_limit,
        hc_mult=config.hc_mult,
        hc_sinkhorn_iters=config.hc_sinkhorn_iters,
        hc_eps=config.hc_eps,
        rms_norm_eps=config.rms_norm_eps,
        attn_implementation=_ATTENTION,
        experts_implementation="eager",
    )


@torch.no_grad()
def _reset(module: nn.Module) -> None:
    """Fill the vectors that transformers leaves to a model's initialisation."""
    for name, parameter in module.named_parameters():
        if name.endswith("scale"):
            parameter.fill_(1.0)
        elif name.endswith(("base", "sinks")):
            parameter.zero_()


def _build(config: DeepseekV4Config, names: Set[str], where: str) -> DeepseekV4Drafter:
    if config.mask_token_id is None and MASK_EMBEDDING not in names:
        raise CheckpointError(f"{where} has no dspark_noise_token_id, which fills a block.")
    stages = {int(name.split(".")[1]) for name in names if name.startswith("layers.")}
    if stages and STAGES not in config.extra:
        count = max(stages) + 1
        layers = replace(config.backbone, num_layers=count, sliding_layers=tuple(range(count)))
        config = replace(config, backbone=layers)
    return DeepseekV4Drafter(config)


KIND = DrafterKind(drafter=DeepseekV4Drafter, config=DeepseekV4Config, build=_build)
