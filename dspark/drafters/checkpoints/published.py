"""The layout of the published checkpoints ("deepspec"), and the attached one, which is like it.

A config.json is the target's, with the drafter's own fields. The published `dflash_*` files have
the architecture of DSpark's, without heads. Attached, a drafter lies in `dspark/` of its target's
directory, without embedding and head, and may have what the published stack has no field for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dspark.drafters.base import Layout
from dspark.drafters.checkpoints import deepseek_v4
from dspark.drafters.checkpoints.dialects import lifted
from dspark.drafters.checkpoints.fields import (
    FULL,
    GEMMA4_FIELDS,
    QWEN3_FIELDS,
    Reader,
    gemma4_layers_from_json,
    is_gemma4,
    model_to_json,
    present,
    qwen3_layers_from_json,
    refuse_parts,
)
from dspark.drafters.config import DSparkConfig
from dspark.drafters.deepseek_v4 import DeepseekV4Drafter
from dspark.drafters.dspark import MASK_EMBEDDING, DSparkDrafter
from dspark.drafters.eagle3 import Eagle3Config, Eagle3Drafter
from dspark.errors import CheckpointError, CompatibilityError

DSPARK, GEMMA4_DSPARK = "Qwen3DSparkModel", "Gemma4DSparkModel"
EAGLE3, GEMMA4_EAGLE3 = "Qwen3Eagle3Model", "Gemma4Eagle3Model"
LLAMA_EAGLE3 = "LlamaForCausalLMEagle3"  # the EAGLE authors' (`checkpoints.eagle`)
RESIDUAL, PROJECTED = "norm_before_residual", "input_projection"
PROJECTED_LAYER = "the layer of MTP modules (input_projection)"

# Every field that acts here beside the layers'; all others are kept in `DSparkConfig.extra`.
_DSPARK_FIELDS = frozenset({
    "architectures", "block_size", "max_position_embeddings", "vocab_size", "draft_vocab_size",
    "sample_from_anchor", "mask_token_id", "target_layer_ids", "num_target_layers",
    "num_anchors", "markov_rank", "markov_head_type", "enable_confidence_head",
    "confidence_head_with_markov", "tie_word_embeddings", "dtype", "torch_dtype",
})  # fmt: skip


# Every field that acts here beside the layer's; all others are kept in `Eagle3Config.extra`.
_EAGLE3_FIELDS = frozenset({
    "architectures", "draft_num_hidden_layers", "max_position_embeddings", "vocab_size",
    "draft_vocab_size", "target_layer_ids", "num_target_layers", "ttt_length",
    "step_loss_decay", RESIDUAL, PROJECTED, "mask_token_id", "tie_word_embeddings", "dtype",
    "torch_dtype",
})  # fmt: skip


# Fields that a drafter's configuration has under the same names.
_SAME = ("max_position_embeddings", "num_target_layers", "vocab_size")
_DSPARK_SAME = (*_SAME, "block_size", "markov_rank", "mask_token_id", "num_anchors")
_EAGLE3_SAME = (*_SAME, "step_loss_decay", "ttt_length")


def _reduced(read: Reader, vocab: int) -> int | None:
    """Tokens of a reduced vocabulary; None where the drafter knows all."""
    if read.data.get("draft_vocab_size") in (None, vocab):
        return None
    return read.integer("draft_vocab_size")


def dspark_from_json(data: Mapping[str, Any], where: str) -> DSparkConfig:
    """Read a published configuration, or one that nests the drafter's own fields.

    Args:
        data: the parsed config.json.
        where: what to call it in errors.

    Raises:
        CheckpointError: a field is missing or has a value of the wrong kind.
        CompatibilityError: an option that is not supported.
    """
    data = lifted(data, where)
    read = Reader(data, where)
    gemma4 = (data.get("architectures") or [None])[0] == GEMMA4_DSPARK
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
    layers = gemma4_layers_from_json if gemma4 else qwen3_layers_from_json
    fields = _DSPARK_FIELDS | (GEMMA4_FIELDS if gemma4 else QWEN3_FIELDS)
    return DSparkConfig(
        backbone=layers(data, where, len(taps)),
        vocab_size=vocab,
        draft_vocab_size=_reduced(read, vocab),
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


def dspark_to_json(config: DSparkConfig, dtype: str) -> dict[str, Any]:
    """The published configuration of a drafter whose weights are stored as `dtype`.

    What the published stack knows no field for is written only where it differs from what that
    stack takes for granted; `refuse_beyond_published` tells whether there is such a thing.

    Raises:
        CompatibilityError: the layers are no family's.
    """
    gemma4 = is_gemma4(config.backbone)
    data: dict[str, Any] = {
        **model_to_json(config.backbone, config.extra),
        "architectures": [GEMMA4_DSPARK if gemma4 else DSPARK],
        **{name: getattr(config, name) for name in _DSPARK_SAME},
        "dtype": dtype,
        "enable_confidence_head": config.confidence_head,
        "target_layer_ids": list(config.target_layer_ids),
        "tie_word_embeddings": False,
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


def dflash_from_json(data: Mapping[str, Any], where: str) -> DSparkConfig:
    """Read the DFlash authors' configuration: no heads, and a block of 1 + n slots.

    Such files are never written. Their `dflash_config` holds `target_layer_ids`, `mask_token_id`
    and, in some files, `block_size`.

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
    gemma4 = (data.get("architectures") or [None])[0] == GEMMA4_EAGLE3
    taps = read.integers("target_layer_ids")
    vocab = read.integer("vocab_size")
    if gemma4:
        backbone = gemma4_layers_from_json(data, where, len(taps))
    else:
        normed = data.get("model_type") != "llama"
        backbone = qwen3_layers_from_json(data, where, len(taps), query_key_norms=normed)
    residual, projected = (read.boolean(name, default=False) for name in (RESIDUAL, PROJECTED))
    masked = data.get("mask_token_id") is not None
    fields = _EAGLE3_FIELDS | (GEMMA4_FIELDS if gemma4 else QWEN3_FIELDS)
    return Eagle3Config(
        backbone=replace(backbone, norm_before_residual=residual, input_projection=projected),
        vocab_size=vocab,
        target_layer_ids=tuple(taps),
        num_target_layers=read.integer("num_target_layers"),
        ttt_length=read.integer("ttt_length"),
        step_loss_decay=read.number("step_loss_decay") if "step_loss_decay" in data else 0.8,
        max_position_embeddings=read.integer("max_position_embeddings", default=40960),
        draft_vocab_size=_reduced(read, vocab),
        mask_token_id=read.integer("mask_token_id", minimum=0) if masked else None,
        extra={key: value for key, value in data.items() if key not in fields},
    )


