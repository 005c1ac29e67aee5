"""Tiny random models, and what they lend to a drafter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from dspark.targets.forward import TargetParts


def tiny_qwen3(*, seed: int, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random Qwen3 whose logits are spread wide enough for argmaxes to be clear.

    It never ends an answer, unless `changes` of its configuration say how.
    """
    fields: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 96,
        "initializer_range": 0.7,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(**(fields | changes))).to(dtype).eval()


def tiny_llama(seed: int = 0) -> Any:
    """A random Llama of 4 layers, 32 wide, with 40 tokens: what tiny recipes train for."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config)


def lent_parts(embedding_VH: Tensor, head_VH: Tensor, **changes: Any) -> TargetParts:
    """What a plain target with these tables lends: no scale, bias, soft cap or final norm."""
    vocab_size, hidden_size = head_VH.shape
    parts = TargetParts(
        embedding_VH=embedding_VH,
        embedding_scale=1.0,
        head_VH=head_VH,
        head_bias_V=None,
        logit_softcap=None,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        final_norm_H=None,
    )
    return replace(parts, **changes)


def parts_in(directory: Path) -> TargetParts:
    """What the checkpoint of a plain target lends, its final norm included."""
    tensors = load_file(directory / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    head = tensors.get("lm_head.weight", embedding)
    return lent_parts(embedding, head, final_norm_H=tensors["model.norm.weight"])
