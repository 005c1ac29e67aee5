"""Objectives of drafter training: block drafters (DSpark, DFlash) and chains (Eagle3, MTP-1).

Also the real accepted length of a drafter during training, on held-out prompts decoded by the
engine: a training step reports an expectation under the prefixes of the true tokens; decoding
measures how much is accepted when the drafter continues its own drafts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from dspark.data.conversations import Prompt
from dspark.data.samples import Sample, SampleBatch
from dspark.drafters.checkpoints.checkpoint import save, save_attached
from dspark.drafters.checkpoints.registry import AnyDrafter
from dspark.drafters.deepseek_v4 import DeepseekV4Config, DeepseekV4Drafter
from dspark.drafters.dspark import DSparkDrafter
from dspark.drafters.eagle3 import Eagle3Drafter
from dspark.errors import CompatibilityError
from dspark.request import Request, SamplingParams, Stats
from dspark.targets.target import Target
from dspark.training.drafters.new_drafter import drafter_config, eagle3_config, with_plain_weights
from dspark.training.drafters.samples import OnlineSamples
from dspark.training.drafters.warm_start import start_from_last_layers
from dspark.training.losses.blocks import AnchorBlocks, block_loss, position_weights, sample_anchors
from dspark.training.losses.eagle3 import ChainRows, ttt_loss, ttt_passes
from dspark.training.losses.totals import LogTotals
from dspark.training.parallel import sum_numbers
from dspark.training.recipe import BlockRecipe, ChainRecipe, DrafterRecipe
from dspark.training.settings import DTYPES, EvaluationSettings


class DrafterObjective:
    """The block drafters' losses (eqs. 9-12) on random anchors of a step's samples.

    Args:
        recipe: settings.
        target: frozen; embedding and head are borrowed, never copied.
        drafter: to train, bound and in the recipe's dtype; None makes the recipe's.
    """

    def __init__(
        self, recipe: BlockRecipe, target: Target, drafter: DSparkDrafter | None = None
    ) -> None:
        self.recipe = recipe
        self.samples = OnlineSamples(recipe, target)
        self.drafter = self._new_drafter(target) if drafter is None else drafter
        self.module: nn.Module = self.drafter
        self.tokens_seen = 0
        self._log_totals = LogTotals(self.drafter, self.samples.passes)
        self._total_weight = (-1, 0.0)

    def _new_drafter(self, target: Target) -> DSparkDrafter:
        recipe = self.recipe
        config = drafter_config(target, recipe.drafter)
        made = DeepseekV4Drafter if isinstance(config, DeepseekV4Config) else DSparkDrafter
        drafter: DSparkDrafter = made.from_target(
            target.parts(),
            config,
            generator=torch.Generator().manual_seed(recipe.run.seed),
            init_std=recipe.drafter.init_std,
            copy_final_norm=recipe.drafter.copy_final_norm,
            draft_tokens=self.samples.draft_tokens,
        )
        if recipe.drafter.initial_layers == "target":
            start_from_last_layers(drafter, with_plain_weights(target, recipe))
        return drafter.to(dtype=DTYPES[recipe.run.dtype])

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
            self.drafter,
            hidden_MKH,
            hidden_TH,
            blocks,
            weights,
            total_weight=share,
            log_total_T=self._log_totals.of(samples, hidden_TH),
        )
        names = ["accepted_length", "ce", "tv", "confidence"]
        names += ["kl"] if weights.kl or weights.lk_hybrid else []
        names += ["lk"] if weights.lk else []
        metrics = {name: float(getattr(report, name)) for name in names}
        metrics["epoch"] = self.samples.epoch(step)
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
        """Sum of the position weights of all parts, known to every rank without communication."""
        if self._total_weight[0] != step:
            blocks = self._blocks(SampleBatch.of(self.samples.batch(step)), step, 0)
            self._total_weight = (step, float(position_weights(blocks, decay).sum()))
        return self._total_weight[1]

    def export(self, directory: Path) -> None:
        """Write the drafter; see `export`."""
        export(self.drafter, self.recipe, directory)


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
        self._log_totals = LogTotals(self.drafter, self.samples.passes)
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
            log_total_T=self._log_totals.of(samples, hidden_TH),
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
        """Write the drafter; see `export`."""
        export(self.drafter, self.recipe, directory)


def export(drafter: AnyDrafter, recipe: DrafterRecipe, directory: Path) -> None:
    """Write a trained drafter in bf16.

    In the published layout, or attached: to the target's directory if the recipe says so, to the
    run's own if the published layout cannot represent the drafter (a learned mask embedding, slots
    that draft nothing, a reduced vocabulary).
    """
    if recipe.layout == "attached":
        save_attached(drafter, recipe.target)
        return
    try:
        save(drafter, directory)
    except CompatibilityError:
        save_attached(drafter, directory)


Decode = Callable[[Target, AnyDrafter, Sequence[Request]], Stats]
"""Decodes requests with a drafter by the engine and returns counts."""

Encode = Callable[[Target, Sequence[Prompt]], Sequence[Sequence[int]]]
"""Token ids of prompts, encoded as in serving."""


@dataclass(frozen=True)
class HeldOut:
    """A measurement of the drafter being trained.

    Attributes:
        target: frozen.
        drafter: bound.
        requests: at temperature 0, each with its own seed.
        temperatures: to decode them at, one after the other.
        decode: by the engine.
        rank, ranks: of the processes, which share the requests.
    """

    target: Target
    drafter: AnyDrafter
    requests: Sequence[Request]
    temperatures: Sequence[float]
    decode: Decode
    rank: int
    ranks: int

    def measure(self) -> Mapping[str, float]:
        """Accepted length by temperature, `real_accepted_length_t0` and so on, and their mean."""
        self.drafter.eval()
        found: dict[str, float] = {}
        for temperature in self.temperatures:
            mine = [
                Request(r.prompt_ids, replace(r.params, temperature=temperature))
                for r in self.requests[self.rank :: self.ranks]
            ]
            stats = self.decode(self.target, self.drafter, mine) if mine else Stats()
            both = sum_numbers({"tokens": stats.tokens, "rounds": stats.rounds})
            length = both["tokens"] / max(both["rounds"], 1.0)
            found[f"real_accepted_length_t{temperature:g}"] = length
        self.drafter.train()
        return {"real_accepted_length": sum(found.values()) / len(found), **found}


def requests_of(prompts: Sequence[Sequence[int]], settings: EvaluationSettings) -> list[Request]:
    """The requests of an evaluation.

    Args:
        prompts: token ids.
        settings: how many, and how long.
    """
    return [
        Request(tuple(ids), SamplingParams(settings.max_new_tokens, seed=seed))
        for seed, ids in enumerate(prompts[: settings.limit])
    ]


def prompts_of(samples: Sequence[Sample]) -> list[tuple[int, ...]]:
    """Token ids before each sample's first answer."""
    firsts = [sample.loss_mask.index(True) for sample in samples]
    return [s.input_ids[:first] for s, first in zip(samples, firsts, strict=True) if first]
