"""The published config.json of an Eagle3 drafter and `Eagle3Config`, each as the other.

FORMAT_FACTS.md A.4: the target's configuration with `ttt_length`, `step_loss_decay`,
`draft_num_hidden_layers` and the captured layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dspark.drafters.eagle3 import Eagle3Config
from dspark.drafters.layer_fields import (
    QWEN3_FIELDS,
    Reader,
    layers_to_json,
    qwen3_layers_from_json,
)
from dspark.errors import CompatibilityError

ARCHITECTURE = "Qwen3Eagle3Model"

# Every field that acts here beside the layer's; all others are kept in `Eagle3Config.extra`.
_FIELDS = QWEN3_FIELDS | {
    "architectures",
    "draft_num_hidden_layers",
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


def eagle3_from_json(data: Mapping[str, Any], where: str) -> Eagle3Config:
    """Read a published configuration.

    Args:
        data: the parsed config.json.
        where: what to call it in errors.

    Raises:
        CheckpointError: a field is missing or has a value of the wrong kind.
        CompatibilityError: an option that is not supported.
    """
    read = Reader(data, where)
    taps = read.integers("target_layer_ids")
    vocab = read.integer("vocab_size")
    if read.integer("draft_vocab_size", default=vocab) != vocab:
        raise CompatibilityError(
            f"{where} has draft_vocab_size {data['draft_vocab_size']}, but only the target's whole "
            f"vocabulary ({vocab}) is supported yet."
        )
    return Eagle3Config(
        backbone=qwen3_layers_from_json(data, where, len(taps)),
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
    data: dict[str, Any] = {
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "sliding_window": None,
        "use_cache": True,
        "use_sliding_window": False,
        **config.extra,
        **layers_to_json(config.backbone),
        "architectures": [ARCHITECTURE],
        "draft_num_hidden_layers": config.backbone.num_layers,
        "dtype": dtype,
        "max_position_embeddings": config.max_position_embeddings,
        "num_target_layers": config.num_target_layers,
        "step_loss_decay": config.step_loss_decay,
        "target_layer_ids": list(config.target_layer_ids),
        "tie_word_embeddings": False,
        "ttt_length": config.ttt_length,
        "vocab_size": config.vocab_size,
    }
    return dict(sorted(data.items()))
