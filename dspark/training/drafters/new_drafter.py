"""New drafters: their configuration, derived from the target, and the target that they need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dspark.drafters.config import GEMMA4_PARTS, BackboneConfig, DSparkConfig
from dspark.drafters.deepseek_v4 import DeepseekV4Config
from dspark.drafters.deepseek_v4_layers import DeepseekV4Layers
from dspark.drafters.eagle3 import Eagle3Config
from dspark.errors import CompatibilityError
from dspark.targets.layerless import load_without_layers
from dspark.targets.target import Target
from dspark.training.recipe import ChainRecipe, DrafterRecipe, Eagle3Recipe
from dspark.training.settings import BlockSettings, DSparkSettings, LayerFamily


def drafter_config(target: Target, settings: BlockSettings) -> DSparkConfig:
    """The configuration of a new drafter: its target's shapes with a recipe's settings.

    Settings that are not DSpark's give a drafter without sequential and confidence heads: DFlash.

    Raises:
        CompatibilityError: the settings do not fit the target.
    """
    if settings.layers == "llama":
        raise CompatibilityError(
            "drafter.layers is llama, which an Eagle3 may have; set it to qwen3."
        )
    taps = settings.taps(target.num_layers)
    mask = settings.mask_token_id
    shapes: dict[str, Any] = {
        "num_layers": settings.num_layers,
        "num_taps": len(taps),
        "intermediate_size": settings.intermediate_size,
    }
    common: dict[str, Any] = {
        "vocab_size": target.vocab_size,
        "block_size": settings.block_size,
        "mask_token_id": find_mask_token(target) if mask is None else mask,
        "target_layer_ids": taps,
        "num_target_layers": target.num_layers,
        "max_position_embeddings": target.max_context,
        "sample_from_anchor": settings.sample_from_anchor,
        "draft_vocab_size": settings.draft_vocab_size,
        "markov_rank": 0,
        "confidence_head": False,
        "confidence_head_with_markov": False,
    }
    config: DSparkConfig
    if settings.layers == "deepseek_v4":
        config = DeepseekV4Config(backbone=deepseek_v4_layers(target, **shapes), **common)
    else:
        layers = backbone_shapes(target, layers=settings.layers, **shapes)
        config = DSparkConfig(backbone=layers, **common)
    if not isinstance(settings, DSparkSettings):
        return config
    return replace(
        config,
        markov_rank=settings.markov_rank,
        markov_head_type=settings.markov_head_type,
        confidence_head=settings.confidence_head,
        confidence_head_with_markov=settings.confidence_head_with_markov
        and settings.markov_rank > 0,
    )


def find_mask_token(target: Target) -> int | None:
    """The token whose embedding fills a block.

    The tokenizer's mask token; else an id that the embedding has but the tokenizer does not use;
    else its unknown or padding token; else None, for a learned vector.
    """
    tokenizer = target.tokenizer
    if tokenizer is None:
        return None
    if tokenizer.mask_token_id is not None:
        return int(tokenizer.mask_token_id)
    if len(tokenizer) < target.vocab_size:
        return len(tokenizer)
    for token in (tokenizer.unk_token_id, tokenizer.pad_token_id):
        if token is not None:
            return int(token)
    return None


def eagle3_config(target: Target, recipe: ChainRecipe) -> Eagle3Config:
    """The configuration of a new drafter: its target's shapes with a recipe's settings.

    MTP-1 reads the last layer and runs one pass.

    Raises:
        CompatibilityError: the settings do not fit the target.
    """
    taps: tuple[int, ...] = (target.num_layers - 1,)
    passes, decay = 1, 1.0
    if isinstance(recipe, Eagle3Recipe):
        own = recipe.drafter
        taps = own.taps(target.num_layers)
        passes, decay = own.ttt_length, recipe.loss.step_loss_decay
    backbone = backbone_shapes(
        target,
        num_layers=1,
        num_taps=len(taps),
        intermediate_size=recipe.drafter.intermediate_size,
        layers=recipe.drafter.layers,
    )
    return Eagle3Config(
        backbone=replace(backbone, input_projection=recipe.drafter.input_projection),
        vocab_size=target.vocab_size,
        target_layer_ids=taps,
        num_target_layers=target.num_layers,
        ttt_length=passes,
        step_loss_decay=decay,
        max_position_embeddings=target.max_context,
        draft_vocab_size=recipe.drafter.draft_vocab_size,
    )


def backbone_shapes(
    target: Target,
    *,
    num_layers: int,
    num_taps: int,
    intermediate_size: int | None,
    layers: LayerFamily = "qwen3",
) -> BackboneConfig:
    """Shapes of a new drafter's layers: the target's unless given.

    Raises:
        CompatibilityError: Gemma4's layers are asked for another target.
    """
    config = layer_config(target)
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    heads = int(config.num_attention_heads)
    return BackboneConfig(
        hidden_size=target.hidden_size,
        intermediate_size=intermediate_size
        or int(getattr(config, "intermediate_size", None) or 4 * target.hidden_size),
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(config, "head_dim", None) or target.hidden_size // heads),
        num_taps=num_taps,
        rms_norm_eps=float(getattr(config, "rms_norm_eps", 1e-6)),
        rope_theta=float(rope.get("rope_theta", 10000.0)),
        query_key_norms=layers != "llama",
        **(gemma4_parts(target, rope) if layers == "gemma4" else {}),
    )


def gemma4_parts(target: Target, rope: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in which Gemma4's global attention layers differ from Qwen3's (transformers).

    Raises:
        CompatibilityError: the target has no such layers.
    """
    kind = str(getattr(target.config, "model_type", None))
    if not kind.startswith("gemma4"):
        raise CompatibilityError(
            f"drafter.layers is gemma4, but the target is a {kind} model; set it to qwen3."
        )
    return {
        **GEMMA4_PARTS,
        "value_from_key": bool(getattr(target.config, "attention_k_eq_v", False)),
        "rotary_fraction": float(rope.get("partial_rotary_factor", 1.0)),
    }


