"""What decoding computes once: fused weights, heads in the right dtype, tables."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from dspark.drafters.backbone import BackboneWeights, ParallelBackbone
from dspark.drafters.heads import ConfidenceHead, MarkovHead
from dspark.drafters.layers import rotary

ModuleT = TypeVar("ModuleT", bound=nn.Module)


@dataclass(frozen=True)
class DecodePlan:
    """A drafter made ready for decoding.

    Attributes:
        weights: the backbone's, those with a common input fused; copies.
        markov_head: the drafter's own module, or a copy in another dtype or on another device.
        confidence_head: likewise.
        rotary_table: rows of `rotary` by position, [positions, 2, 1, D].
        mask_1KH: input embeddings of the slots after the anchor, [1, block_size - 1, H].
        slots_K: 0 .. block_size - 1.
    """

    weights: BackboneWeights
    markov_head: MarkovHead | None
    confidence_head: ConfidenceHead | None
    rotary_table: Tensor
    mask_1KH: Tensor
    slots_K: Tensor

    @classmethod
    def build(
        cls,
        backbone: ParallelBackbone,
        markov_head: MarkovHead | None,
        confidence_head: ConfidenceHead | None,
        *,
        masks: Tensor,
        positions: int,
        like: Tensor,
    ) -> DecodePlan:
        """Make the plan.

        Args:
            backbone: whose weights are fused.
            markov_head: the drafter's head, if any.
            confidence_head: likewise.
            masks: input embeddings [block_size - 1, H] of the slots after the anchor.
            positions: rows of the rotary table.
            like: gives dtype and device of everything.
        """
        numbers = torch.arange(positions, device=like.device)
        return cls(
            weights=BackboneWeights.of(_backbone_like(backbone, like)),
            markov_head=_like(markov_head, like),
            confidence_head=_like(confidence_head, like),
            rotary_table=rotary(numbers, backbone.backbone_config, like.dtype),
            mask_1KH=masks.to(like).unsqueeze(0),
            slots_K=numbers[: masks.shape[0] + 1],
        )


def _like(module: ModuleT | None, like: Tensor) -> ModuleT | None:
    """The module itself where it has the dtype and device of `like`, else a copy that has."""
    if module is None or all(
        p.dtype == like.dtype and p.device == like.device for p in module.parameters()
    ):
        return module
    return copy.deepcopy(module).to(device=like.device, dtype=like.dtype)


def _backbone_like(source: ParallelBackbone, like: Tensor) -> ParallelBackbone:
    """The backbone alone (a drafter has more), in the dtype and on the device of `like`."""
    with torch.device("meta"):
        backbone = ParallelBackbone(source.backbone_config)
    state = source.state_dict()
    rows = {name: state[name].to(like) for name in backbone.state_dict()}
    backbone.load_state_dict(rows, assign=True)
    return backbone
