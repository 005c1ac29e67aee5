"""The layout of the DFlash authors' checkpoints, which are read and never written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dspark.drafters.checkpoints.fields import FULL, Reader
from dspark.drafters.checkpoints.published import dspark_from_json
from dspark.drafters.config import DSparkConfig
from dspark.drafters.plugins import Layout
from dspark.errors import CheckpointError, CompatibilityError


def dflash_from_json(data: Mapping[str, Any], where: str) -> DSparkConfig:
    """Read the configuration: no heads, and a block of 1 + n slots.

    Their `dflash_config` holds `target_layer_ids`, `mask_token_id` and, in some files,
    `block_size`.

    Raises:
        CheckpointError, CompatibilityError: as `dspark_from_json`.
    """
    own = data.get("dflash_config")
    if not isinstance(own, Mapping):
        raise CheckpointError(f"{where} has dflash_config {own!r}, but it must be an object.")
    read = Reader(own, f"dflash_config of {where}")
    read.only("projector_type", "dflash")
    read.only("attention_mode", "gqa")
    read.only("causal", False)
    if any(kind != FULL for kind in data.get("layer_types") or ()):
        raise CompatibilityError(
            f"{where} has layer_types {data['layer_types']!r}, but of this dialect only {FULL} is "
            "supported: its windows move with each slot."
        )
    lifted = {
        "sample_from_anchor": False,
        "markov_rank": 0,
        "enable_confidence_head": False,
        **{key: value for key, value in own.items() if value is not None},
    }
    rest = {key: value for key, value in data.items() if key not in ("dflash_config", "auto_map")}
    for name in ("projector_type", "attention_mode", "causal"):
        lifted.pop(name, None)
    return dspark_from_json(rest | lifted, where)


LAYOUT = Layout(readers={"DFlashDraftModel": dflash_from_json})
