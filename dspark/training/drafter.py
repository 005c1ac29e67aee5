"""Trains a DSpark or DFlash drafter online: its target runs in the step that uses its features."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from dspark.data.samples import SampleBatch
from dspark.drafters.config import DSparkConfig
from dspark.drafters.dspark import DSparkDrafter
from dspark.targets.target import Target
from dspark.training.anchors import AnchorBlocks, attention_tiles, sample_anchors
from dspark.training.drafter_settings import BlockSettings, DFlashLossSettings, DSparkSettings
from dspark.training.losses import DFLASH_WEIGHTS, LossWeights, block_loss
from dspark.training.online import DTYPES, OnlineSamples, backbone_shapes, export, padded
from dspark.training.recipe import BlockRecipe


def drafter_config(target: Target, settings: BlockSettings) -> DSparkConfig:
    """The configuration of a new drafter: its target's shapes with a recipe's settings.

    Settings that are not DSpark's give a drafter without sequential and confidence heads: DFlash.

    Raises:
        CompatibilityError: the settings do not fit the target.
    """
    taps = settings.taps(target.num_layers)
    backbone = backbone_shapes(
        target,
        num_layers=settings.num_layers,
        num_taps=len(taps),
        intermediate_size=settings.intermediate_size,
    )
    mask = settings.mask_token_id
    config = DSparkConfig(
        backbone=backbone,
        vocab_size=target.vocab_size,
        block_size=settings.block_size,
        mask_token_id=find_mask_token(target) if mask is None else mask,
        target_layer_ids=taps,
        num_target_layers=target.num_layers,
        max_position_embeddings=target.max_context,
        sample_from_anchor=settings.sample_from_anchor,
        draft_vocab_size=settings.draft_vocab_size,
        markov_rank=0,
        confidence_head=False,
        confidence_head_with_markov=False,
    )
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

    def __init__(self, recipe: BlockRecipe, target: Target) -> None:
        self.recipe = recipe
        self.samples = OnlineSamples(recipe, target)
        generator = torch.Generator().manual_seed(recipe.run.seed)
        self.drafter = DSparkDrafter.from_target(
            target.parts(),
            drafter_config(target, recipe.drafter),
            generator=generator,
            init_std=recipe.drafter.init_std,
            copy_final_norm=recipe.drafter.copy_final_norm,
            draft_tokens=self.samples.draft_tokens,
        )
        self.drafter.to(dtype=DTYPES[recipe.run.dtype])
        self.module: nn.Module = self.drafter
        self.tokens_seen = 0

    def loss(self, step: int, part: int, parts: int) -> tuple[Tensor, dict[str, float]]:
        """Loss of one part of the step's samples."""
        samples, features_TF, hidden_TH = self.samples.part(step, part, parts, self.drafter.taps)
        batch = SampleBatch.of(samples, features_TF.device)
        features_BSF, hidden_BSH = padded(features_TF, samples), padded(hidden_TH, samples)
        self.tokens_seen += sum(batch.lengths)
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
            "epoch": self.samples.epoch(step),
        }
        for k, rate in enumerate(report.accept_rate_K.tolist(), 1):
            metrics[f"accept_rate_{k}"] = rate
        return report.loss, metrics

    def _weights(self, step: int) -> LossWeights:
        s = self.recipe.loss
        if isinstance(s, DFlashLossSettings):
            return replace(DFLASH_WEIGHTS, decay=s.decay)
        ce, tv = (s.ce + s.tv, 0.0) if step < s.ce_first_steps else (s.ce, s.tv)
        return LossWeights(ce, tv, s.confidence, s.decay, s.detach_confidence)

    def export(self, directory: Path) -> None:
        """Write the drafter; see `online.export`."""
        export(self.drafter, self.recipe, directory)
