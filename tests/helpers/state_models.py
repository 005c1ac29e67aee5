"""Tiny random models that keep more than keys and values, one per family."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SMALL = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2}
HYBRID = {
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
FALCON = HYBRID | {
    "mamba_d_ssm": 16,
    "mamba_n_heads": 2,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 4,
}
DELTA = HYBRID | {
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 1,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
STATE_MODELS: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 4},
    "mamba2": {"state_size": 4, "num_heads": 4, "head_dim": 8, "n_groups": 1},
    "falcon_mamba": {"state_size": 4},
    "falcon_h1": FALCON,
    "jamba": HYBRID | {
        "mamba_d_state": 4, "mamba_d_conv": 2, "mamba_dt_rank": 4, "num_experts": 1,
        "num_experts_per_tok": 1, "attn_layer_period": 2, "attn_layer_offset": 1,
    },
    "lfm2": HYBRID | {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3},
    "qwen3_next": DELTA | {
        "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 8,
    },
    "qwen3_5_text": DELTA,
    "nemotron_h": HYBRID | {
        "num_hidden_layers": 3, "layers_block_type": ["mamba", "attention", "mlp"],
        "mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1,
        "chunk_size": 4,
    },
    "deepseek_v4": {
        "num_hidden_layers": 4, "num_attention_heads": 2, "head_dim": 16, "q_lora_rank": 8,
        "o_lora_rank": 8, "o_groups": 1, "moe_intermediate_size": 8, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "sliding_window": 8, "index_n_heads": 2, "index_head_dim": 8,
        "index_topk": 4,
    },
}  # fmt: skip


def new_model(model_type: str, **options: Any) -> Any:
    """A random model of a family, in float32."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **(SMALL | options))
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    return model
