"""Trains a DSpark drafter online: the target's features are computed in the step that uses them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dspark.attention.layout import RaggedBatch
from dspark.data.samples import Sample, SampleBatch, SampleStream, read_samples, usable
from dspark.drafters.checkpoint import save_attached, save_published
from dspark.drafters.config import BackboneConfig, DSparkConfig, evenly_spaced_taps
from dspark.drafters.dspark import DSparkDrafter
from dspark.errors import DataError, RecipeError
from dspark.targets.target import Target
from dspark.training.anchors import AnchorBlocks, attention_tiles, sample_anchors
from dspark.training.losses import LossWeights, block_loss
from dspark.training.recipe import DrafterRecipe, DrafterSettings

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def drafter_config(target: Target, settings: DrafterSettings) -> DSparkConfig:
    """The configuration of a new drafter: its target's shapes with a recipe's settings.

    Raises:
        CompatibilityError: the settings do not fit the target.
    """
    config = layer_config(target)
    taps = settings.target_layer_ids or evenly_spaced_taps(target.num_layers, settings.num_taps)
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    heads = int(config.num_attention_heads)
    backbone = BackboneConfig(
        hidden_size=target.hidden_size,
        intermediate_size=settings.intermediate_size
        or int(getattr(config, "intermediate_size", None) or 4 * target.hidden_size),
        num_layers=settings.num_layers,
        num_heads=heads,
        num_kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(config, "head_dim", None) or target.hidden_size // heads),
        num_taps=len(taps),
        rms_norm_eps=float(getattr(config, "rms_norm_eps", 1e-6)),
        rope_theta=float(rope.get("rope_theta", 10000.0)),
    )
    mask = settings.mask_token_id
    return DSparkConfig(
        backbone=backbone,
        vocab_size=target.vocab_size,
        block_size=settings.block_size,
        mask_token_id=find_mask_token(target) if mask is None else mask,
        target_layer_ids=tuple(taps),
        num_target_layers=target.num_layers,
        markov_rank=settings.markov_rank,
        markov_head_type=settings.markov_head_type,
        confidence_head=settings.confidence_head,
        confidence_head_with_markov=settings.confidence_head_with_markov
        and settings.markov_rank > 0,
        max_position_embeddings=target.max_context,
    )


def layer_config(target: Target) -> Any:
    """The configuration that a drafter's layers take after.

    The target's, or, where its layers differ in shape (Gemma4), that of its last layer that attends
    to everything, as all draft layers do.
    """
    config = target.config
    by_layer = getattr(config, "per_layer_config", None)
    if not by_layer:
        return config
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * target.num_layers
    return by_layer[max(i for i, kind in enumerate(kinds) if kind == "full_attention")]


def find_mask_token(target: Target) -> int | None:
    """A token whose embedding may fill a block.

    The tokenizer's mask token; else an id that the tokenizer does not use and the embedding has;
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


