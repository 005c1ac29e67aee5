"""llama.cpp's GGUF layout of a drafter: names, and reading (`gguf_writer` writes).

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

from dspark.drafters.checkpoints.published import DSPARK, LLAMA_EAGLE3, RESIDUAL
from dspark.errors import CheckpointError, CompatibilityError
from dspark.sources.gguf_file import GgufFile

DFLASH, EAGLE3 = "dflash", "eagle3"
ARCHITECTURES = (DFLASH, EAGLE3)
TOKENS, MASK = "tokenizer.ggml.tokens", "tokenizer.ggml.mask_token_id"
OWN_CONFIG, FORMAT_VERSION = "dspark.config", "dspark.format_version"
PAIRED = 1  # from this `dspark.format_version` on, rows of Eagle3's queries and keys are paired
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"

_TOP = {
    "fc.weight": "fc.weight",
    "hidden_norm.weight": "enc.output_norm.weight",
    "norm.weight": "output_norm.weight",
    EMBEDDING: "token_embd.weight",
    HEAD: "output.weight",
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


def rotated(num_heads: int, num_kv_heads: int) -> tuple[tuple[str, int], tuple[str, int]]:
    """Eagle3's projections that are rotated, and their heads.

    llama.cpp rotates rows 2i and 2i + 1 of a head together (LLAMA_ROPE_TYPE_NORM), we i and
    i + D/2.
    """
    prefix = "layers.0.self_attn"
    return (f"{prefix}.q_proj.weight", num_heads), (f"{prefix}.k_proj.weight", num_kv_heads)


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
    if file.architecture == EAGLE3 and ours and file.get(FORMAT_VERSION, 0) < PAIRED:
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
        for name, number in rotated(*heads):
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
