"""What training a drafter needs: samples, and the target's features of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dspark.data.features.reference import ReferenceCache
from dspark.data.features.rows import FeatureStore
from dspark.data.samples import Sample, SampleStream, read_samples, usable
from dspark.drafters.checkpoint import save_attached, save_published
from dspark.drafters.config import GEMMA4_PARTS, BackboneConfig
from dspark.drafters.registry import AnyDrafter
from dspark.errors import CompatibilityError, DataError, RecipeError
from dspark.targets.layerless import load_without_layers
from dspark.targets.target import Target
from dspark.training.drafters.held_out import without_held_out
from dspark.training.feature_opening import open_features, open_store
from dspark.training.recipe import BlockRecipe, ChainRecipe, DrafterRecipe
from dspark.training.settings import LayerFamily

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class OnlineSamples:
    """A recipe's samples, step by step, with what the frozen target makes of them.

    Args:
        recipe: says which samples, and how many a step has.
        target: frozen.

    Attributes:
        draft_tokens: token ids [Vd] of the recipe's reduced vocabulary, ascending; None for all.
        held_out: samples that are not trained on, for `evaluation.heldout`.
    """

    def __init__(self, recipe: BlockRecipe | ChainRecipe, target: Target) -> None:
        self.target = target
        self.rows = recipe.run.rows
        store = open_store(recipe)
        loaded = load_samples(recipe, target, store)
        samples, self.held_out = without_held_out(loaded, recipe.evaluation)
        self.source = open_features(recipe, target, loaded, store)
        self.stream = SampleStream(samples, self.rows, recipe.run.seed)
        known = recipe.drafter.draft_vocab_size
        self.draft_tokens = None if known is None else commonest_tokens(samples, known)

    def batch(self, step: int) -> list[Sample]:
        """All samples of a step, those of other parts and ranks included."""
        return self.stream.batch(step)

    def part(
        self, step: int, part: int, parts: int, taps: Sequence[int]
    ) -> tuple[list[Sample], Tensor, Tensor]:
        """One part of a step's samples.

        Returns:
            The samples, features [T, F] and states after the target's final norm [T, H]; T is the
            sum of the samples' lengths.
        """
        share = self.rows // parts
        mine = self.batch(step)[part * share : (part + 1) * share]
        return mine, *self.source.features(mine, taps)

    def epoch(self, step: int) -> float:
        """How often the samples have been seen before a step."""
        return step / self.stream.batches_per_epoch


def backbone_shapes(
    target: Target,
    *,
    num_layers: int,
    num_taps: int,
    intermediate_size: int | None,
    layers: LayerFamily = "qwen3",
) -> BackboneConfig:
    """Shapes of a new drafter's layers: the target's, where not given.

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
        **(gemma4_parts(target, rope) if layers == "gemma4" else {}),
    )


def gemma4_parts(target: Target, rope: Mapping[str, Any]) -> dict[str, Any]:
    """What sets Gemma4's global attention layers apart from Qwen3's (FORMAT_FACTS.md A.3).

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


def layer_config(target: Target) -> Any:
    """The configuration that a drafter's layers take after.

    The target's, or, where its layers differ in shape (Gemma4), that of its last layer that attends
    to everything, as all draft layers do (of its last one, where none does).
    """
    config = target.config
    by_layer = getattr(config, "per_layer_config", None)
    if not by_layer:
        return config
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * target.num_layers
    full = [i for i, kind in enumerate(kinds) if kind == "full_attention"]
    return by_layer[full[-1] if full else -1]


def load_samples(
    recipe: BlockRecipe | ChainRecipe, target: Target, store: FeatureStore | None = None
) -> list[Sample]:
    """The samples of a recipe's files, or those of a cache where it names none.

    Raises:
        DataError: a file is missing or malformed, or the samples are another model's.
        RecipeError: the samples are longer than the target's context, or named twice or not at all.
    """
    s = recipe.samples
    if s.max_length > target.max_context:
        raise RecipeError(
            f"samples.max_length is {s.max_length}, but the target's context holds "
            f"{target.max_context} tokens; set it to that at most."
        )
    found: list[Sample] = []
    if s.paths:
        if isinstance(store, ReferenceCache):
            raise RecipeError(
                f"samples.paths names files, but {store.directory} is a reference cache, which is "
                "trained on with its own samples; set samples.paths to []."
            )
        for path in s.paths:
            found += read_samples(Path(s.root) / path, target.tokenizer)
    elif store is None:
        raise RecipeError(
            "samples.paths is empty, which only a cache can make up for; name files, or set "
            "features.source and features.path to a cache that exists."
        )
    else:
        found = list(store.samples(s.max_length))
    kept = usable(found, s.max_length, s.min_supervised)
    largest = max((max(sample.input_ids) for sample in kept), default=-1)
    if largest >= target.vocab_size:
        raise DataError(
            f"The samples name token {largest}, but the target has {target.vocab_size} tokens; "
            "they were made for another model."
        )
    return kept


def commonest_tokens(samples: Sequence[Sample], count: int) -> Tensor:
    """The ids of the `count` tokens that answers hold most often, ascending.

    Of equally common tokens those of lower id; also where answers hold fewer than `count`.
    """
    rows = [zip(s.input_ids, s.loss_mask, strict=True) for s in samples]
    answers = [token for row in rows for token, counts in row if counts]
    times_V = torch.bincount(torch.tensor(answers), minlength=count)
    return times_V.sort(descending=True, stable=True).indices[:count].sort().values


def export(drafter: AnyDrafter, recipe: DrafterRecipe, directory: Path) -> None:
    """Write a trained drafter in bf16.

    In the published layout, or attached: to the target's directory where the recipe says so, to
    the run's own where the published layout has no place for something of the drafter (a learned
    mask embedding, slots that draft nothing, a reduced vocabulary).
    """
    if recipe.layout == "attached":
        save_attached(drafter, recipe.target)
        return
    try:
        save_published(drafter, directory)
    except CompatibilityError:
        save_attached(drafter, directory)


def load_frozen_target(recipe: DrafterRecipe, device: str, dtype: str) -> Target:
    """Load the recipe's target; without its layers where none of the run needs them.

    They are needed unless all features are read from a cache and no drafter is measured.
    """
    if recipe.features.source == "cache" and recipe.evaluation is None:
        return load_without_layers(recipe.target, device=device, dtype=dtype)
    return Target.load(recipe.target, device=device, dtype=dtype, weights="plain")


def with_plain_weights(target: Target, recipe: DrafterRecipe) -> Target:
    """The target itself, or where its layers have given up their weights to packed ones, another.

    Raises:
        CheckpointError: the recipe's target cannot be loaded.
    """
    if target.weights == "plain":
        return target
    return Target.load(recipe.target, device="cpu", dtype=target.dtype, weights="plain")
