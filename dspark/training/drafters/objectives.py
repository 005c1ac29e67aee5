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
from dspark.training.anchors import AnchorBlocks, sample_anchors
from dspark.training.drafters.new_drafter import start_from_last_layers
from dspark.training.features.samples import (
    DTYPES,
    OnlineSamples,
    backbone_shapes,
    export,
    with_plain_weights,
)
from dspark.training.losses.blocks import block_loss, position_weights
from dspark.training.recipe import BlockRecipe
from dspark.training.settings import BlockSettings, DSparkSettings


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
        layers=settings.layers,
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
        if recipe.drafter.initial_layers == "target":
            start_from_last_layers(self.drafter, with_plain_weights(target, recipe))
        self.drafter.to(dtype=DTYPES[recipe.run.dtype])
        self.module: nn.Module = self.drafter
        self.tokens_seen = 0
        self._total_weight = (-1, 0.0)

    def loss(self, step: int, part: int, parts: int) -> tuple[Tensor, dict[str, float]]:
        """Loss of one part of the step's samples.

        The mean over all parts is the loss of the whole step, however it is divided: each slot has
        the same weight, and each sample's anchors are its own.
        """
        samples, features_TF, hidden_TH = self.samples.part(step, part, parts, self.drafter.taps)
        batch, weights = SampleBatch.of(samples), self.recipe.loss.weights(step)
        self.tokens_seen += sum(batch.lengths)
        device = features_TF.device
        blocks = self._blocks(batch, step, part * len(samples)).to(device)
        hidden_MKH = self.drafter(
            features_TF,
            batch.positions_T.to(device),
            blocks.tokens_M,
            blocks.positions_MK,
            blocks.layout(self.drafter.config.block_size),
        )
        share = None if parts == 1 else self._step_weight(step, weights.decay) / parts
        report = block_loss(
            self.drafter, hidden_MKH, hidden_TH, blocks, weights, total_weight=share
        )
        metrics = {
            "accepted_length": float(report.accepted_length),
            "ce": float(report.ce),
            "tv": float(report.tv),
            "confidence": float(report.confidence),
            "epoch": self.samples.epoch(step),
        }
        metrics |= {"kl": float(report.kl)} if weights.kl or weights.lk_hybrid else {}
        metrics |= {"lk": float(report.lk)} if weights.lk else {}
        for k, rate in enumerate(report.accept_rate_K.tolist(), 1):
            metrics[f"accept_rate_{k}"] = rate
        return report.loss, metrics

    def _blocks(self, batch: SampleBatch, step: int, first: int) -> AnchorBlocks:
        """The blocks of a step's samples from the `first` on."""
        run = self.recipe.run
        seeds = [(run.seed * 1_000_003 + step) * run.rows + first + i for i in range(len(batch))]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        anchors_M = sample_anchors(batch, self.recipe.samples.num_anchors, generators)
        return AnchorBlocks.build(batch, anchors_M, self.drafter.block_size)

    def _step_weight(self, step: int, decay: float) -> float:
        """Sum of the position weights of all parts: known to each, so that no rank need ask."""
        if self._total_weight[0] != step:
            blocks = self._blocks(SampleBatch.of(self.samples.batch(step)), step, 0)
            self._total_weight = (step, float(position_weights(blocks, decay).sum()))
        return self._total_weight[1]

    def export(self, directory: Path) -> None:
        """Write the drafter; see `online.export`."""
        export(self.drafter, self.recipe, directory)
