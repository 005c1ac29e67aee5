"""What differs between families of models beyond what their modules tell.

Everything here is checked by the probe when a model is loaded: a family that needs another entry
is refused by name, not run wrongly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dspark.errors import CompatibilityError


@dataclass(frozen=True)
class Family:
    """Where things are in a decoder, and how its embedding and norm are scaled.

    Attributes:
        layers: name of the list of decoder layers.
        norm: name of the final norm.
        scaled_embedding: embeddings are multiplied by sqrt(width), rounded to the model's dtype.
        norm_offset: the final norm multiplies by `weight + norm_offset`.
        adds_positions: learned positions are added to the embeddings before the first layer.
        streams: layers pass on several streams of hidden states; drafters read their mean.
    """

    layers: str = "layers"
    norm: str = "norm"
    scaled_embedding: bool = False
    norm_offset: float = 0.0
    adds_positions: bool = False
    streams: bool = False


_GEMMA = Family(scaled_embedding=True, norm_offset=1.0)
_GEMMA4 = Family(scaled_embedding=True)
_QWEN_HYBRID = Family(norm_offset=1.0)

FAMILIES: dict[str, Family] = {
    "gemma": _GEMMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "gemma4_text": _GEMMA4,
    "gemma4_unified_text": _GEMMA4,
    "deepseek_v4": Family(streams=True),
    "bamba": Family(norm="final_layernorm"),
    "falcon_h1": Family(norm="final_layernorm"),
    "falcon_mamba": Family(norm="norm_f"),
    "gpt2": Family(layers="h", norm="ln_f", adds_positions=True),
    "gpt_neox": Family(norm="final_layer_norm"),
    "jamba": Family(norm="final_layernorm"),
    "lfm2": Family(norm="embedding_norm"),
    "lfm2_moe": Family(norm="embedding_norm"),
    "mamba": Family(norm="norm_f"),
    "mamba2": Family(norm="norm_f"),
    "nemotron_h": Family(norm="norm_f"),
    "phi": Family(norm="final_layernorm"),
    "qwen3_5_moe_text": _QWEN_HYBRID,
    "qwen3_5_text": _QWEN_HYBRID,
    "qwen3_next": _QWEN_HYBRID,
}

# Rotations that depend on the longest position of a batch would let one request change another.
_BATCH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})
_ATTENTION_TYPES = frozenset({"full_attention", "sliding_attention"})


@dataclass(frozen=True)
class Anatomy:
    """The modules of a causal language model that this package uses.

    Attributes:
        architecture: class name of the model, for messages.
        config: configuration of the text model.
        family: its declared differences.
        decoder: maps token ids to the normed last hidden state.
        layers: decoder layers, in order.
        norm: final norm.
        embedding: input embedding.
        head: maps hidden states to logits, before the soft cap.
        logit_softcap: logits become `cap * tanh(logits / cap)`; None for no cap.
    """

    architecture: str
    config: Any
    family: Family
    decoder: nn.Module
    layers: nn.ModuleList
    norm: nn.Module
    embedding: nn.Embedding
    head: nn.Linear
    logit_softcap: float | None

    @property
    def embedding_scale(self) -> float:
        """The number that looked-up embeddings are multiplied by."""
        if not self.family.scaled_embedding:
            return 1.0
        scale = torch.tensor(float(self.config.hidden_size) ** 0.5)
        return float(scale.to(self.embedding.weight.dtype))

    @property
    def final_norm_H(self) -> Tensor | None:
        """What the final norm multiplies by [H]; None where it is not a plain scale."""
        named = dict(self.norm.named_parameters())
        if set(named) != {"weight"}:
            return None
        weight_H = named["weight"].detach()
        return weight_H + self.family.norm_offset if self.family.norm_offset else weight_H


class StateNeededError(CompatibilityError):
    """A model keeps more than the keys and values of its tokens, so that pages cannot hold it."""


def dissect(model: Any, *, ragged: bool = True) -> Anatomy:
    """Find the parts of a transformers causal language model.

    Args:
        model: the model.
        ragged: whether it is to run over pages; else through its own cache.

    Raises:
        StateNeededError: it cannot run over pages, by what its configuration says.
        CompatibilityError: the architecture is not laid out in a known way.
    """
    name = type(model).__name__
    config = model.config.get_text_config()
    if ragged:
        _refuse_config(name, config)
    family = FAMILIES.get(config.model_type, Family())
    decoder = model.get_decoder()
    children = dict(decoder.named_children())
    layers, norm = children.get(family.layers), children.get(family.norm)
    if not isinstance(layers, nn.ModuleList) or norm is None:
        raise CompatibilityError(
            f"{name} is not supported: its decoder has no layers {family.layers!r} and final norm "
            f"{family.norm!r}; declare the family {config.model_type!r} in targets/families.py."
        )
    embedding, head = decoder.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
        raise CompatibilityError(
            f"{name} is not supported: its input embedding is {type(embedding).__name__} and its "
            f"output head {type(head).__name__}; a plain embedding and linear head are needed."
        )
    cap = getattr(config, "final_logit_softcapping", None)
    return Anatomy(name, config, family, decoder, layers, norm, embedding, head, cap)


def _refuse_config(name: str, config: Any) -> None:
    kinds = set(getattr(config, "layer_types", None) or ()) - _ATTENTION_TYPES
    if kinds:
        raise StateNeededError(
            f"{name} is not supported: its layers of type {', '.join(sorted(kinds))} keep more "
            "than keys and values; use a target whose layers all use full or sliding attention."
        )
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {r.get("rope_type") for r in (rope, *rope.values()) if isinstance(r, dict)}
    if kinds & _BATCH_DEPENDENT_ROPE:
        found = ", ".join(sorted(kinds & _BATCH_DEPENDENT_ROPE))
        raise CompatibilityError(
            f"{name} is not supported: rotary embedding of type {found} depends on the longest "
            "request of a batch; use a checkpoint with another rope_type."
        )


def eos_token_ids(model: Any, anatomy: Anatomy) -> frozenset[int]:
    """End tokens of the generation settings and the configuration together."""
    found: set[int] = set()
    for config in (model.generation_config, model.config, anatomy.config):
        eos = getattr(config, "eos_token_id", None)
        found.update([eos] if isinstance(eos, int) else eos or ())
    return frozenset(found)
