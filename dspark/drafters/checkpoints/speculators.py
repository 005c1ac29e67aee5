"""The layout of the speculators library (github.com/vllm-project/speculators).

The drafter's own fields stand at the top of config.json, those of its layers in
`transformer_layer_config`; captured layers are counted from 1, and the slots' layout is explicit.
Tensor names are the published ones. Eagle3's captured layers have a name of their own, and variants
of its layer are flags, all false for the published layer; its positions start at 1, which is the
same: the rotary embedding sees differences only.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from dspark.drafters.base import Layout
from dspark.drafters.checkpoints.eagle import AUX_LAYERS, FLAGS, llama_shapes
from dspark.drafters.checkpoints.fields import QWEN3_FIELDS, Reader, is_gemma4
from dspark.drafters.checkpoints.published import (
    RESIDUAL,
    dspark_from_json,
    dspark_to_json,
    eagle3_from_json,
    eagle3_to_json,
    refuse_learned_mask,
)
from dspark.drafters.config import BackboneConfig, DSparkConfig
from dspark.drafters.dspark import DSparkDrafter
from dspark.drafters.eagle3 import Eagle3Config, Eagle3Drafter
from dspark.errors import CheckpointError, CompatibilityError

logger = logging.getLogger(__name__)

DSPARK, DFLASH, EAGLE3, PEAGLE = "dspark", "dflash", "eagle3", "peagle"
TARGET_NAME, TARGET_ARCHITECTURES = "target_model_name_or_path", "target_architectures"

# What a nested configuration may leave out: Qwen3's own defaults.
_LAYER_DEFAULTS = {"head_dim": 128, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6}
# Fields that have the same name and meaning at the top of either layout.
_SAME = (
    "block_size", "confidence_head_with_markov", "draft_vocab_size", "enable_confidence_head",
    "markov_head_type", "markov_rank", "mask_token_id", "num_target_layers",
    "sample_from_anchor", "sliding_window_non_causal",
)  # fmt: skip
# Fields of the layers' configuration that the layers themselves do not read.
_NESTED = {
    "attention_dropout", "initializer_range", "max_position_embeddings", "sliding_window",
    "use_cache", "use_sliding_window", "vocab_size",
}  # fmt: skip
_NO_HEADS = {"enable_confidence_head": False, "markov_rank": 0}


def _dspark_from_json(data: Mapping[str, Any], where: str) -> DSparkConfig:
    """Read a configuration of `speculators_model_type` dspark or dflash.

    Without `num_target_layers`, which that library does not write, the target is taken to have no
    more layers than are captured.

    Args:
        data: the parsed config.json.
        where: what to call it in errors.

    Raises:
        CheckpointError: a field is missing or has a value of the wrong kind.
        CompatibilityError: an option that is not supported.
    """
    kind, layers = data["speculators_model_type"], _layers(data, where)
    read = Reader(data, where)
    read.only("projector_type", "dflash")
    read.only("shift_label", False)
    if layers.get("model_type") == "llama":  # the same tensors: the library has Qwen3's layer only
        layers = llama_shapes(layers) | {"model_type": "qwen3"}
    Reader(layers, f"transformer_layer_config of {where}").only("model_type", "qwen3")
    aux = _captured(read, "aux_hidden_state_layer_ids")
    width = layers.get("hidden_size")
    if data.get("target_hidden_size") not in (None, width):
        raise CompatibilityError(
            f"{where} has target_hidden_size {data['target_hidden_size']!r}, but a drafter must be "
            f"as wide as its target ({width})."
        )
    flat: dict[str, Any] = {
        **_LAYER_DEFAULTS,
        **layers,
        **(_NO_HEADS if kind == DFLASH else {}),
        "num_target_layers": max([1, *aux]),
        **{name: data[name] for name in _SAME if data.get(name) is not None},
        "num_anchors": data.get("max_anchors", data.get("num_anchors", 512)),
        "sample_from_anchor": _sample_from_anchor(read, kind),
        "target_layer_ids": [i - 1 for i in aux],
        **_verifier_fields(data),
    }
    return _without_moving_state(dspark_from_json(flat, where), where)


def _dspark_to_json(config: DSparkConfig, dtype: str) -> dict[str, Any]:
    """The configuration of a drafter whose weights are stored as `dtype`.

    A drafter without heads that throws its anchor's slot away is written as dflash, every other
    one as dspark.

    Raises:
        CompatibilityError: the drafter's layers are not Qwen3's.
    """
    _refuse_gemma4(config.backbone)
    _without_moving_state(config, "The drafter")
    headless = config.markov_rank == 0 and not config.confidence_head
    kind = DFLASH if headless and not config.sample_from_anchor else DSPARK
    flat = dspark_to_json(config, dtype)
    name, architectures = flat.pop(TARGET_NAME, None), flat.pop(TARGET_ARCHITECTURES, [])
    top: dict[str, Any] = {
        "architectures": ["DFlashSpeculator" if kind == DFLASH else "DSparkSpeculator"],
        "aux_hidden_state_layer_ids": [i + 1 for i in config.target_layer_ids],
        "block_size": config.block_size,
        "draft_vocab_size": config.draft_vocab_size or config.vocab_size,
        "dtype": dtype,
        "mask_token_id": config.mask_token_id,
        "max_anchors": config.num_anchors,
        "num_target_layers": config.num_target_layers,
        "sample_from_anchor": config.sample_from_anchor,
        "sliding_window_non_causal": not config.backbone.causal_windows
        and bool(config.backbone.sliding_layers),
        "speculators_config": _proposal_fields(kind, config.num_drafts, name, architectures),
        "speculators_model_type": kind,
        "target_hidden_size": None,
        "tie_word_embeddings": False,
        "transformer_layer_config": _nested_fields(flat, config.extra),
    }
    if kind == DSPARK:
        top |= {
            "confidence_head_with_markov": config.confidence_head
            and config.confidence_head_with_markov,
            "enable_confidence_head": config.confidence_head,
            "markov_head_type": config.markov_head_type,
            "markov_rank": config.markov_rank,
        }
    return dict(sorted(top.items()))


def _refuse_gemma4(backbone: BackboneConfig) -> None:
    """Refuse layers that the library has no module for.

    Raises:
        CompatibilityError: they are Gemma4's.
    """
    if is_gemma4(backbone):
        raise CompatibilityError(
            "The drafter has Gemma4's layers, for which the speculators layout has no place; use "
            "the published layout, or save it attached to its target."
        )


def _proposal_fields(
    kind: str, tokens: int, name: str | None, architectures: list[str]
) -> dict[str, Any]:
    """How `tokens` drafts of a `kind` are verified, and by which target."""
    greedy = {"proposal_type": "greedy", "accept_tolerance": 0.0, "verifier_accept_k": 1}
    return {
        "algorithm": kind,
        "default_proposal_method": "greedy",
        "proposal_methods": [greedy | {"speculative_tokens": tokens}],
        "verifier": {"architectures": architectures, "name_or_path": name},
    }


def _nested_fields(flat: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a published configuration that belong in `transformer_layer_config`."""
    names = QWEN3_FIELDS | set(extra) | _NESTED
    return {key: flat[key] for key in flat if key in names and key != "sliding_window_non_causal"}


