"""DSpark files in the wild that nest the drafter's own fields, and what of them is not built here.

Liquid's, NVIDIA's and some community files keep them in `dflash_config` or `dspark_config` of a
published configuration. Such fields are lifted; parts that change the computation and are not
built here (attention sinks, causal blocks, interleaved rotary pairs) are refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dspark.errors import CheckpointError, CompatibilityError

_NESTS = ("dflash_config", "dspark_config")
# Parts that act, with the values that act as if they were not there, and what they are.
_BEYOND: Mapping[str, tuple[tuple[object, ...], str]] = {
    "attention_sink_bias": ((False,), "attention sinks"),
    "add_swa_attention_sink_bias": ((False,), "attention sinks"),
    "rope_is_neox_style": ((True,), "rotary pairs that lie side by side"),
    "causal": ((False,), "slots that see no later slot of their block"),
    "dflash_query_causal": ((False,), "slots that see no later slot of their block"),
    "use_swa": ((False,), "windows named by use_swa in place of layer_types"),
    "projector_type": (("dflash", "dspark"), "another projector"),
    "attention_mode": (("gqa",), "another attention than grouped queries"),
    "attention_value_scale": ((1.0,), "scaled values"),
    "conv_kernel_size": ((0,), "convolutions"),
    "selector_rank": ((0,), "a path selector"),
}
# Architectures of drafters that are known and not built, and why.
ELSEWHERE: Mapping[str, str] = {
    "DFlash2DraftModel": "it has a path selector and convolutions over the slots",
    "speculators dflash2": "it has a path selector and convolutions over the slots",
    "speculators xpress": "its slots are refined by several passes",
    "K3DSparkModel": "its layers have multi-head latent attention (MLA)",
    "Qwen3OmniDSparkModel": "its target reads images and sound",
}


def lifted(data: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """A configuration with nested fields at its top; itself where nothing is nested.

    Without `num_target_layers` the target is taken to have the fewest layers that the captured
    ones allow.

    Raises:
        CheckpointError: what should hold the fields is no object.
        CompatibilityError: a part that is not built here.
    """
    nests = [name for name in _NESTS if data.get(name) is not None]
    own: dict[str, Any] = {}
    for name in nests:
        if not isinstance(data[name], Mapping):
            raise CheckpointError(f"{where} has {name} {data[name]!r}, but it must be an object.")
        own |= {key: value for key, value in data[name].items() if value is not None}
    flat = {key: value for key, value in data.items() if key not in nests} | own
    for name, (allowed, what) in _BEYOND.items():
        if flat.get(name) is not None and flat[name] not in allowed:
            raise CompatibilityError(
                f"{where} has {name} {flat[name]!r} ({what}), which is not supported yet."
            )
    if not nests:
        return data
    taps = flat.get("target_layer_ids")
    if isinstance(taps, list) and taps and all(type(tap) is int for tap in taps):
        flat.setdefault("num_target_layers", max(*taps, 0) + 1)
    return {key: value for key, value in flat.items() if key not in _BEYOND}
