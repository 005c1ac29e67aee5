"""The layout of the speculators library (github.com/vllm-project/speculators).

The drafter's own fields stand at the top of config.json, those of its layers in
`transformer_layer_config`; captured layers are counted from 1, and the slots' layout is explicit.
Tensor names are the published ones. Eagle3's captured layers have a name of their own, and variants
of its layer are flags, all false for the published layer; its positions start at 1, which is the
same: the rotary embedding sees differences only. The configuration of an mtp's layer is its
target's own, whose last layer is what it reads, and its file has names of its own and neither
embedding nor head.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dspark.drafters.base import Layout
from dspark.drafters.checkpoints.eagle import AUX_LAYERS, FLAGS, llama_shapes
from dspark.drafters.checkpoints.fields import (
    QWEN3_FIELDS,
    Reader,
    is_gemma4,
    present,
    refuse_parts,
)
from dspark.drafters.checkpoints.published import (
    PROJECTED,
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

DSPARK, DFLASH, EAGLE3, PEAGLE, MTP = "dspark", "dflash", "eagle3", "peagle", "mtp"
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
# Beginnings of mtp's names, each with the usual one.
_MTP_NAMES = {
    "mtp_layers.0.final_layernorm.": "norm.",
    "mtp_layers.0.hidden_layernorm.": "layers.0.hidden_norm.",
    "mtp_layers.0.token_layernorm.": "layers.0.token_norm.",
    "mtp_layers.0.": "layers.0.",
}
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


def _passes(data: Mapping[str, Any], where: str) -> Any:
    """Drafts of a round, of a drafter whose configuration says so nowhere else."""
    tokens = _speculative_tokens(data)
    if tokens is None:
        raise CheckpointError(
            f"{where} has no speculative_tokens in speculators_config.proposal_methods, which say "
            "how many drafts a round has."
        )
    return tokens


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
    taps, tokens = _captured(read, AUX_LAYERS), _passes(data, where)
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


def _mtp_from_json(data: Mapping[str, Any], where: str) -> Eagle3Config:
    """Read a configuration of `speculators_model_type` mtp; args and errors as `_eagle3_from_json`.

    Of the layers that its target's configuration describes the drafter has the first's kind.
    """
    layers, read = _layers(data, where), Reader(data, where)
    nested = Reader(layers, f"transformer_layer_config of {where}")
    nested.only("model_type", "qwen3")
    read.only("num_nextn_predict_layers", 1)
    count, kinds = nested.integer("num_hidden_layers"), layers.get("layer_types")
    flat: dict[str, Any] = {
        **_LAYER_DEFAULTS,
        **layers,
        "layer_types": kinds[:1] if isinstance(kinds, list) else kinds,
        "num_hidden_layers": 1,
        "num_target_layers": count,
        "target_layer_ids": [count - 1],
        "ttt_length": _passes(data, where),
        PROJECTED: True,
        **_verifier_fields(data),
    }
    return eagle3_from_json(flat, where)


def _write_eagle3(drafter: Eagle3Drafter, dtype: str) -> dict[str, Any]:
    """The configuration of a drafter whose weights are stored as `dtype`.

    Raises:
        CompatibilityError: the drafter's layer is Gemma4's, or that of MTP modules with what the
            library's mtp takes from its target.
    """
    if drafter.config.backbone.input_projection:
        return _mtp_to_json(drafter, dtype)
    return _eagle3_to_json(drafter.config, dtype)


def _mtp_to_json(drafter: Eagle3Drafter, dtype: str) -> dict[str, Any]:
    config = drafter.config
    _refuse_gemma4(config.backbone)
    own = drafter.own_embedding_VH is not None or drafter.own_head_VH is not None
    wrong = {
        f"target_layer_ids {list(config.target_layer_ids)} (not the target's last)": (
            config.target_layer_ids != (config.num_target_layers - 1,)
        ),
        "Llama's layer": not config.backbone.query_key_norms,
        "an embedding or head of its own": own or config.draft_vocab_size is not None,
    }
    refuse_parts(
        present(wrong),
        "for which the library's mtp has no place; save it attached to its target.",
    )
    flat = eagle3_to_json(config, dtype)
    name, architectures = flat.pop(TARGET_NAME, None), flat.pop(TARGET_ARCHITECTURES, [])
    nested = _nested_fields(flat, config.extra)
    nested["layer_types"] = nested["layer_types"] * config.num_target_layers
    return {
        "architectures": ["MTPDraftModel"],
        "dtype": dtype,
        "num_nextn_predict_layers": 1,
        "speculators_config": _proposal_fields(MTP, config.ttt_length, name, architectures),
        "speculators_model_type": MTP,
        "tie_word_embeddings": False,
        "transformer_layer_config": nested | {"num_hidden_layers": config.num_target_layers},
    }


def _pack(data: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file: of an mtp in its own names, without embedding and head."""
    if data["speculators_model_type"] != MTP:
        return dict(state)
    found = {}
    for name, tensor in state.items():
        begin = next(((a, b) for a, b in _MTP_NAMES.items() if name.startswith(b)), None)
        if begin is not None:
            found[begin[0] + name.removeprefix(begin[1])] = tensor
    return found


def _eagle3_to_json(config: Eagle3Config, dtype: str) -> dict[str, Any]:
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
        "speculators mtp": _mtp_from_json,
    },
    writers={DSparkDrafter: _write_dspark, Eagle3Drafter: _write_eagle3},
    renamed=_MTP_NAMES,
    pack=_pack,
)