class DrafterObjective:
    """The losses of METHOD.md 3 on random anchors of a step's samples.

    Args:
        recipe: settings.
        target: frozen; embedding and head are borrowed, never copied.
    """

    def __init__(self, recipe: DrafterRecipe, target: Target) -> None:
        self.recipe = recipe
        self.target = target
        self.samples = _load_samples(recipe, target)
        self.stream = SampleStream(self.samples, recipe.run.rows, recipe.run.seed)
        generator = torch.Generator().manual_seed(recipe.run.seed)
        self.drafter = DSparkDrafter.from_target(
            target.parts(),
            drafter_config(target, recipe.drafter),
            generator=generator,
            init_std=recipe.drafter.init_std,
            copy_final_norm=recipe.drafter.copy_final_norm,
        )
        self.drafter.to(dtype=DTYPES[recipe.run.dtype])
        self.module: nn.Module = self.drafter
        self.tokens_seen = 0

    def loss(self, step: int, part: int, parts: int) -> tuple[Tensor, dict[str, float]]:
        """Loss of one part of the step's samples."""
        share = self.recipe.run.rows // parts
        mine = self.stream.batch(step)[part * share : (part + 1) * share]
        self.tokens_seen += sum(len(sample.input_ids) for sample in mine)
        batch = SampleBatch.of(mine, self.target.device)
        features_BSF, hidden_BSH = target_features(self.target, mine, self.drafter.taps)
        generator = torch.Generator().manual_seed(
            (self.recipe.run.seed * 1_000_003 + step) * parts + part
        )
        anchors_BN, keep_BN = sample_anchors(
            batch.loss_mask_BS, self.recipe.samples.num_anchors, generator
        )
        blocks = AnchorBlocks.build(
            batch.input_ids_BS, batch.loss_mask_BS, anchors_BN, keep_BN, self.drafter.block_size
        )
        hidden = self.drafter(
            features_BSF,
            blocks.tokens_BN,
            blocks.positions_BNK,
            attention_tiles(
                blocks,
                batch.input_ids_BS.shape[1],
                block_slots=self.drafter.config.block_size,
            ),
        )
        report = block_loss(self.drafter, hidden, hidden_BSH, blocks, self._weights(step))
        metrics = {
            "accepted_length": float(report.accepted_length),
            "ce": float(report.ce),
            "tv": float(report.tv),
            "confidence": float(report.confidence),
            "epoch": step / self.stream.batches_per_epoch,
        }
        for k, rate in enumerate(report.accept_rate_K.tolist(), 1):
            metrics[f"accept_rate_{k}"] = rate
        return report.loss, metrics

    def _weights(self, step: int) -> LossWeights:
        s = self.recipe.loss
        ce, tv = (s.ce + s.tv, 0.0) if step < s.ce_first_steps else (s.ce, s.tv)
        return LossWeights(ce, tv, s.confidence, s.decay, s.detach_confidence)

    def export(self, directory: Path) -> None:
        """Write the drafter in bf16.

        In the published layout, or attached: to the target's directory where the recipe says so,
        to the run's own where a learned mask embedding has no place in the published layout.
        """
        if self.recipe.layout == "attached":
            save_attached(self.drafter, self.recipe.target)
        elif self.drafter.mask_embedding is not None:
            save_attached(self.drafter, directory)
        else:
            save_published(self.drafter, directory)


def _load_samples(recipe: DrafterRecipe, target: Target) -> list[Sample]:
    s = recipe.samples
    if s.max_length > target.max_context:
        raise RecipeError(
            f"samples.max_length is {s.max_length}, but the target's context holds "
            f"{target.max_context} tokens; set it to that at most."
        )
    found: list[Sample] = []
    for path in s.paths:
        found += read_samples(Path(s.root) / path, target.tokenizer)
    kept = usable(found, s.max_length, s.min_supervised)
    largest = max((max(sample.input_ids) for sample in kept), default=-1)
    if largest >= target.vocab_size:
        raise DataError(
            f"The samples name token {largest}, but the target has {target.vocab_size} tokens; "
            "they were made for another model."
        )
    return kept


@torch.no_grad()
def target_features(
    target: Target, samples: Sequence[Sample], taps: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Run the target over samples and pad what it gives.

    Returns:
        Features [B, S, F] of the taps, and states after the final norm [B, S, H]; 0 in the
        padding.
    """
    batch = RaggedBatch.build([(i, 0, s.input_ids) for i, s in enumerate(samples)], target.device)
    output = target.forward(batch, taps=taps)
    assert output.features_TF is not None
    longest = max(len(s.input_ids) for s in samples)
    padded: list[Tensor] = []
    for rows in (output.features_TF, output.hidden_TH):
        table = rows.new_zeros(len(samples), longest, rows.shape[1])
        table[batch.slots_T, batch.positions_T] = rows
        padded.append(table)
    return padded[0], padded[1]


def load_frozen_target(recipe: DrafterRecipe, device: str, dtype: str) -> Target:
    """Load the recipe's target."""
    options: dict[str, Any] = {"device": device, "dtype": dtype}
    return Target.load(recipe.target, **options)
