"""What a feature cache takes of the disk, and how true its rows are.

Bytes are of the target's own answers, beside the 2 (T + 1) H + 6 a token of the published cache.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dspark.data.features.build import BuildReport
from dspark.data.features.cache import FeatureCache
from dspark.data.features.encoder import spread, target_features
from dspark.data.samples import Sample
from dspark.targets.target import Target
from dspark.training.drafters.samples import build_features
from dspark.training.recipe import DSparkRecipe, Recipe

QWEN3_4B = (2560, 5)  # H, T
FIDELITY_TOKENS = 4000


def caches(args: argparse.Namespace, folder: Path) -> dict[str, list[str]]:
    """By name, what of a recipe's features each cache to measure sets."""
    found = {}
    for spec in args.caches:
        where = ["features.source=cache", f"features.path={folder / 'cache'}-{spec}"]
        if spec == "bfloat16":
            found[spec] = [*where, "features.codec=bfloat16"]
        else:
            feature, teacher = spec.split("/")
            errors = [f"features.feature_error={feature}", f"features.teacher_error={teacher}"]
            found[spec] = [*where, *errors]
    return found


def size_of(target: Target, recipe: Recipe, args: argparse.Namespace) -> dict[str, Any]:
    """Build a cache: its bytes per token, of what, and beside the published one's."""
    assert isinstance(recipe, DSparkRecipe)
    assert recipe.features.path is not None
    started = time.process_time()
    report: BuildReport = build_features(recipe, device="cpu")
    seconds = time.process_time() - started
    cache = FeatureCache(Path(recipe.features.path))
    width, taps = cache.hidden_size, len(cache.taps)
    published = published_bytes(width, taps)
    head, features, teacher = cache.part_bytes()
    context = sum(record.num_context for record in cache.records)
    laws = sum(record.num_teacher for record in cache.records)
    bits = 8 * features / (context * taps * width), 8 * teacher / (laws * width)
    samples = list(cache.samples(args.max_length))
    started = time.process_time()
    for sample in samples:
        cache.rows(sample, target.device)
    read = time.process_time() - started
    return {
        "bytes_per_token": report.bytes / report.tokens,
        "published_bytes_per_token": published,
        "ratio": report.bytes / report.tokens / published,
        "tokens": report.tokens,
        "tokens_and_masks_bytes_per_token": head / report.tokens,
        "context_rows_per_token": context / report.tokens,
        "teacher_rows_per_token": laws / report.tokens,
        "feature_bits_per_number": bits[0],
        "teacher_bits_per_number": bits[1],
        "build_cpu_ms_per_1000_tokens": 1e6 * seconds / report.tokens,
        "read_cpu_ms_per_1000_tokens": 1e6 * read / report.tokens,
        **fidelity(target, cache, spread(samples, FIDELITY_TOKENS)),
        "qwen3_4b": qwen3_4b(bits, laws / report.tokens, recipe),
    }


def published_bytes(width: int, taps: int) -> int:
    """Bytes of a token in the published cache: features, last hidden states, id and mask."""
    return 2 * (taps + 1) * width + 6


def fidelity(target: Target, cache: FeatureCache, samples: Sequence[Sample]) -> dict[str, float]:
    """How far what is stored is from what the target computes."""
    errors, sizes, variation, rows = 0.0, 0.0, 0.0, 0
    for sample in samples:
        features_TF, hidden_TH = target_features(target, [sample], cache.taps)
        stored = cache.rows(sample, target.device)
        own_RF = stored.features_RPH.flatten(1).float()
        exact_RF = features_TF[: len(own_RF)].float()
        errors += float((own_RF - exact_RF).square().sum())
        sizes += float(exact_RF.square().sum())
        laws_MV, exact_MV = (
            target.logits(states.to(target.dtype)).float().softmax(-1)
            for states in (stored.teacher_MH, hidden_TH[stored.teacher_rows])
        )
        variation += 0.5 * float((laws_MV - exact_MV).abs().sum())
        rows += len(laws_MV)
    return {
        "feature_relative_error": math.sqrt(errors / sizes),
        "teacher_total_variation": variation / rows,
    }


def qwen3_4b(
    bits: tuple[float, float], laws_per_token: float, recipe: DSparkRecipe
) -> dict[str, float]:
    """Computed for Qwen3-4B's shapes: at these bits, and where every number is on its own.

    The latter: independent normal numbers, and a teacher row for every token.
    """
    width, taps = QWEN3_4B
    published = published_bytes(width, taps)
    here = width * (taps * bits[0] + laws_per_token * bits[1]) / 8
    if recipe.features.codec == "bfloat16":
        most = 2.0 * width * (taps + 1)
    else:
        errors = recipe.features.feature_error, recipe.features.teacher_error
        normal = [math.log2(math.sqrt(2 * math.pi * math.e / 12) / error) for error in errors]
        most = width * (taps * normal[0] + normal[1]) / 8
    return {
        "published_bytes_per_token": published,
        "ratio_at_these_bits": here / published,
        "ratio_of_independent_numbers": most / published,
    }
