"""The published config.json of an Eagle3 drafter and `Eagle3Config`, each as the other.

FORMAT_FACTS.md A.4: the target's configuration with `ttt_length`, `step_loss_decay`,
`draft_num_hidden_layers` and the captured layers. The files of the EAGLE authors and of those who
followed them (G: "legacy") have a Llama layer, captured layers counted from 1, and most of them a
reduced vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dspark.drafters.eagle3 import Eagle3Config
from dspark.drafters.json_reader import Reader
from dspark.drafters.layer_fields import (
    GEMMA4_FIELDS,
    QWEN3_FIELDS,
    gemma4_layers_from_json,
    is_gemma4,
    model_to_json,
    qwen3_layers_from_json,
)
from dspark.errors import CheckpointError, CompatibilityError

ARCHITECTURE, GEMMA4_ARCHITECTURE = "Qwen3Eagle3Model", "Gemma4Eagle3Model"
LEGACY_ARCHITECTURE = "LlamaForCausalLMEagle3"
AUX_LAYERS = "eagle_aux_hidden_state_layer_ids"
RESIDUAL = "norm_before_residual"
# Variants of the layer that are not built here: all must be false.
FLAGS = ("norm_before_fc", "fc_norm", "norm_output")
_LEGACY_LENGTH = 7

# Every field that acts here beside the layer's; all others are kept in `Eagle3Config.extra`.
_FIELDS = frozenset(
    {
        "architectures",
        "draft_num_hidden_layers",
        "max_position_embeddings",
        "vocab_size",
        "draft_vocab_size",
        "target_layer_ids",
        "num_target_layers",
        "ttt_length",
        "step_loss_decay",
        RESIDUAL,
        "tie_word_embeddings",
        "dtype",
        "torch_dtype",
    }
)


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
    gemma4 = (data.get("architectures") or [None])[0] == GEMMA4_ARCHITECTURE
    taps = read.integers("target_layer_ids")
    vocab = read.integer("vocab_size")
    known = vocab if data.get("draft_vocab_size") is None else read.integer("draft_vocab_size")
    if gemma4:
        backbone = gemma4_layers_from_json(data, where, len(taps))
    else:
        normed = data.get("model_type") != "llama"
        backbone = qwen3_layers_from_json(data, where, len(taps), query_key_norms=normed)
    residual = read.boolean(RESIDUAL, default=False)
    fields = _FIELDS | (GEMMA4_FIELDS if gemma4 else QWEN3_FIELDS)
    return Eagle3Config(
        backbone=replace(backbone, norm_before_residual=residual),
        vocab_size=vocab,
        target_layer_ids=tuple(taps),
        num_target_layers=read.integer("num_target_layers"),
        ttt_length=read.integer("ttt_length"),
        step_loss_decay=read.number("step_loss_decay") if "step_loss_decay" in data else 0.8,
        max_position_embeddings=read.integer("max_position_embeddings", default=40960),
        draft_vocab_size=None if known == vocab else known,
        extra={key: value for key, value in data.items() if key not in fields},
    )


def legacy_eagle3_from_json(data: Mapping[str, Any], where: str) -> Eagle3Config:
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
    least = {"num_target_layers": max([0, *taps]) + 1, "ttt_length": _LEGACY_LENGTH}
    return eagle3_from_json(least | flat, where)


def llama_shapes(data: Mapping[str, Any]) -> dict[str, Any]:
    """A Llama configuration with what it may leave out: it follows from its other shapes."""
    width, heads = data.get("hidden_size"), data.get("num_attention_heads")
    flat = {key: value for key, value in data.items() if value is not None}
    if type(width) is int and type(heads) is int and heads > 0:
        flat = {"head_dim": width // heads, "num_key_value_heads": heads} | flat
    return {"model_type": "llama"} | flat


def eagle3_to_json(config: Eagle3Config, dtype: str) -> dict[str, Any]:
    """The published configuration of a drafter whose weights are stored as `dtype`.

    `refuse_beyond_published` tells whether the published stack would read it as it is meant.
    """
    architecture = GEMMA4_ARCHITECTURE if is_gemma4(config.backbone) else ARCHITECTURE
    if not config.backbone.query_key_norms:
        architecture = LEGACY_ARCHITECTURE
    data: dict[str, Any] = {
        **model_to_json(config.backbone, config.extra),
        "architectures": [architecture],
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
    if config.backbone.norm_before_residual:
        data[RESIDUAL] = True
    if config.draft_vocab_size is not None:
        data["draft_vocab_size"] = config.draft_vocab_size
    return dict(sorted(data.items()))


def refuse_beyond_published(config: Eagle3Config) -> None:
    """Refuse what the published stack would silently read as something else.

    Raises:
        CompatibilityError: naming it.
    """
    beyond = {
        f"draft_vocab_size {config.draft_vocab_size}": config.draft_vocab_size is not None,
        f"{RESIDUAL} true": config.backbone.norm_before_residual,
        "Llama's layer": not config.backbone.query_key_norms,
    }
    found = [name for name, there in beyond.items() if there]
    if found:
        raise CompatibilityError(
            f"The drafter has {' and '.join(found)}, for which the published layout has no place; "
            "save it attached to its target, or as speculators."
        )
