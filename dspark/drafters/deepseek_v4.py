"""DeepSeek-V4's draft module: stages of DeepSeek-V4 layers over projected features.

A stage is transformers' decoder layer as it is: hyper-connections, multi-query attention with sinks
and a low-rank output, routed experts. Only what its attention reads is given to it: the rows that
the stage's own `kv_proj` makes of the projected features of the last `sliding_window` context
tokens, which are keys and values in one, and the whole block. The output head reads the collapsed
streams after the final norm, the confidence head before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dspark.attention.blocks import BlockContext
from dspark.attention.packed import BlockLayout
from dspark.attention.paged_cache import CacheShape, PagedCache
from dspark.attention.ragged_batch import RaggedBatch
from dspark.drafters.backbone import BlockForward, ParallelBackbone
from dspark.drafters.base import DraftBatch, DrafterKind
from dspark.drafters.config import DSparkConfig
from dspark.drafters.deepseek_v4_layers import (
    DeepseekV4Layers,
    carried_stage,
    collapsed,
    is_fp32,
    new_hyper_head,
    new_stages,
    rotated,
)
from dspark.drafters.dspark import MASK_EMBEDDING, DecodePlan, DSparkDrafter
from dspark.drafters.layers import Pack, norm
from dspark.errors import CheckpointError

STAGES = "n_mtp_layers"
"""Optional field of a config.json: the number of stages."""


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
        self.hc_head = None if config.carried_mix else new_hyper_head(config)

    def new_layers(self) -> Iterable[nn.Module]:
        """Transformers' decoder layers."""
        return new_stages(self.backbone_config)

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
        cosine_sine = config.rotation(positions_T)
        found = []
        for layer in self.layers:
            attention: Any = layer.self_attn
            row_TD = attention.kv_norm(attention.kv_proj(main_TH))
            found.append(rotated(row_TD.unsqueeze(1), *cosine_sine))
        return found

    def run_stages(self, x_BKH: Tensor, seen: _Seen) -> Tensor:
        """States [B, K, H] of blocks before the final norm, from their input embeddings."""
        config = self.backbone_config
        streams = x_BKH.unsqueeze(2).expand(-1, -1, config.hc_mult, -1).contiguous()
        reads = {
            "position_embeddings": {"main": config.rotation(seen.positions_BK)},
            "position_ids": seen.positions_BK,
            "attention_mask": seen.mask_B11P,
            "context": seen.rows,
        }
        if self.hc_head is not None:
            for layer in self.layers:
                streams = layer(streams, **reads)
            states_BKH: Tensor = self.hc_head(streams)
            return states_BKH
        mix: Tensor | None = None
        for layer in self.layers:
            streams, mix = carried_stage(layer, streams, mix, reads)
        return collapsed(streams, mix)

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
        # Shorter contexts are padded with their first row, which the mask hides.
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
