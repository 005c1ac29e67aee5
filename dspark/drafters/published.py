"""The published config.json and `DSparkConfig`, each as the other (FORMAT_FACTS.md A.1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dspark.drafters.backbone import BackboneConfig
from dspark.drafters.config import DSparkConfig
from dspark.errors import CheckpointError, CompatibilityError

ARCHITECTURE = "Qwen3DSparkModel"

# Every field that acts here; all others are kept in `DSparkConfig.extra`.
_FIELDS = frozenset(
    {
        "architectures",
        "model_type",
        "block_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "attention_bias",
        "hidden_act",
        "layer_types",
        "rope_parameters",
        "rope_theta",
        "rope_scaling",
        "max_position_embeddings",
        "vocab_size",
        "sample_from_anchor",
        "mask_token_id",
        "target_layer_ids",
        "num_target_layers",
        "num_anchors",
        "markov_rank",
        "markov_head_type",
        "enable_confidence_head",
        "confidence_head_with_markov",
        "tie_word_embeddings",
        "dtype",
        "torch_dtype",
    }
)


def config_from_json(data: Mapping[str, Any], where: str) -> DSparkConfig:
    """Read a published configuration.

    Args:
        data: the parsed config.json.
        where: what to call it in errors.

    Raises:
        CheckpointError: a field is missing or has a value of the wrong kind.
        CompatibilityError: an architecture or option that is not supported.
    """
    read = _Reader(data, where)
    _check_layers(data, where, read.integer("num_hidden_layers"))
    taps = data.get("target_layer_ids")
    if not isinstance(taps, list) or not all(type(i) is int for i in taps):
        raise CheckpointError(
            f"{where} has target_layer_ids {taps!r}, but it must be a list of integers."
        )
    mask = data.get("mask_token_id")
    vocab = read.integer("vocab_size")
    if mask is not None and not (type(mask) is int and 0 <= mask < vocab):
        raise CheckpointError(
            f"{where} has mask_token_id {mask!r}, but it must be a token of the vocabulary (0 to "
            f"{vocab - 1})."
        )
    rank = read.integer("markov_rank", minimum=0)
    confidence = read.boolean("enable_confidence_head")
    backbone = BackboneConfig(
        hidden_size=read.integer("hidden_size"),
        intermediate_size=read.integer("intermediate_size"),
        num_layers=read.integer("num_hidden_layers"),
        num_heads=read.integer("num_attention_heads"),
        num_kv_heads=read.integer("num_key_value_heads"),
        head_dim=read.integer("head_dim"),
        num_taps=len(taps),
        rms_norm_eps=read.number("rms_norm_eps"),
        rope_theta=_rope_theta(data, where),
        attention_bias=read.boolean("attention_bias", default=False),
    )
    return DSparkConfig(
        backbone=backbone,
        vocab_size=vocab,
        block_size=read.integer("block_size"),
        sample_from_anchor=read.boolean("sample_from_anchor", default=True),
        mask_token_id=mask,
        target_layer_ids=tuple(taps),
        num_target_layers=read.integer("num_target_layers"),
        markov_rank=rank,
        markov_head_type=str(data.get("markov_head_type", "vanilla")),
        confidence_head=confidence,
        confidence_head_with_markov=confidence
        and read.boolean("confidence_head_with_markov", default=rank > 0),
        max_position_embeddings=read.integer("max_position_embeddings", default=40960),
        num_anchors=read.integer("num_anchors", default=512),
        extra={key: value for key, value in data.items() if key not in _FIELDS},
    )


def config_to_json(config: DSparkConfig, dtype: str) -> dict[str, Any]:
    """The published configuration of a drafter whose weights are stored as `dtype`.

    What the published stack knows no field for is written only where it differs from what that
    stack takes for granted.
    """
    backbone = config.backbone
    data: dict[str, Any] = {
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "sliding_window": None,
        "use_cache": True,
        "use_sliding_window": False,
        **config.extra,
        "architectures": [ARCHITECTURE],
        "model_type": "qwen3",
        "attention_bias": backbone.attention_bias,
        "block_size": config.block_size,
        "dtype": dtype,
        "enable_confidence_head": config.confidence_head,
        "head_dim": backbone.head_dim,
        "hidden_act": "silu",
        "hidden_size": backbone.hidden_size,
        "intermediate_size": backbone.intermediate_size,
        "layer_types": ["full_attention"] * backbone.num_layers,
        "markov_rank": config.markov_rank,
        "mask_token_id": config.mask_token_id,
        "max_position_embeddings": config.max_position_embeddings,
        "num_anchors": config.num_anchors,
        "num_attention_heads": backbone.num_heads,
        "num_hidden_layers": backbone.num_layers,
        "num_key_value_heads": backbone.num_kv_heads,
        "num_target_layers": config.num_target_layers,
        "rms_norm_eps": backbone.rms_norm_eps,
        "rope_parameters": {"rope_theta": backbone.rope_theta, "rope_type": "default"},
        "target_layer_ids": list(config.target_layer_ids),
        "tie_word_embeddings": False,
        "vocab_size": config.vocab_size,
    }
    if not config.sample_from_anchor:
        data["sample_from_anchor"] = False
    if config.confidence_head:
        data["confidence_head_with_markov"] = config.confidence_head_with_markov
    if config.markov_rank > 0:
        data["markov_head_type"] = config.markov_head_type
    return dict(sorted(data.items()))


def _check_layers(data: Mapping[str, Any], where: str, num_layers: int) -> None:
    kinds = data.get("layer_types")
    if kinds is not None and kinds != ["full_attention"] * num_layers:
        raise CompatibilityError(
            f"{where} has layer_types {kinds!r}, but only full_attention, once per each of the "
            f"{num_layers} layers, is supported yet."
        )
    activation = data.get("hidden_act", "silu")
    if activation != "silu":
        raise CompatibilityError(
            f"{where} has hidden_act {activation!r}, but only silu is supported yet."
        )


def _rope_theta(data: Mapping[str, Any], where: str) -> float:
    """Theta in the style of transformers 5 (rope_parameters) or 4 (top level)."""
    parameters = data.get("rope_parameters") or data.get("rope_scaling") or {}
    if not isinstance(parameters, Mapping):
        raise CheckpointError(f"{where} has rope_parameters {parameters!r}, not an object.")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default":
        raise CompatibilityError(
            f"{where} has rope_type {kind!r}, but only default is supported yet."
        )
    theta = parameters.get("rope_theta", data.get("rope_theta"))
    if isinstance(theta, bool) or not isinstance(theta, (int, float)) or theta <= 0:
        raise CheckpointError(
            f"{where} has rope_theta {theta!r}, but it must be a positive number, in "
            "rope_parameters or at the top level."
        )
    return float(theta)


class _Reader:
    """Fields of a configuration by type, with errors that name them."""

    def __init__(self, data: Mapping[str, Any], where: str) -> None:
        self._data = data
        self._where = where

    def integer(self, name: str, *, minimum: int = 1, default: int | None = None) -> int:
        value = self._data.get(name, default)
        if type(value) is not int or value < minimum:
            raise self._error(name, value, f"an integer of at least {minimum}")
        return value

    def number(self, name: str) -> float:
        value = self._data.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            raise self._error(name, value, "a positive number")
        return float(value)

    def boolean(self, name: str, *, default: bool | None = None) -> bool:
        value = self._data.get(name, default)
        if not isinstance(value, bool):
            raise self._error(name, value, "true or false")
        return value

    def _error(self, name: str, value: object, needed: str) -> CheckpointError:
        if value is None:
            return CheckpointError(f"{self._where} lacks {name}, which must be {needed}.")
        return CheckpointError(f"{self._where} has {name} {value!r}, but it must be {needed}.")
