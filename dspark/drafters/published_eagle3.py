"""The published config.json of an Eagle3 drafter and `Eagle3Config`, each as the other.

FORMAT_FACTS.md A.4: the target's configuration with `ttt_length`, `step_loss_decay`,
`draft_num_hidden_layers` and the captured layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dspark.drafters.backbone import BackboneConfig
from dspark.drafters.eagle3 import Eagle3Config
from dspark.drafters.published import _check_layers, _Reader, _rope_theta
from dspark.errors import CheckpointError, CompatibilityError

ARCHITECTURE = "Qwen3Eagle3Model"
ARCHITECTURES = (ARCHITECTURE, "Eagle3DraftModel")

# Every field that acts here; all others are kept in `Eagle3Config.extra`.
_FIELDS = frozenset(
    {
        "architectures",
        "model_type",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "draft_num_hidden_layers",
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
        "draft_vocab_size",
        "target_layer_ids",
        "num_target_layers",
        "ttt_length",
        "step_loss_decay",
        "tie_word_embeddings",
        "dtype",
        "torch_dtype",
    }
)


def is_eagle3(data: Mapping[str, Any]) -> bool:
    """Whether a parsed config.json is that of an Eagle3 drafter."""
    names = data.get("architectures")
    return isinstance(names, list) and bool(names) and names[0] in ARCHITECTURES


def eagle3_from_json(data: Mapping[str, Any], where: str) -> Eagle3Config:
    """Read a published configuration.

    Args:
        data: the parsed config.json.
        where: what to call it in errors.

    Raises:
        CheckpointError: a field is missing or has a value of the wrong kind.
        CompatibilityError: an architecture or option that is not supported.
    """
    if not is_eagle3(data):
        raise CompatibilityError(
            f"{where} has architectures {data.get('architectures')!r}, but an Eagle3 drafter's is "
            f"one of {', '.join(ARCHITECTURES)}."
        )
    read = _Reader(data, where)
    layers = read.integer("num_hidden_layers")
    if layers != 1:
        raise CompatibilityError(
            f"{where} has num_hidden_layers {layers}, but an Eagle3 drafter has 1 layer."
        )
    _check_layers(data, where, layers)
    taps = data.get("target_layer_ids")
    if not isinstance(taps, list) or not all(type(i) is int for i in taps):
        raise CheckpointError(
            f"{where} has target_layer_ids {taps!r}, but it must be a list of integers."
        )
    vocab = read.integer("vocab_size")
    if read.integer("draft_vocab_size", default=vocab) != vocab:
        raise CompatibilityError(
            f"{where} has draft_vocab_size {data['draft_vocab_size']}, but only the target's whole "
            f"vocabulary ({vocab}) is supported yet."
        )
    backbone = BackboneConfig(
        hidden_size=read.integer("hidden_size"),
        intermediate_size=read.integer("intermediate_size"),
        num_layers=layers,
        num_heads=read.integer("num_attention_heads"),
        num_kv_heads=read.integer("num_key_value_heads"),
        head_dim=read.integer("head_dim"),
        num_taps=len(taps),
        rms_norm_eps=read.number("rms_norm_eps"),
        rope_theta=_rope_theta(data, where),
        attention_bias=read.boolean("attention_bias", default=False),
    )
    return Eagle3Config(
        backbone=backbone,
        vocab_size=vocab,
        target_layer_ids=tuple(taps),
        num_target_layers=read.integer("num_target_layers"),
        ttt_length=read.integer("ttt_length"),
        step_loss_decay=read.number("step_loss_decay") if "step_loss_decay" in data else 0.8,
        max_position_embeddings=read.integer("max_position_embeddings", default=40960),
        extra={key: value for key, value in data.items() if key not in _FIELDS},
    )


def eagle3_to_json(config: Eagle3Config, dtype: str) -> dict[str, Any]:
    """The published configuration of a drafter whose weights are stored as `dtype`."""
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
        "draft_num_hidden_layers": backbone.num_layers,
        "dtype": dtype,
        "head_dim": backbone.head_dim,
        "hidden_act": "silu",
        "hidden_size": backbone.hidden_size,
        "intermediate_size": backbone.intermediate_size,
        "layer_types": ["full_attention"] * backbone.num_layers,
        "max_position_embeddings": config.max_position_embeddings,
        "num_attention_heads": backbone.num_heads,
        "num_hidden_layers": backbone.num_layers,
        "num_key_value_heads": backbone.num_kv_heads,
        "num_target_layers": config.num_target_layers,
        "rms_norm_eps": backbone.rms_norm_eps,
        "rope_parameters": {"rope_theta": backbone.rope_theta, "rope_type": "default"},
        "step_loss_decay": config.step_loss_decay,
        "target_layer_ids": list(config.target_layer_ids),
        "tie_word_embeddings": False,
        "ttt_length": config.ttt_length,
        "vocab_size": config.vocab_size,
    }
    return dict(sorted(data.items()))
