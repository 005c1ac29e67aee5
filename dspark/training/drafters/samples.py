"""Samples of a drafter recipe with their target features, and builds of their feature cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dspark.data.features.build import BuildReport, Estimate, build_cache, mend, wanted_manifest
from dspark.data.features.cache import FeatureStore, ReferenceCache
from dspark.data.features.manifest import MANIFEST
from dspark.data.samples import Sample, SampleStream, read_samples, usable
from dspark.drafters.checkpoints.checkpoint import load_drafter
from dspark.errors import DataError, RecipeError
from dspark.targets.target import Target
from dspark.training.drafters.features import open_features, open_store, recipe_taps, sample_recipe
from dspark.training.parallel import pick_device, world_size
from dspark.training.recipe import BlockRecipe, ChainRecipe, DrafterRecipe
from dspark.training.settings import EvaluationSettings


class OnlineSamples:
    """A recipe's samples, step by step, with their target features.

    Args:
        recipe: names the samples and their number per step.
        target: frozen.

    Attributes:
        draft_tokens: token ids [Vd] of the recipe's reduced vocabulary, ascending; None for all.
        held_out: samples excluded from training, for `evaluation.heldout`.
        passes: of this process over the rows that teach, in the whole run; 0 where features are
            computed each time, which gives other last bits in other company.
    """

    def __init__(self, recipe: BlockRecipe | ChainRecipe, target: Target) -> None:
        self.target = target
        self.rows = recipe.run.rows
        store = open_store(recipe)
        loaded = load_samples(recipe, target, store)
        samples, self.held_out = without_held_out(loaded, recipe.evaluation)
        self.source = open_features(recipe, target, loaded, store)
        self.stream = SampleStream(samples, self.rows, recipe.run.seed)
        self.draft_tokens = reduced_vocabulary(recipe, samples)
        self.passes = self._passes(recipe)

    def _passes(self, recipe: BlockRecipe | ChainRecipe) -> float:
        if recipe.features.source == "online":
            return 0.0
        run, samples = recipe.run, self.stream.samples
        passes = run.epochs or self.epoch(run.steps or 0)
        if isinstance(recipe, BlockRecipe):
            tokens = sum(sample.num_supervised for sample in samples) / len(samples)
            taught = recipe.samples.num_anchors * recipe.drafter.block_size
            passes *= min(taught / max(tokens, 1.0), 1.0)
        return passes / world_size()

    def batch(self, step: int) -> list[Sample]:
        """All samples of a step, including those of other parts and ranks."""
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
        """Passes over the samples before a step."""
        return step / self.stream.batches_per_epoch


def load_samples(
    recipe: BlockRecipe | ChainRecipe, target: Target, store: FeatureStore | None = None
) -> list[Sample]:
    """The samples of a recipe's files, or those of a cache if it names none.

    Raises:
        DataError: a file is missing or malformed, or the samples are another model's.
        RecipeError: the samples exceed the target's context, or are named twice or not at all.
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


def reduced_vocabulary(
    recipe: BlockRecipe | ChainRecipe, samples: Sequence[Sample]
) -> Tensor | None:
    """The token ids [Vd] that a recipe's drafter can propose, ascending; None for all.

    Those of the checkpoint that it starts from, so that training can go on with other samples;
    without one, the samples' commonest.
    """
    known = recipe.drafter.draft_vocab_size
    if known is None:
        return None
    if recipe.initial is not None:
        offsets: Tensor | None = getattr(load_drafter(recipe.initial), "d2t", None)
        if offsets is not None and offsets.numel() == known:
            return offsets + torch.arange(known)
    return commonest_tokens(samples, known)


def commonest_tokens(samples: Sequence[Sample], count: int) -> Tensor:
    """The ids of the `count` most frequent answer tokens, ascending.

    Ties, and unseen tokens if answers hold fewer than `count`, go to lower ids.
    """
    rows = [zip(s.input_ids, s.loss_mask, strict=True) for s in samples]
    answers = [token for row in rows for token, counts in row if counts]
    times_V = torch.bincount(torch.tensor(answers), minlength=count)
    return times_V.sort(descending=True, stable=True).indices[:count].sort().values


def build_features(
    recipe: DrafterRecipe,
    *,
    device: str = "auto",
    target: Target | None = None,
    announce: Callable[[Estimate], None] = lambda _: None,
    progress: Callable[[int, int], None] = lambda _, __: None,
) -> BuildReport:
    """Add the recipe's missing samples to its cache.

    Args:
        recipe: with `features.path`.
        device: overrides the recipe's device unless `auto`.
        target: if already in memory.
        announce: called with the estimate before the work starts.
        progress: called with (tokens done, tokens in all).

    Raises:
        CheckpointError, CompatibilityError: the target cannot be loaded.
        DataError: as `data.features.build.build_cache`.
        RecipeError: the recipe names no samples.
    """
    assert isinstance(recipe, BlockRecipe | ChainRecipe)
    assert recipe.features.path is not None
    if not recipe.samples.paths:
        raise RecipeError("samples.paths is empty, but a cache is built of samples; name files.")
    place = pick_device(recipe.run.device if device == "auto" else device)
    target = target or Target.load(
        recipe.target, device=place, dtype=recipe.run.dtype, weights="plain"
    )
    samples = load_samples(recipe, target)
    if not samples:
        raise RecipeError(
            f"samples.paths holds no sample with {recipe.samples.min_supervised} answer tokens; "
            "lower samples.min_supervised or name other files."
        )
    wanted = wanted_manifest(
        target,
        recipe.target,
        recipe_taps(recipe, target.num_layers),
        sample_recipe(recipe, samples),
        recipe.features.coding,
    )
    return build_cache(
        Path(recipe.features.path),
        wanted,
        target,
        samples,
        tokens_per_forward=recipe.features.tokens_per_forward,
        max_bytes=recipe.features.max_bytes,
        announce=announce,
        progress=progress,
    )


def mend_features(recipe: DrafterRecipe) -> int:
    """Drop the damaged samples of the recipe's cache, if any, and return their number.

    Raises:
        DataError: the cache's manifest is damaged.
    """
    assert recipe.features.path is not None
    directory = Path(recipe.features.path)
    return mend(directory) if (directory / MANIFEST).is_file() else 0


def without_held_out(
    samples: list[Sample], settings: EvaluationSettings | None
) -> tuple[list[Sample], list[Sample]]:
    """Split samples into training samples and those whose prompts are held out.

    Raises:
        RecipeError: no training sample would remain.
    """
    count = 0 if settings is None else settings.heldout or 0
    if count >= len(samples) > 0:
        raise RecipeError(
            f"evaluation.heldout is {count}, but there are {len(samples)} usable samples; hold out "
            "fewer."
        )
    return samples[: len(samples) - count], samples[len(samples) - count :]
