"""Tiny random models of many families."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

BASE = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "bos_token_id": 2,
}
ALTERNATING = ["sliding_attention", "full_attention"] * 2
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
GEMMA4 = {
    "layer_types": ALTERNATING,
    "sliding_window": 4,
    "global_head_dim": 16,
    "hidden_size_per_layer_input": 0,
    "final_logit_softcapping": 4.0,
}
MODELS = {
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3 windows": (
        "qwen3",
        {"layer_types": ALTERNATING, "use_sliding_window": True, "sliding_window": 4},
    ),
    "qwen3_moe": ("qwen3_moe", MOE),
    "llama": ("llama", {"num_key_value_heads": 4}),
    "mistral": ("mistral", {"sliding_window": 4}),
    "gemma2": (
        "gemma2",
        {
            "sliding_window": 4,
            "query_pre_attn_scalar": 8,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 4.0,
        },
    ),
    "gemma3": ("gemma3_text", {"layer_types": ALTERNATING, "sliding_window": 4}),
    "gemma4": ("gemma4_text", GEMMA4),
    "gemma4 k_eq_v": (
        "gemma4_text",
        GEMMA4 | {"attention_k_eq_v": True, "num_global_key_value_heads": 1},
    ),
    "gemma4 inputs": (
        "gemma4_text",
        GEMMA4 | {"hidden_size_per_layer_input": 6, "vocab_size_per_layer_input": 61},
    ),
    "gemma4 shared": (
        "gemma4_text",
        GEMMA4
        | {
            "hidden_size_per_layer_input": 6,
            "vocab_size_per_layer_input": 61,
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
        },
    ),
    "gpt_oss": (
        "gpt_oss",
        {
            "layer_types": ALTERNATING,
            "sliding_window": 4,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "gpt2": ("gpt2", {"n_positions": 64}),
}


def _tiny_model(name, **others):
    """A random model whose logits are far from uniform, the same at every call."""
    model_type, changes = MODELS.get(name, (name, {}))
    config = AutoConfig.for_model(model_type, **(BASE | changes | others))
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.3 * noise if parameter.dim() > 1 else parameter + 0.1 * noise)
    return model.eval()


@pytest.fixture
def tiny_model():
    return _tiny_model


@pytest.fixture(params=MODELS)
def family(request):
    return request.param


@pytest.fixture(scope="session")
def shared():
    """What tests of one family share, built once: name -> (own results, target)."""
    return {}
