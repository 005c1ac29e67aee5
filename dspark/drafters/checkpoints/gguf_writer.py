"""Writes llama.cpp's GGUF layout of a drafter; says what llama.cpp does not run of one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dspark.drafters.checkpoints.fields import is_gemma4, present, refuse_parts
from dspark.drafters.checkpoints.gguf import (
    DFLASH,
    EAGLE3,
    EMBEDDING,
    FORMAT_VERSION,
    HEAD,
    MASK,
    OWN_CONFIG,
    PAIRED,
    gguf_name,
    rotated,
)
from dspark.drafters.checkpoints.published import PROJECTED_LAYER
from dspark.drafters.checkpoints.speculators import TARGET_ARCHITECTURES
from dspark.drafters.config import BackboneConfig, DSparkConfig
from dspark.drafters.deepseek_v4_layers import DeepseekV4Layers
from dspark.drafters.dspark import DSparkDrafter
from dspark.drafters.eagle3 import Eagle3Config, Eagle3Drafter
from dspark.sources.gguf_file import Field

MOST_SLOTS = 512  # llama.cpp decodes a block in one micro-batch
_EAGLE3_TAPS = 3


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
    fields |= {OWN_CONFIG: Field.of(json.dumps(dict(config))), FORMAT_VERSION: Field.of(PAIRED)}
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
        state[EMBEDDING] = tables[0].cpu()
    # With an embedding of its own and no head llama.cpp would take the drafter's for tied.
    if any(table is not None for table in tables):
        state[HEAD] = drafter.borrowed.head_VH.cpu()
    if state.pop("t2d", None) is not None:
        state["d2t"] = state["d2t"] + torch.arange(state["d2t"].numel())
    weight = state.get("confidence_head.proj.weight")
    if weight is not None:
        # llama.cpp's head always reads the Markov embedding: zeros where this one does not.
        missing = config.backbone.hidden_size + _rank(config) - weight.shape[1]
        state["confidence_head.proj.weight"] = torch.nn.functional.pad(weight, (0, missing))
    if isinstance(drafter, Eagle3Drafter):
        for name, heads in rotated(config.backbone.num_heads, config.backbone.num_kv_heads):
            width = state[name].shape[1]
            halves = state[name].reshape(heads, 2, -1, width)
            state[name] = halves.transpose(1, 2).reshape(-1, width)
    return {gguf_name(name, config.backbone.num_layers): x for name, x in state.items()}


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
