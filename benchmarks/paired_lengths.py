"""Accepted lengths of two trainings, paired by seed and prompt."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from dspark.request import Stats

BOOTSTRAPS = 2000


def merged_length(rows: Sequence[Stats]) -> float:
    """Accepted length of many requests."""
    return sum(x.tokens for x in rows) / sum(x.rounds for x in rows)


def compare(
    ours: Sequence[Sequence[Stats]], base: Sequence[Sequence[Stats]], seed: int
) -> dict[str, Any]:
    """Accepted lengths by training seed, and the relative difference with its 95 % interval."""
    generator = random.Random(seed)
    seeds, prompts = len(base), len(base[0])

    def length(rows: Sequence[Sequence[Stats]], chosen: Sequence[tuple[int, int]]) -> float:
        return merged_length([rows[s][p] for s, p in chosen])

    def gain(chosen: Sequence[tuple[int, int]]) -> float:
        return length(ours, chosen) / length(base, chosen) - 1

    everything = [(s, p) for s in range(seeds) for p in range(prompts)]
    draws = []
    for _ in range(BOOTSTRAPS):
        some = [generator.randrange(prompts) for _ in range(prompts)]
        which = [generator.randrange(seeds) for _ in range(seeds)]
        draws.append(gain([(s, p) for s in which for p in some]))
    draws.sort()
    by_seed = [[(s, p) for p in range(prompts)] for s in range(seeds)]
    return {
        "online": [length(base, row) for row in by_seed],
        "cache": [length(ours, row) for row in by_seed],
        "relative_difference": gain(everything),
        "ci95": [draws[int(0.025 * BOOTSTRAPS)], draws[int(0.975 * BOOTSTRAPS)]],
    }