def eagle3_to_json(config: Eagle3Config, dtype: str) -> dict[str, Any]:
    """The published configuration of a drafter whose weights are stored as `dtype`.

    `refuse_beyond_published` tells whether the published stack would read it as it is meant.
    """
    architecture = GEMMA4_EAGLE3 if is_gemma4(config.backbone) else EAGLE3
    if not config.backbone.query_key_norms:
        architecture = LLAMA_EAGLE3
    data: dict[str, Any] = {
        **model_to_json(config.backbone, config.extra),
        "architectures": [architecture],
        "draft_num_hidden_layers": config.backbone.num_layers,
        **{name: getattr(config, name) for name in _EAGLE3_SAME},
        "dtype": dtype,
        "target_layer_ids": list(config.target_layer_ids),
        "tie_word_embeddings": False,
    }
    for name in (RESIDUAL, PROJECTED):
        if getattr(config.backbone, name):
            data[name] = True
    if config.mask_token_id is not None:
        data["mask_token_id"] = config.mask_token_id
    if config.draft_vocab_size is not None:
        data["draft_vocab_size"] = config.draft_vocab_size
    return dict(sorted(data.items()))


def refuse_beyond_published(config: DSparkConfig | Eagle3Config) -> None:
    """Refuse what the published stack would silently read as something else.

    Raises:
        CompatibilityError: naming it.
    """
    beyond = {f"draft_vocab_size {config.draft_vocab_size}": config.draft_vocab_size is not None}
    if isinstance(config, DSparkConfig):
        known = f" (it knows {FULL} over the whole vocabulary, from the anchor on)"
        window = config.backbone.sliding_window
        beyond["sample_from_anchor false"] = not config.sample_from_anchor
        beyond[f"sliding_window {window}"] = bool(config.backbone.sliding_layers)
    else:
        known = ""
        beyond[f"{RESIDUAL} true"] = config.backbone.norm_before_residual
        beyond[PROJECTED_LAYER] = config.backbone.input_projection
        beyond["Llama's layer"] = not config.backbone.query_key_norms
        beyond[f"{config.backbone.num_layers} layers"] = config.backbone.num_layers > 1
        beyond["all drafts in one pass (P-EAGLE)"] = config.mask_token_id is not None
    refuse_parts(
        present(beyond),
        f"for which the published layout has no place{known}; save it attached to its target, or "
        "as speculators.",
    )


def refuse_learned_mask(drafter: DSparkDrafter, layout: str) -> None:
    """Refuse a learned mask embedding, of which only the attached layout knows.

    Raises:
        CompatibilityError: there is one.
    """
    if drafter.mask_embedding is not None:
        raise CompatibilityError(
            f"The drafter has a learned {MASK_EMBEDDING}, for which the {layout} layout has no "
            "place; save it attached to its target."
        )


def _write_dspark(drafter: DSparkDrafter, dtype: str) -> dict[str, Any]:
    refuse_learned_mask(drafter, "published")
    refuse_beyond_published(drafter.config)
    return dspark_to_json(drafter.config, dtype)


def _write_deepseek_v4(drafter: DeepseekV4Drafter, dtype: str) -> dict[str, Any]:
    return deepseek_v4.to_json(drafter.config, dtype)


def _write_eagle3(drafter: Eagle3Drafter, dtype: str) -> dict[str, Any]:
    refuse_beyond_published(drafter.config)
    return eagle3_to_json(drafter.config, dtype)


LAYOUT = Layout(
    readers={
        DSPARK: dspark_from_json,
        GEMMA4_DSPARK: dspark_from_json,
        "DSparkDraftModel": dspark_from_json,  # what some writers call the first
        "Lfm2DSparkDraftModel": dspark_from_json,  # Liquid's, of the same layers
        EAGLE3: eagle3_from_json,
        GEMMA4_EAGLE3: eagle3_from_json,
        "DFlashDraftModel": dflash_from_json,  # the DFlash authors'
        "Eagle3DraftModel": eagle3_from_json,  # what the published evaluation calls it
    },
    writers={
        DeepseekV4Drafter: _write_deepseek_v4,
        DSparkDrafter: _write_dspark,
        Eagle3Drafter: _write_eagle3,
    },
)
ATTACHED = Layout(
    writers={
        DeepseekV4Drafter: _write_deepseek_v4,
        DSparkDrafter: lambda drafter, dtype: dspark_to_json(drafter.config, dtype),
        Eagle3Drafter: lambda drafter, dtype: eagle3_to_json(drafter.config, dtype),
    },
    holds_tables=False,
)
