"""The published config.json and `DSparkConfig`, each as the other (FORMAT_FACTS.md A.1, A.3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dspark.drafters.config import DSparkConfig
from dspark.drafters.json_reader import Reader
from dspark.drafters.layer_fields import (
    FULL,
    GEMMA4_FIELDS,
    QWEN3_FIELDS,
    gemma4_layers_from_json,
    is_gemma4,
    model_to_json,
    qwen3_layers_from_json,
)
from dspark.errors import CheckpointError, CompatibilityError

ARCHITECTURE, GEMMA4_ARCHITECTURE = "Qwen3DSparkModel", "Gemma4DSparkModel"

# Every field that acts here beside the layers'; all others are kept in `DSparkConfig.extra`.
_FIELDS = frozenset(
    {
        "architectures",
        "block_size",
        "max_position_embeddings",
        "vocab_size",
        "draft_vocab_size",
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
        CompatibilityError: an option that is not supported.
    """
    read = Reader(data, where)
    gemma4 = (data.get("architectures") or [None])[0] == GEMMA4_ARCHITECTURE
    taps = read.integers("target_layer_ids")
    mask = data.get("mask_token_id")
    vocab = read.integer("vocab_size")
    if mask is not None and not (type(mask) is int and 0 <= mask < vocab):
        raise CheckpointError(
            f"{where} has mask_token_id {mask!r}, but it must be a token of the vocabulary (0 to "
            f"{vocab - 1})."
        )
    rank = read.integer("markov_rank", minimum=0)
    confidence = read.boolean("enable_confidence_head")
    known = vocab if data.get("draft_vocab_size") is None else read.integer("draft_vocab_size")
    layers = gemma4_layers_from_json if gemma4 else qwen3_layers_from_json
    fields = _FIELDS | (GEMMA4_FIELDS if gemma4 else QWEN3_FIELDS)
    return DSparkConfig(
        backbone=layers(data, where, len(taps)),
        vocab_size=vocab,
        draft_vocab_size=None if known == vocab else known,
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
        extra={key: value for key, value in data.items() if key not in fields},
    )


def config_to_json(config: DSparkConfig, dtype: str) -> dict[str, Any]:
    """The published configuration of a drafter whose weights are stored as `dtype`.

    What the published stack knows no field for is written only where it differs from what that
    stack takes for granted; `refuse_beyond_published` tells whether there is such a thing.

    Raises:
        CompatibilityError: the layers are no family's.
    """
    gemma4 = is_gemma4(config.backbone)
    data: dict[str, Any] = {
        **model_to_json(config.backbone, config.extra),
        "architectures": [GEMMA4_ARCHITECTURE if gemma4 else ARCHITECTURE],
        "block_size": config.block_size,
        "dtype": dtype,
        "enable_confidence_head": config.confidence_head,
        "markov_rank": config.markov_rank,
        "mask_token_id": config.mask_token_id,
        "max_position_embeddings": config.max_position_embeddings,
        "num_anchors": config.num_anchors,
        "num_target_layers": config.num_target_layers,
        "target_layer_ids": list(config.target_layer_ids),
        "tie_word_embeddings": False,
        "vocab_size": config.vocab_size,
    }
    if not config.sample_from_anchor:
        data["sample_from_anchor"] = False
    if config.draft_vocab_size is not None:
        data["draft_vocab_size"] = config.draft_vocab_size
    if config.confidence_head:
        data["confidence_head_with_markov"] = config.confidence_head_with_markov
    if config.markov_rank > 0:
        data["markov_head_type"] = config.markov_head_type
    return dict(sorted(data.items()))


def refuse_beyond_published(config: DSparkConfig) -> None:
    """Refuse what the published stack would silently read as something else.

    Raises:
        CompatibilityError: naming it.
    """
    beyond = {
        "sample_from_anchor false": not config.sample_from_anchor,
        f"draft_vocab_size {config.draft_vocab_size}": config.draft_vocab_size is not None,
        f"sliding_window {config.backbone.sliding_window}": bool(config.backbone.sliding_layers),
    }
    found = [name for name, there in beyond.items() if there]
    if found:
        raise CompatibilityError(
            f"The drafter has {' and '.join(found)}, for which the published layout has no place "
            f"(it knows {FULL} over the whole vocabulary, from the anchor on); save it attached to "
            "its target, or as speculators."
        )


def dflash_from_json(data: Mapping[str, Any], where: str) -> DSparkConfig:
    """Read the DFlash authors' configuration: no heads, and a block of 1 + n slots (A.0, G).

    Their `dflash_config` holds `target_layer_ids`, `mask_token_id` and, in some files,
    `block_size`.

    Raises:
        CheckpointError, CompatibilityError: as `config_from_json`.
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
    return config_from_json(rest | lifted, where)
