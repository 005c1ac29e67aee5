"""What decoding computes once: fused weights, heads in the right dtype, tables."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from dspark.drafters.backbone import BackboneWeights, ParallelBackbone
from dspark.drafters.borrowed import Borrowed
from dspark.drafters.config import BackboneConfig
from dspark.drafters.heads import ConfidenceHead, MarkovHead
from dspark.drafters.layers import Pack, packed, rotary

ModuleT = TypeVar("ModuleT", bound=nn.Module)

_FEWEST_POSITIONS = 1024


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


@dataclass(frozen=True)
class DecodePlan:
    """A drafter made ready for decoding.

    Attributes:
        weights: the backbone's, those with a common input fused; copies, packed where the
            target's are.
        borrowed: embedding and head; a head of the drafter's own is packed likewise.
        markov_head: the drafter's own module, or a copy: in another dtype, on another device, or
            with its second table packed.
        confidence_head: likewise.
        rotary: `rotary` by position.
        mask_1KH: input embeddings of the slots after the anchor, [1, block_size - 1, H].
        slots_K: 0 .. block_size - 1.
    """

    weights: BackboneWeights
    borrowed: Borrowed
    markov_head: MarkovHead | None
    confidence_head: ConfidenceHead | None
    rotary: RotaryTable
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
        borrowed: Borrowed,
    ) -> DecodePlan:
        """Make the plan.

        Args:
            backbone: whose weights are fused.
            markov_head: the drafter's head, if any.
            confidence_head: likewise.
            masks: input embeddings [block_size - 1, H] of the slots after the anchor.
            borrowed: its embedding gives dtype and device of everything, and its `pack` lays
                weights out as the target's are.
        """
        like, pack = borrowed.embedding_VH, borrowed.pack
        weights = BackboneWeights.of(_backbone_like(backbone, like))
        markov_head = _like(markov_head, like)
        if pack is not None:
            weights = weights.packed(pack)
            markov_head = None if markov_head is None else _with_packed_bias(markov_head, pack)
        return cls(
            weights=weights,
            borrowed=borrowed.packed(),
            markov_head=markov_head,
            confidence_head=_like(confidence_head, like),
            rotary=RotaryTable(backbone.backbone_config, like),
            mask_1KH=masks.to(like).unsqueeze(0),
            slots_K=torch.arange(masks.shape[0] + 1, device=like.device),
        )


def _with_packed_bias(head: MarkovHead, pack: Pack) -> MarkovHead:
    """The same head, whose product with its second table is packed; it shares all parameters."""
    head = copy.copy(head)
    # In the place of the method: a module's own attributes come first.
    vars(head)["bias"] = packed(pack, head.markov_w2.weight)
    return head


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
