"""The learning rate of a step, as a factor on its peak."""

from __future__ import annotations

import math

from dspark.training.run_settings import WSD_DECAY, OptimiserSettings


def warmup_steps(settings: OptimiserSettings, steps: int) -> int:
    """Steps over which the rate rises, at least 1: step 0 already moves."""
    return max(1, int(settings.warmup_fraction * steps))


def learning_rate_factor(settings: OptimiserSettings, step: int, steps: int) -> float:
    """Linear warm-up to 1, then what `settings.schedule` says.

    `cosine` and `linear` fall to 0 at `steps`, `constant` stays; `wsd` (warm-up, stable, decay) is
    constant until its last share of steps, over which it falls as 1 - sqrt(progress) (Hagele et
    al. 2024).

    Args:
        settings: the schedule and its shares.
        step: from 0.
        steps: of the whole run.
    """
    warm = warmup_steps(settings, steps)
    if step < warm:
        return (step + 1) / warm
    progress = min(1.0, (step - warm) / max(1, steps - warm))
    if settings.schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    if settings.schedule == "linear":
        return 1.0 - progress
    if settings.schedule == "wsd":
        decay = max(1, int((settings.decay_fraction or WSD_DECAY) * steps))
        return 1.0 - math.sqrt(min(1.0, max(0, step - (steps - decay)) / decay))
    return 1.0
