"""Reads fields of a config.json, and converts those of draft layers from and to `BackboneConfig`.

A drafter's config.json is that of its target's family with the drafter's own values: Qwen3's or
Gemma4's, whose drafters use its global attention layers only (docs/method.md, 2.1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from dspark.drafters.config import GEMMA4_PARTS, BackboneConfig
from dspark.drafters.deepseek_v4_layers import DeepseekV4Layers
from dspark.errors import CheckpointError, CompatibilityError

FULL, SLIDING = "full_attention", "sliding_attention"
_GEMMA4_ACTIVATION = "gelu_pytorch_tanh"

# The fields that act in layers of either family, and in one of them only.
_COMMON = frozenset({
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "rms_norm_eps", "attention_bias", "layer_types", "sliding_window_non_causal",
})  # fmt: skip
QWEN3_FIELDS = _COMMON | {
    "model_type", "num_key_value_heads", "head_dim", "hidden_act", "rope_parameters",
    "rope_theta", "rope_scaling",
}  # fmt: skip
GEMMA4_FIELDS = _COMMON | {
    "num_global_key_value_heads", "global_head_dim", "attention_k_eq_v", "hidden_activation",
    "enable_moe_block", "hidden_size_per_layer_input",
}  # fmt: skip


class Reader:
    """Fields of a configuration by type, with errors that name them.

    Args:
        data: a parsed config.json.
        where: what to call it in errors.
    """

    def __init__(self, data: Mapping[str, Any], where: str) -> None:
        self.data = data
        self.where = where

    def integer(self, name: str, *, minimum: int = 1, default: int | None = None) -> int:
        """An integer of at least `minimum`."""
        value = self.data.get(name, default)
        if type(value) is not int or value < minimum:
            raise self._error(name, value, f"an integer of at least {minimum}")
        return value

    def number(self, name: str) -> float:
        """A positive number."""
        value = self.data.get(name)
        if not is_positive(value):
            raise self._error(name, value, "a positive number")
        return float(value)

    def boolean(self, name: str, *, default: bool | None = None) -> bool:
        """True or false."""
        value = self.data.get(name, default)
        if not isinstance(value, bool):
            raise self._error(name, value, "true or false")
        return value

    def integers(self, name: str) -> list[int]:
        """A list of integers."""
        value = self.data.get(name)
        if not isinstance(value, list) or not all(type(i) is int for i in value):
            raise self._error(name, value, "a list of integers")
        return value

    def only(self, name: str, supported: object) -> None:
        """Refuse a field that is there and has another value than the one that is supported.

        Raises:
            CompatibilityError: naming it.
        """
        value = self.data.get(name, supported)
        if value != supported or type(value) is not type(supported):
            raise CompatibilityError(
                f"{self.where} has {name} {value!r}, but only {supported} is supported yet."
            )

    def _error(self, name: str, value: object, needed: str) -> CheckpointError:
        if value is None:
            return CheckpointError(f"{self.where} lacks {name}, which must be {needed}.")
        return CheckpointError(f"{self.where} has {name} {value!r}, but it must be {needed}.")


def is_positive(value: object) -> TypeGuard[float]:
    """Whether a JSON value is a finite number above 0."""
    return type(value) in (int, float) and 0 < value < math.inf  # type: ignore[operator]


def present(parts: Mapping[str, bool]) -> list[str]:
    """The names of the parts that are there."""
    return [name for name, there in parts.items() if there]


def refuse_parts(found: Sequence[str], why: str) -> None:
    """Refuse a drafter with parts that a layout or an engine has no place for.

    Args:
        found: what it has.
        why: ends the sentence, with the remedy.

    Raises:
        CompatibilityError: there are any.
    """
    if found:
        raise CompatibilityError(f"The drafter has {' and '.join(found)}, {why}")


def qwen3_layers_from_json(
    data: Mapping[str, Any], where: str, num_taps: int, *, query_key_norms: bool = True
) -> BackboneConfig:
    """The layers of a Qwen3 configuration.

    Args:
        data: the parsed config.json.
        where: what to call it in errors.
        num_taps: captured target layers.
        query_key_norms: false for Llama's layers, whose fields are the same.

    Raises:
        CheckpointError: a field is missing or has a value of the wrong kind.
        CompatibilityError: an option that is not supported.
    """
    read = Reader(data, where)
    read.only("hidden_act", "silu")
    rope = data.get("rope_parameters") or data.get("rope_scaling") or {}
    theta, fraction = _rope(rope, data.get("rope_theta"), where)
    if fraction != 1.0:
        raise CompatibilityError(
            f"{where} has partial_rotary_factor {fraction}, but Qwen3 layers support only 1."
        )
    sliding = _sliding_layers(read)
    return BackboneConfig(
        **_common_shapes(read),
        num_kv_heads=read.integer("num_key_value_heads"),
        head_dim=read.integer("head_dim"),
        num_taps=num_taps,
        rope_theta=theta,
        query_key_norms=query_key_norms,
        sliding_layers=sliding,
        sliding_window=read.integer("sliding_window") if sliding else None,
        causal_windows=bool(sliding)
        and not read.boolean("sliding_window_non_causal", default=False),
    )


def gemma4_layers_from_json(data: Mapping[str, Any], where: str, num_taps: int) -> BackboneConfig:
    """The layers of a Gemma4 configuration; see `qwen3_layers_from_json`."""
    read = Reader(data, where)
    read.only("hidden_activation", _GEMMA4_ACTIVATION)
    read.only("enable_moe_block", False)
    if data.get("hidden_size_per_layer_input"):
        read.only("hidden_size_per_layer_input", 0)
    if _sliding_layers(read):
        raise CompatibilityError(
            f"{where} has layer_types {data['layer_types']!r}, but a Gemma4 drafter's layers are "
            f"{FULL}."
        )
    ropes = data.get("rope_parameters")
    theta, fraction = _rope(ropes.get(FULL) if isinstance(ropes, Mapping) else ropes, None, where)
    shared = read.boolean("attention_k_eq_v", default=False)
    heads = "num_key_value_heads"
    if shared and data.get("num_global_key_value_heads") is not None:
        heads = "num_global_key_value_heads"
    return BackboneConfig(
        **_common_shapes(read),
        num_kv_heads=read.integer(heads),
        head_dim=read.integer("global_head_dim"),
        num_taps=num_taps,
        rope_theta=theta,
        value_from_key=shared,
        rotary_fraction=fraction,
        **GEMMA4_PARTS,
    )


def _common_shapes(read: Reader) -> dict[str, Any]:
    """What layers of either family say in the same fields."""
    return {
        "hidden_size": read.integer("hidden_size"),
        "intermediate_size": read.integer("intermediate_size"),
        "num_layers": read.integer("num_hidden_layers"),
        "num_heads": read.integer("num_attention_heads"),
        "rms_norm_eps": read.number("rms_norm_eps"),
        "attention_bias": read.boolean("attention_bias", default=False),
    }


def is_gemma4(backbone: BackboneConfig) -> bool:
    """Whether the layers are Gemma4's; else they are Qwen3's, or Llama's without their norms.

    Raises:
        CompatibilityError: they are neither's, so no configuration can describe them.
    """
    if isinstance(backbone, DeepseekV4Layers):
        raise CompatibilityError(
            "The drafter's layers are DeepSeek-V4's, for which this layout has no place; choose "
            "deepspec, attached or deepseek_v4."
        )
    parts = {name: getattr(backbone, name) for name in GEMMA4_PARTS}
    if parts == GEMMA4_PARTS and backbone.query_key_norms and not backbone.sliding_layers:
        return True
    plain = {name: getattr(BackboneConfig, name) for name in GEMMA4_PARTS}
    if parts == plain and not backbone.value_from_key and backbone.rotary_fraction == 1.0:
        return False
    raise CompatibilityError(
        f"The drafter's layers are neither Qwen3's nor Gemma4's ({parts}), so that no layout can "
        "carry them."
    )


def layers_to_json(backbone: BackboneConfig) -> dict[str, Any]:
    """The fields that describe layers, in the form of their family.

    Raises:
        CompatibilityError: see `is_gemma4`.
    """
    kinds = [FULL] * backbone.num_layers
    for layer in backbone.sliding_layers:
        kinds[layer] = SLIDING
    fields: dict[str, Any] = {
        "attention_bias": backbone.attention_bias,
        "hidden_size": backbone.hidden_size,
        "intermediate_size": backbone.intermediate_size,
        "layer_types": kinds,
        "num_attention_heads": backbone.num_heads,
        "num_hidden_layers": backbone.num_layers,
        "rms_norm_eps": backbone.rms_norm_eps,
    }
    if is_gemma4(backbone):
        own = {"num_global_key_value_heads" if backbone.value_from_key else "num_key_value_heads"}
        return fields | {
            "attention_k_eq_v": backbone.value_from_key,
            "enable_moe_block": False,
            "global_head_dim": backbone.head_dim,
            "hidden_activation": _GEMMA4_ACTIVATION,
            "hidden_size_per_layer_input": 0,
            **dict.fromkeys(own, backbone.num_kv_heads),
        }
    fields |= {
        "head_dim": backbone.head_dim,
        "hidden_act": "silu",
        "model_type": "qwen3" if backbone.query_key_norms else "llama",
        "num_key_value_heads": backbone.num_kv_heads,
        "rope_parameters": {"rope_theta": backbone.rope_theta, "rope_type": "default"},
    }
    if backbone.sliding_layers:
        fields |= {
            "sliding_window": backbone.sliding_window,
            "sliding_window_non_causal": not backbone.causal_windows,
            "use_sliding_window": True,
        }
    return fields


def model_to_json(backbone: BackboneConfig, extra: Mapping[str, Any]) -> dict[str, Any]:
    """What a config.json says of a model with these layers, `extra` as it was read.

    Raises:
        CompatibilityError: see `is_gemma4`.
    """
    data: dict[str, Any] = {
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "sliding_window": None,
        "use_cache": True,
        "use_sliding_window": False,
    }
    if not is_gemma4(backbone):
        return {**data, **extra, **layers_to_json(backbone)}
    shapes = {"head_dim": backbone.head_dim, "num_key_value_heads": backbone.num_kv_heads}
    rope = {"rope_parameters": _gemma4_rope(backbone, extra.get("rope_parameters"))}
    data |= {"model_type": "gemma4_text", **shapes}
    return {**data, **extra, **layers_to_json(backbone), **rope}


def _gemma4_rope(backbone: BackboneConfig, others: object) -> dict[str, Any]:
    """`rope_parameters` of a Gemma4 configuration, the other layer types' as they were read."""
    own: dict[str, Any] = {"rope_theta": backbone.rope_theta, "rope_type": "default"}
    if backbone.rotary_fraction != 1.0:
        own["partial_rotary_factor"] = backbone.rotary_fraction
        own["rope_type"] = "proportional"
    return {**(others if isinstance(others, Mapping) else {}), FULL: own}