def deepseek_v4_layers(
    target: Target, *, num_layers: int, num_taps: int, intermediate_size: int | None
) -> DeepseekV4Layers:
    """Stages of a DeepSeek-V4 target's layers, without compression.

    Raises:
        CompatibilityError: the target has no such layers.
    """
    config = target.config
    kind = str(getattr(config, "model_type", None))
    if kind != "deepseek_v4":
        raise CompatibilityError(
            f"drafter.layers is deepseek_v4, but the target is a {kind} model; set it to qwen3."
        )
    alike = (
        "q_lora_rank", "o_lora_rank", "o_groups", "routed_scaling_factor", "swiglu_limit",
        "hc_mult", "hc_sinkhorn_iters", "hc_eps", "rms_norm_eps", "sliding_window", "hidden_size",
        "head_dim",
    )  # fmt: skip
    return DeepseekV4Layers(
        **{name: getattr(config, name) for name in alike},
        intermediate_size=intermediate_size or config.moe_intermediate_size,
        num_layers=num_layers,
        num_taps=num_taps,
        num_heads=config.num_attention_heads,
        num_kv_heads=1,
        rope_theta=float(config.rope_parameters["main"]["rope_theta"]),
        rope_head_dim=config.qk_rope_head_dim,
        sliding_layers=tuple(range(num_layers)),
        num_experts=config.n_routed_experts,
        experts_per_token=config.num_experts_per_tok,
    )


def layer_config(target: Target) -> Any:
    """The configuration that a drafter's layers follow.

    The target's, or, if its layers differ in shape (Gemma4), that of its last full-attention layer,
    since all draft layers attend to everything (of its last layer if none does).
    """
    config = target.config
    by_layer = getattr(config, "per_layer_config", None)
    if not by_layer:
        return config
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * target.num_layers
    full = [i for i, kind in enumerate(kinds) if kind == "full_attention"]
    return by_layer[full[-1] if full else -1]


def load_frozen_target(recipe: DrafterRecipe, device: str, dtype: str) -> Target:
    """Load the recipe's target, without its layers if the run does not need them.

    They are needed unless all features are read from a cache and no drafter is measured.
    """
    if recipe.features.source == "cache" and recipe.evaluation is None:
        return load_without_layers(recipe.target, device=device, dtype=dtype)
    return Target.load(recipe.target, device=device, dtype=dtype, weights="plain")


def with_plain_weights(target: Target, recipe: DrafterRecipe) -> Target:
    """The target itself, or a second copy if its layers hold packed weights only.

    Raises:
        CheckpointError: the recipe's target cannot be loaded.
    """
    if target.weights == "plain":
        return target
    return Target.load(recipe.target, device="cpu", dtype=target.dtype, weights="plain")
