"""llama.cpp's GGUF layout of a drafter, read and written.

llama.cpp knows two architectures: `dflash` (DFlash, and DSpark with a vanilla Markov head) with
Qwen3's layer, and `eagle3` with Llama's layer. Keys and tensor names are those that its loader
reads (src/models/dflash.cpp, eagle3.cpp and src/llama-arch.cpp of build b11434): captured layers
are counted as inputs of the next layer (`target_layers`, ours + 1), `d2t` holds token ids, rows of
Eagle3's queries and keys are paired as llama.cpp rotates Llama's, and embedding and head are left
out where they are the target's. What GGUF has no key for (the target's layers, an Eagle3 drafter's
passes) is kept as JSON in `dspark.config`, and `dspark.format_version` tells later files of ours
from earlier ones; llama.cpp ignores both.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dspark.drafters.checkpoints.fields import is_gemma4, present, refuse_parts
from dspark.drafters.checkpoints.published import DSPARK, LLAMA_EAGLE3, PROJECTED_LAYER, RESIDUAL
from dspark.drafters.checkpoints.speculators import TARGET_ARCHITECTURES
from dspark.drafters.config import BackboneConfig, DSparkConfig
from dspark.drafters.deepseek_v4_layers import DeepseekV4Layers
from dspark.drafters.dspark import DSparkDrafter
from dspark.drafters.eagle3 import Eagle3Config, Eagle3Drafter
from dspark.errors import CheckpointError, CompatibilityError
from dspark.sources.gguf_file import Field, GgufFile

DFLASH, EAGLE3 = "dflash", "eagle3"
ARCHITECTURES = (DFLASH, EAGLE3)
TOKENS, MASK = "tokenizer.ggml.tokens", "tokenizer.ggml.mask_token_id"
OWN_CONFIG, FORMAT_VERSION = "dspark.config", "dspark.format_version"
_PAIRED = 1  # from this `dspark.format_version` on, rows of Eagle3's queries and keys are paired
MOST_SLOTS = 512  # llama.cpp decodes a block in one micro-batch
_EAGLE3_TAPS = 3
_EMBEDDING, _HEAD = "embed_tokens.weight", "lm_head.weight"

_TOP = {
    "fc.weight": "fc.weight",
    "hidden_norm.weight": "enc.output_norm.weight",
    "norm.weight": "output_norm.weight",
    _EMBEDDING: "token_embd.weight",
    _HEAD: "output.weight",
    "d2t": "d2t",
    "markov_head.markov_w1.weight": "markov_w1.weight",
    "markov_head.markov_w2.weight": "markov_w2.weight",
    "confidence_head.proj.weight": "conf_proj.weight",
    "confidence_head.proj.bias": "conf_proj.bias",
}
_LAYER = {
    "input_layernorm": "attn_norm",
    "hidden_norm": "attn_norm_2",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# Keys that change the computation in ways that are not built here, with the values that do not.
_ABSENT: Mapping[str, tuple[Any, ...]] = {
    "hyper_connection.count": (0,),
    "conv_kernel_size": (0,),
    "selector_rank": (0,),
    "attention.sliding_window": (0,),
    "attention.causal": (False,),
    "attention.scale": (0.0,),
    "attention.value_scale": (0.0, 1.0),
    "rope.scaling.type": ("none",),
    "hidden_activation": ("silu",),
    "norm_before_fc": (False,),
}


def gguf_name(name: str, layers: int) -> str:
    """llama.cpp's name of one of our tensors.

    Raises:
        KeyError: it has none.
    """
    return {**_TOP, **_layer_names(layers)}[name]


def _layer_names(layers: int) -> dict[str, str]:
    return {
        f"layers.{i}.{ours}.weight": f"blk.{i}.{theirs}.weight"
        for i in range(layers)
        for ours, theirs in _LAYER.items()
    }


# Writing


def to_gguf(
    drafter: DSparkDrafter | Eagle3Drafter, config: Mapping[str, Any]
) -> tuple[str, dict[str, Field], dict[str, Tensor]]:
    """Architecture, fields (the tokenizer's left out) and tensors of a bound drafter.

    Args:
        drafter: bound to its target, whose embedding and head are left out where it shares them.
        config: its config.json, for what GGUF has no key for.

    Raises:
        CompatibilityError: llama.cpp has no place for something of the drafter, which is named.
    """
    eagle3 = isinstance(drafter, Eagle3Drafter)
    refuse_parts(
        beyond_llama_cpp(drafter), "which llama.cpp does not run; keep it in another layout."
    )
    architecture = EAGLE3 if eagle3 else DFLASH
    values = _layer_values(drafter.config)
    if isinstance(drafter, Eagle3Drafter):
        values |= {
            "target_hidden_size": drafter.config.backbone.hidden_size,
            "norm_before_residual": drafter.config.backbone.norm_before_residual,
            "norm_before_fc": False,
        }
    else:
        values |= {
            "block_size": drafter.config.block_size,
            "sample_from_anchor": drafter.config.sample_from_anchor,
            "has_confidence_head": drafter.config.confidence_head,
        }
    fields = {f"{architecture}.{key}": Field.of(value) for key, value in values.items()}
    fields["general.name"] = Field.of("dspark drafter")
    if isinstance(drafter, DSparkDrafter):
        fields[MASK] = Field.of(drafter.config.mask_token_id)
    fields |= {OWN_CONFIG: Field.of(json.dumps(dict(config))), FORMAT_VERSION: Field.of(_PAIRED)}
    return architecture, fields, _tensors(drafter)


def _layer_values(config: DSparkConfig | Eagle3Config) -> dict[str, Any]:
    backbone = config.backbone
    return {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": backbone.hidden_size,
        "block_count": backbone.num_layers,
        "feed_forward_length": backbone.intermediate_size,
        "attention.head_count": backbone.num_heads,
        "attention.head_count_kv": backbone.num_kv_heads,
        "attention.key_length": backbone.head_dim,
        "attention.value_length": backbone.head_dim,
        "attention.layer_norm_rms_epsilon": backbone.rms_norm_eps,
        "rope.freq_base": backbone.rope_theta,
        "rope.dimension_count": backbone.head_dim,
        "target_layers": [i + 1 for i in config.target_layer_ids],
    }


def _tensors(drafter: DSparkDrafter | Eagle3Drafter) -> dict[str, Tensor]:
    config, state = drafter.config, {n: x.detach().cpu() for n, x in drafter.state_dict().items()}
    tables = (drafter.own_embedding_VH, drafter.own_head_VH)
    if tables[0] is not None:
        state[_EMBEDDING] = tables[0].cpu()
    # With an embedding of its own and no head llama.cpp would take the drafter's for tied.
    if any(table is not None for table in tables):
        state[_HEAD] = drafter.borrowed.head_VH.cpu()
    if state.pop("t2d", None) is not None:
        state["d2t"] = state["d2t"] + torch.arange(state["d2t"].numel())
    weight = state.get("confidence_head.proj.weight")
    if weight is not None:
        # llama.cpp's head always reads the Markov embedding: zeros where this one does not.
        missing = config.backbone.hidden_size + _rank(config) - weight.shape[1]
        state["confidence_head.proj.weight"] = torch.nn.functional.pad(weight, (0, missing))
    if isinstance(drafter, Eagle3Drafter):
        for name, heads in _rotated(config.backbone.num_heads, config.backbone.num_kv_heads):
            width = state[name].shape[1]
            halves = state[name].reshape(heads, 2, -1, width)
            state[name] = halves.transpose(1, 2).reshape(-1, width)
    return {gguf_name(name, config.backbone.num_layers): x for name, x in state.items()}


def _rotated(num_heads: int, num_kv_heads: int) -> tuple[tuple[str, int], tuple[str, int]]:
    """Eagle3's projections that are rotated, and their heads.

    llama.cpp rotates rows 2i and 2i + 1 of a head together (LLAMA_ROPE_TYPE_NORM), we i and
    i + D/2.
    """
    prefix = "layers.0.self_attn"
    return (f"{prefix}.q_proj.weight", num_heads), (f"{prefix}.k_proj.weight", num_kv_heads)


def _rank(config: DSparkConfig | Eagle3Config) -> int:
    return config.markov_rank if isinstance(config, DSparkConfig) else 0


def beyond_llama_cpp(drafter: DSparkDrafter | Eagle3Drafter) -> list[str]:
    """What of a drafter llama.cpp does not run; empty where it runs."""
    config, last = drafter.config, drafter.config.num_target_layers - 1
    own = _beyond_eagle3 if isinstance(drafter, Eagle3Drafter) else _beyond_dflash
    if isinstance(config.backbone, DeepseekV4Layers):
        return ["DeepSeek-V4's layers, of which llama.cpp's own converter makes its file"]
    architectures = [str(name) for name in config.extra.get(TARGET_ARCHITECTURES, ())]
    parts = _beyond_layers(config.backbone) | own(drafter)
    found = present(parts)
    if config.target_layer_ids[-1] == last:
        found.append(f"target_layer_ids with the target's last layer ({last})")
    if any(name.lower().startswith("gemma") for name in architectures):
        found.append(f"a target of architecture {architectures[0]} with scaled embeddings")
    return found


def _beyond_layers(backbone: BackboneConfig) -> dict[str, bool]:
    return {
        "Gemma4's layers": is_gemma4(backbone),
        "attention_bias true": backbone.attention_bias,
        f"sliding_window {backbone.sliding_window} with windows that stay with the anchor": bool(
            backbone.sliding_layers
        ),
    }


def _beyond_dflash(drafter: DSparkDrafter | Eagle3Drafter) -> dict[str, bool]:
    assert isinstance(drafter, DSparkDrafter)
    config = drafter.config
    return {
        f"a {config.markov_head_type} Markov head": config.markov_rank > 0
        and config.markov_head_type != "vanilla",
        "a confidence head without a Markov head": config.confidence_head
        and config.markov_rank == 0,
        "a learned mask embedding": drafter.mask_embedding is not None,
        f"block_size {config.block_size} (at most {MOST_SLOTS})": config.block_size > MOST_SLOTS,
    }


def _beyond_eagle3(drafter: DSparkDrafter | Eagle3Drafter) -> dict[str, bool]:
    assert isinstance(drafter, Eagle3Drafter)
    config, taps = drafter.config, len(drafter.config.target_layer_ids)
    return {
        "all drafts in one pass (P-EAGLE)": config.mask_token_id is not None,
        PROJECTED_LAYER: config.backbone.input_projection,
        f"{config.backbone.num_layers} layers": config.backbone.num_layers > 1,
        "Qwen3's layer (norms of queries and keys)": config.backbone.query_key_norms,
        f"{taps} captured layers (only {_EAGLE3_TAPS})": taps != _EAGLE3_TAPS,
    }


def spec_flags(drafter: DSparkDrafter | Eagle3Drafter) -> str:
    """The options that llama.cpp's programs need to draft with it as it was trained."""
    if isinstance(drafter, Eagle3Drafter):
        kind = "draft-eagle3"
    else:
        own = drafter.config.markov_rank > 0 or drafter.config.sample_from_anchor
        kind = "draft-dspark" if own else "draft-dflash"
    return f"--spec-type {kind} --spec-draft-n-max {drafter.block_size}"


# Reading


def from_gguf(file: GgufFile) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a drafter.

    Raises:
        CheckpointError: a key is missing, or names and keys do not agree.
        CompatibilityError: another model, or an option that is not supported.
    """
    kind, where = file.architecture, str(file.path)
    if kind not in ARCHITECTURES:
        raise CompatibilityError(
            f"{where} is a model of architecture {kind}, which is no drafter that is supported; "
            f"give a GGUF file of architecture {' or '.join(ARCHITECTURES)}."
        )
    file.check_whole()
    _refuse_unpaired(file)
    for key, allowed in _ABSENT.items():
        value = file.get(f"{kind}.{key}", allowed[0])
        if value not in allowed:
            raise CompatibilityError(
                f"{where} has {kind}.{key} {value!r}, but only {allowed[-1]!r} is supported yet."
            )
    read = _reader_of(file)
    tokens = len(file.get(TOKENS, ()))
    config = {**_own_config(file), **_config(read), "vocab_size": read("vocab_size", tokens)}
    if kind == DFLASH:
        config |= _dflash_config(file, read)
    else:
        config |= {
            "architectures": [LLAMA_EAGLE3],
            "model_type": "llama",
            RESIDUAL: bool(read("norm_before_residual", False)),
        }
    if "d2t" in file.tensors:
        config["draft_vocab_size"] = file.tensors["d2t"].shape[0]
    return config, _state(file, config)


def _refuse_unpaired(file: GgufFile) -> None:
    """Refuse an Eagle3 file of ours from before rows were paired; other programs always pair."""
    ours = OWN_CONFIG in file.fields
    if file.architecture == EAGLE3 and ours and file.get(FORMAT_VERSION, 0) < _PAIRED:
        raise CompatibilityError(
            f"{file.path} was written by an earlier version of dspark, which did not pair the rows "
            "of queries and keys as llama.cpp rotates them; write it again from the drafter's "
            f"directory: dspark convert DIRECTORY {file.path} --to gguf --target TARGET."
        )


_Read = Callable[..., Any]


def _reader_of(file: GgufFile) -> _Read:
    def read(key: str, *default: Any) -> Any:
        name = f"{file.architecture}.{key}"
        value = file.get(name, *default)
        if value is None:
            raise CheckpointError(f"{file.path} lacks {name}; write or fetch it again.")
        if isinstance(value, float):
            # The shortest number that this float32 is, as a config.json would have it.
            value = float(str(np.float32(value)))
        return value

    return read


def _own_config(file: GgufFile) -> dict[str, Any]:
    text = file.get(OWN_CONFIG, "{}")
    try:
        data = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{file.path} has a {OWN_CONFIG} that is no JSON.") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{file.path} has a {OWN_CONFIG} that is no JSON object.")
    # What other keys or the tensors tell is taken from there.
    for name in ("draft_vocab_size", "layer_types"):
        data.pop(name, None)
    least = {"num_target_layers": max([1, *file.get(f"{file.architecture}.target_layers", ())])}
    return least | data


def _config(read: _Read) -> dict[str, Any]:
    width = read("attention.key_length", None)
    if read("rope.dimension_count", width) != width:
        raise CompatibilityError(
            f"The GGUF file turns {read('rope.dimension_count', width)} of {width} numbers of a "
            "head, but only all are supported."
        )
    return {
        "max_position_embeddings": read("context_length"),
        "hidden_size": read("embedding_length"),
        "num_hidden_layers": read("block_count"),
        "draft_num_hidden_layers": read("block_count"),
        "intermediate_size": read("feed_forward_length"),
        "num_attention_heads": read("attention.head_count"),
        "num_key_value_heads": read("attention.head_count_kv"),
        "head_dim": width,
        "rms_norm_eps": read("attention.layer_norm_rms_epsilon"),
        "rope_parameters": {"rope_theta": read("rope.freq_base"), "rope_type": "default"},
        "target_layer_ids": [i - 1 for i in read("target_layers")],
    }


def _dflash_config(file: GgufFile, read: _Read) -> dict[str, Any]:
    """What is DSpark's; llama.cpp tells DSpark from DFlash by the Markov head."""
    names = file.tensors
    rank = file.tensors["markov_w1.weight"].shape[1] if "markov_w1.weight" in names else 0
    mask = file.get(MASK)
    if mask is None:
        raise CheckpointError(f"{file.path} lacks {MASK}, which fills a block; write it again.")
    return {
        "architectures": [DSPARK],
        "model_type": "qwen3",
        "block_size": read("block_size"),
        "sample_from_anchor": bool(read("sample_from_anchor", rank > 0)),
        "mask_token_id": mask,
        "markov_rank": rank,
        "markov_head_type": "vanilla",
        "enable_confidence_head": "conf_proj.weight" in names,
        "confidence_head_with_markov": "conf_proj.weight" in names,
    }


def _state(file: GgufFile, config: Mapping[str, Any]) -> dict[str, Tensor]:
    ours = {
        theirs: name
        for name, theirs in {**_TOP, **_layer_names(int(config["num_hidden_layers"]))}.items()
    }
    unknown = [name for name in file.tensors if name not in ours]
    if unknown:
        raise CompatibilityError(
            f"{file.path} has tensors that no supported drafter has: {', '.join(unknown[:5])}."
        )
    state = {ours[name]: file.tensor(name) for name in file.tensors}
    if file.architecture == EAGLE3:
        heads = config["num_attention_heads"], config["num_key_value_heads"]
        for name, number in _rotated(*heads):
            shape = state[name].shape if name in state else ()
            # What does not fit is refused where the tensors are loaded.
            if len(shape) == 2 and number in range(1, shape[0]) and not shape[0] % (2 * number):
                pairs = state[name].reshape(number, -1, 2, shape[1])
                state[name] = pairs.transpose(1, 2).reshape(shape)
    if "d2t" in state:
        tokens, vocab = state["d2t"].long(), int(config["vocab_size"])
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab:
            raise CheckpointError(f"{file.path} has a d2t beyond its vocabulary of {vocab} tokens.")
        state["d2t"] = tokens - torch.arange(tokens.numel())
        state["t2d"] = torch.zeros(vocab, dtype=torch.bool).index_fill(0, tokens, True)
    return _as_stored(state)


def _as_stored(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Vectors, which GGUF widens to float32, in the matrices' dtype where that loses nothing."""
    dtype = state["fc.weight"].dtype if "fc.weight" in state else torch.float32
    wide = {name: x for name, x in state.items() if x.dtype == torch.float32}
    if not all(torch.equal(x.to(dtype).float(), x) for x in wide.values()):
        return state
    return state | {name: x.to(dtype) for name, x in wide.items()}