def _sliding_layers(read: Reader) -> tuple[int, ...]:
    kinds, layers = read.data.get("layer_types"), read.integer("num_hidden_layers")
    if kinds is None and read.data.get("use_sliding_window"):
        raise CompatibilityError(
            f"{read.where} has use_sliding_window true and no layer_types; add them, {FULL} or "
            f"{SLIDING} for each of the {layers} layers."
        )
    if kinds is None:
        return ()
    known = isinstance(kinds, list) and all(kind in (FULL, SLIDING) for kind in kinds)
    if not known or len(kinds) != layers:
        raise CompatibilityError(
            f"{read.where} has layer_types {kinds!r}, but only {FULL} and {SLIDING}, one for each "
            f"of the {layers} layers, are supported."
        )
    return tuple(i for i, kind in enumerate(kinds) if kind == SLIDING)


def _rope(parameters: object, old_theta: object, where: str) -> tuple[float, float]:
    """Theta, and the share of a head's pairs that turn.

    Theta may stand in the style of transformers 5 (in `rope_parameters`) or 4 (top level).
    """
    if not isinstance(parameters, Mapping):
        raise CheckpointError(
            f"{where} has rope_parameters {parameters!r} for {FULL}, but they must be an object."
        )
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    factor = parameters.get("factor") or 1.0
    if kind not in ("default", "proportional") or factor != 1.0:
        raise CompatibilityError(
            f"{where} has rope_type {kind!r} with factor {factor}, but only default and "
            "proportional, with factor 1, are supported yet."
        )
    theta = parameters.get("rope_theta", old_theta)
    if not is_positive(theta):
        raise CheckpointError(
            f"{where} has rope_theta {theta!r}, but it must be a positive number, in "
            "rope_parameters or at the top level."
        )
    fraction = parameters.get("partial_rotary_factor", 1.0)
    if not is_positive(fraction) or fraction > 1 or (kind == "default" and fraction != 1):
        raise CompatibilityError(
            f"{where} has partial_rotary_factor {fraction!r} with rope_type {kind}, but it must be "
            "more than 0, at most 1, and less than 1 for proportional only."
        )
    return float(theta), float(fraction)
