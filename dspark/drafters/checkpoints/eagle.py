"""The layout of the EAGLE authors' checkpoints, and of those who followed them; read only.

A flat configuration of a Llama layer, captured layers counted from 1, and mostly a reduced
vocabulary. Tensors of the layer are called `midlayer`
(`eagle3.KIND` renames them).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dspark.drafters.checkpoints.fields import Reader
from dspark.drafters.checkpoints.published import LLAMA_EAGLE3, RESIDUAL, eagle3_from_json
from dspark.drafters.eagle3 import Eagle3Config
from dspark.drafters.plugins import Layout
from dspark.errors import CheckpointError, CompatibilityError

AUX_LAYERS = "eagle_aux_hidden_state_layer_ids"
# Variants of the layer that are not built here: all must be false.
FLAGS = ("norm_before_fc", "fc_norm", "norm_output")
_LENGTH = 7


def llama_eagle3_from_json(data: Mapping[str, Any], where: str) -> Eagle3Config:
    """Read a flat configuration of a Llama layer, as `eagle3_from_json` does.

    Captured layers stand in `target_layer_ids`, or, counted from 1, in
    `eagle_aux_hidden_state_layer_ids`, at the top or in `eagle_config`. What such files leave out:
    the target's layers, taken as the fewest that these allow, and the drafts of a round, taken as
    7.

    Raises:
        CheckpointError: also where it names no captured layers.
    """
    nested = data.get("eagle_config")
    own = {**(nested if isinstance(nested, Mapping) else {}), **data}
    read = Reader(own, where)
    for flag in FLAGS:
        read.only(flag, False)
    read.only("model_type", "llama")
    if data.get("sliding_window") is not None and data.get("use_sliding_window", True):
        raise CompatibilityError(
            f"{where} has sliding_window {data['sliding_window']!r}, which is not supported for "
            "Eagle3 yet; use a drafter with full attention."
        )
    if data.get("target_layer_ids") is None and own.get(AUX_LAYERS) is None:
        raise CheckpointError(
            f"{where} does not say which layers the drafter reads; add target_layer_ids, which for "
            "a target of n layers usually are [1, n/2 - 1, n - 4]."
        )
    flat = llama_shapes(data)
    for name in ("eagle_config", AUX_LAYERS):
        flat.pop(name, None)
    if own.get(RESIDUAL) is not None:
        flat[RESIDUAL] = own[RESIDUAL]
    if "target_layer_ids" not in flat:
        flat["target_layer_ids"] = [i - 1 for i in read.integers(AUX_LAYERS)]
    taps = Reader(flat, where).integers("target_layer_ids")
    least = {"num_target_layers": max([0, *taps]) + 1, "ttt_length": _LENGTH}
    return eagle3_from_json(least | flat, where)


def llama_shapes(data: Mapping[str, Any]) -> dict[str, Any]:
    """A Llama configuration with what it may leave out: it follows from its other shapes."""
    width, heads = data.get("hidden_size"), data.get("num_attention_heads")
    flat = {key: value for key, value in data.items() if value is not None}
    if type(width) is int and type(heads) is int and heads > 0:
        flat = {"head_dim": width // heads, "num_key_value_heads": heads} | flat
    return {"model_type": "llama"} | flat


LAYOUT = Layout(readers={LLAMA_EAGLE3: llama_eagle3_from_json})