def _sample_from_anchor(read: Reader, kind: str) -> bool:
    """The slots' layout; where a file does not say, its number of tokens does.

    Files from before the field was introduced have 1 + n slots, whatever their kind, and one token
    less than slots; where the number tells nothing, the library's default for the kind is taken.
    """
    if read.data.get("sample_from_anchor") is not None:
        return read.boolean("sample_from_anchor")
    block, tokens = read.integer("block_size"), _speculative_tokens(read.data)
    told = {block: True, block - 1: False}.get(tokens)
    found = kind == DSPARK if told is None else told
    logger.warning(
        "%s has no sample_from_anchor; with block_size %s and speculative_tokens %s it is taken "
        "as %s.",
        read.where,
        block,
        tokens,
        str(found).lower(),
    )
    return found


def _layers(data: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    layers = data.get("transformer_layer_config")
    if not isinstance(layers, Mapping):
        raise CheckpointError(f"{where} has transformer_layer_config {layers!r}, not an object.")
    return layers


def _captured(read: Reader, name: str) -> list[int]:
    """The captured layers, counted from 1."""
    taps = read.integers(name)
    if not taps:
        raise CheckpointError(f"{read.where} has no {name}.")
    return taps


def _speculative_tokens(data: Mapping[str, Any]) -> Any:
    try:
        return data["speculators_config"]["proposal_methods"][0]["speculative_tokens"]
    except (KeyError, IndexError, TypeError):
        return None


def _verifier_fields(data: Mapping[str, Any]) -> dict[str, Any]:
    """Name and architectures of the target, as extra fields."""
    try:
        verifier = dict(data["speculators_config"]["verifier"])
    except (KeyError, TypeError, ValueError):
        return {}
    named = {
        TARGET_NAME: verifier.get("name_or_path"),
        TARGET_ARCHITECTURES: verifier.get("architectures"),
    }
    return {key: value for key, value in named.items() if value}


def _without_moving_state(config: DSparkConfig, where: str) -> DSparkConfig:
    """The same, if the library means the same by it.

    Raises:
        CompatibilityError: an rnn head with a slot that is thrown away: there its state moves in
            that slot too.
    """
    moving = config.markov_rank > 0 and config.markov_head_type == "rnn"
    if moving and not config.sample_from_anchor:
        raise CompatibilityError(
            f"{where} has markov_head_type rnn with sample_from_anchor false, which the library "
            "speculators starts a slot earlier; train it with sample_from_anchor true."
        )
    return config


def _eagle3_from_json(data: Mapping[str, Any], where: str) -> Eagle3Config:
    """Read a configuration of `speculators_model_type` eagle3 or peagle.

    Without `num_target_layers`, which that library does not write, the target is taken to have no
    more layers than are captured.

    Args:
        data: the parsed config.json.
        where: what to call it in errors.

    Raises:
        CheckpointError: a field is missing or has a value of the wrong kind.
        CompatibilityError: an option that is not supported.
    """
    layers, read = _layers(data, where), Reader(data, where)
    for flag in FLAGS:
        read.only(flag, False)
    llama = layers.get("model_type") == "llama"
    if not llama:
        Reader(layers, f"transformer_layer_config of {where}").only("model_type", "qwen3")
    if data.get("target_hidden_size") is not None:
        read.only("target_hidden_size", layers.get("hidden_size"))
    taps, tokens = _captured(read, AUX_LAYERS), _speculative_tokens(data)
    if tokens is None:
        raise CheckpointError(
            f"{where} has no speculative_tokens in speculators_config.proposal_methods, which say "
            "how many drafts a round has."
        )
    own = ["num_target_layers", "step_loss_decay", "draft_vocab_size", RESIDUAL]
    if data["speculators_model_type"] == PEAGLE:
        read.integer("mask_token_id", minimum=0)
        own.append("mask_token_id")
    flat: dict[str, Any] = {
        **_LAYER_DEFAULTS,
        **(llama_shapes(layers) if llama else layers),
        "num_target_layers": max([1, *taps]),
        **{name: data[name] for name in own if data.get(name) is not None},
        "target_layer_ids": [i - 1 for i in taps],
        "ttt_length": tokens,
        **_verifier_fields(data),
    }
    return eagle3_from_json(flat, where)


def _eagle3_to_json(config: Eagle3Config, dtype: str) -> dict[str, Any]:
    """The configuration of a drafter whose weights are stored as `dtype`.

    Raises:
        CompatibilityError: the drafter's layer is Gemma4's.
    """
    _refuse_gemma4(config.backbone)
    flat = eagle3_to_json(config, dtype)
    name, architectures = flat.pop(TARGET_NAME, None), flat.pop(TARGET_ARCHITECTURES, [])
    masked = {} if config.mask_token_id is None else {"mask_token_id": config.mask_token_id}
    kind = PEAGLE if masked else EAGLE3
    top: dict[str, Any] = {
        **masked,
        "architectures": ["PEagleSpeculator" if masked else "Eagle3Speculator"],
        AUX_LAYERS: [i + 1 for i in config.target_layer_ids],
        "draft_vocab_size": config.draft_vocab_size or config.vocab_size,
        "dtype": dtype,
        **dict.fromkeys(FLAGS, False),
        RESIDUAL: config.backbone.norm_before_residual,
        "num_target_layers": config.num_target_layers,
        "speculators_config": _proposal_fields(kind, config.ttt_length, name, architectures),
        "speculators_model_type": kind,
        "step_loss_decay": config.step_loss_decay,
        "target_hidden_size": None,
        "tie_word_embeddings": False,
        "transformer_layer_config": _nested_fields(flat, config.extra),
    }
    return dict(sorted(top.items()))


def _write_dspark(drafter: DSparkDrafter, dtype: str) -> dict[str, Any]:
    refuse_learned_mask(drafter, "speculators")
    return _dspark_to_json(drafter.config, dtype)


LAYOUT = Layout(
    readers={
        "speculators dspark": _dspark_from_json,
        "speculators dflash": _dspark_from_json,
        "speculators eagle3": _eagle3_from_json,
        "speculators peagle": _eagle3_from_json,
    },
    writers={
        DSparkDrafter: _write_dspark,
        Eagle3Drafter: lambda drafter, dtype: _eagle3_to_json(drafter.config, dtype),
    },
)
