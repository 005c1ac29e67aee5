"""A tiny Qwen3 target as a GGUF file, for llama.cpp to run."""

from __future__ import annotations

from pathlib import Path

from dspark.drafters.checkpoints.files import read_json, read_weights
from dspark.drafters.checkpoints.from_target import tokenizer_fields
from dspark.sources.gguf_file import Field, write_gguf

_LAYER = {
    "input_layernorm": "attn_norm",
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


def write_qwen3_target(directory: Path, path: Path, weight_type: str) -> None:
    """Write the Qwen3 model of a directory, its tokenizer included."""
    config, state = read_json(directory / "config.json"), read_weights(directory)
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    for i in range(config["num_hidden_layers"]):
        for ours, theirs in _LAYER.items():
            names[f"model.layers.{i}.{ours}.weight"] = f"blk.{i}.{theirs}.weight"
    values = {
        "vocab_size": config["vocab_size"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": float(config["rope_parameters"]["rope_theta"]),
    }
    fields = {f"qwen3.{key}": Field.of(value) for key, value in values.items()}
    fields |= tokenizer_fields(directory, config["vocab_size"], offline=True)
    tensors = {names[name]: tensor for name, tensor in state.items()}
    write_gguf(path, "qwen3", fields, tensors, weight_type)
