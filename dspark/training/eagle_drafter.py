"""Trains an Eagle3 or MTP-1 drafter online: its target runs in the step that uses its features."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from dspark.data.samples import SampleBatch
from dspark.drafters.eagle3 import Eagle3Config, Eagle3Drafter
from dspark.targets.target import Target
from dspark.training.features.samples import DTYPES, OnlineSamples, backbone_shapes, export
from dspark.training.losses.eagle3 import ChainRows, ttt_loss, ttt_passes
from dspark.training.recipe import ChainRecipe, Eagle3Recipe


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
    return Eagle3Config(
        backbone=backbone_shapes(
            target,
            num_layers=1,
            num_taps=len(taps),
            intermediate_size=recipe.drafter.intermediate_size,
            layers=recipe.drafter.layers,
        ),
        vocab_size=target.vocab_size,
        target_layer_ids=taps,
        num_target_layers=target.num_layers,
        ttt_length=passes,
        step_loss_decay=decay,
        max_position_embeddings=target.max_context,
        draft_vocab_size=recipe.drafter.draft_vocab_size,
    )


class Eagle3Objective:
    """The training-time test on a step's samples.

    Args:
        recipe: settings.
        target: frozen; embedding and head are borrowed, never copied.
    """

    def __init__(self, recipe: ChainRecipe, target: Target) -> None:
        self.recipe = recipe
        self.samples = OnlineSamples(recipe, target)
        self.drafter = Eagle3Drafter.from_target(
            target.parts(),
            eagle3_config(target, recipe),
            generator=torch.Generator().manual_seed(recipe.run.seed),
            init_std=recipe.drafter.init_std,
            copy_final_norm=recipe.drafter.copy_final_norm,
            draft_tokens=self.samples.draft_tokens,
        )
        self.drafter.to(dtype=DTYPES[recipe.run.dtype])
        self.module: nn.Module = self.drafter
        self.tokens_seen = 0
        self._counts = (-1, torch.zeros(0))

    def loss(self, step: int, part: int, parts: int) -> tuple[Tensor, dict[str, float]]:
        """Loss of one part of the step's samples.

        The mean over all parts is the loss of the whole step, however it is divided.
        """
        config = self.drafter.config
        samples, features_TF, hidden_TH = self.samples.part(step, part, parts, self.drafter.taps)
        batch = SampleBatch.of(samples)
        self.tokens_seen += sum(batch.lengths)
        chains = ChainRows.build(batch, config.ttt_length).to(features_TF.device)
        share_P = None
        if parts > 1:
            share_P = self._step_counts_P(step).to(features_TF.device) / parts
        report = ttt_loss(
            self.drafter,
            ttt_passes(self.drafter, features_TF, chains),
            hidden_TH,
            chains,
            decay=config.step_loss_decay,
            weights=self.recipe.loss.weights(),
            total_counts_P=share_P,
        )
        metrics = {
            "accepted_length": float(report.accepted_length),
            "epoch": self.samples.epoch(step),
        }
        rates = zip(report.ce_P.tolist(), report.accept_rate_P.tolist(), strict=True)
        for k, (ce, rate) in enumerate(rates, 1):
            metrics |= {f"ce_{k}": ce, f"accept_rate_{k}": rate}
        return report.loss, metrics

    def _step_counts_P(self, step: int) -> Tensor:
        """Supervised rows of each pass, of all parts."""
        if self._counts[0] != step:
            batch = SampleBatch.of(self.samples.batch(step))
            chains = ChainRows.build(batch, self.drafter.config.ttt_length)
            self._counts = (step, chains.counts_P)
        return self._counts[1]

    def export(self, directory: Path) -> None:
        """Write the drafter; see `online.export`."""
        export(self.drafter, self.recipe, directory)
