"""Tiny random drafters, bound to the target that they are made for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dspark.drafters.config import BackboneConfig, DSparkConfig
from dspark.drafters.dspark import DSparkDrafter
from dspark.drafters.eagle3 import Eagle3Config, Eagle3Drafter
from dspark.targets.target import Target


def tiny_backbone(width: int, num_taps: int, **changes: Any) -> BackboneConfig:
    """One layer."""
    fields: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": 24,
        "num_layers": 1,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "num_taps": num_taps,
    }
    return BackboneConfig(**(fields | changes))


def tiny_dspark(
    target: Target,
    *,
    taps: tuple[int, ...],
    kind: type[DSparkDrafter] = DSparkDrafter,
    seed: int = 1,
    std: float = 0.02,
    known: Sequence[int] | None = None,
    backbone: BackboneConfig | None = None,
    **changes: Any,
) -> DSparkDrafter:
    """A DSpark drafter of 4 drafts.

    Args:
        target: whom it is bound to.
        taps: the layers that it reads.
        kind: its class.
        seed: of its weights.
        std: of its weights.
        known: the tokens of a reduced vocabulary.
        backbone: in place of the tiny one.
        **changes: of its configuration.
    """
    fields: dict[str, Any] = {
        "vocab_size": target.vocab_size,
        "block_size": 4,
        "mask_token_id": 3,
        "target_layer_ids": taps,
        "num_target_layers": target.num_layers,
        "markov_rank": 4,
        "draft_vocab_size": None if known is None else len(known),
    }
    config = DSparkConfig(
        backbone or tiny_backbone(target.hidden_size, len(taps)), **(fields | changes)
    )
    return kind.from_target(
        target.parts(),
        config,
        generator=torch.Generator().manual_seed(seed),
        init_std=std,
        draft_tokens=None if known is None else torch.tensor(known),
    ).eval()


def tiny_eagle3(
    target: Target,
    *,
    taps: tuple[int, ...],
    kind: type[Eagle3Drafter] = Eagle3Drafter,
    seed: int = 1,
    std: float = 0.02,
    known: Sequence[int] | None = None,
    backbone: BackboneConfig | None = None,
    **changes: Any,
) -> Eagle3Drafter:
    """An Eagle3 drafter of 4 drafts; MTP-1 with one tap and a `ttt_length` of 1."""
    fields: dict[str, Any] = {
        "vocab_size": target.vocab_size,
        "target_layer_ids": taps,
        "num_target_layers": target.num_layers,
        "ttt_length": 4,
        "draft_vocab_size": None if known is None else len(known),
    }
    config = Eagle3Config(
        backbone or tiny_backbone(target.hidden_size, len(taps)), **(fields | changes)
    )
    return kind.from_target(
        target.parts(),
        config,
        generator=torch.Generator().manual_seed(seed),
        init_std=std,
        draft_tokens=None if known is None else torch.tensor(known),
    ).eval()
