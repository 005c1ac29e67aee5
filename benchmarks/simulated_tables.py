"""What simulated load costs: cost tables of some shapes, and noisy measurements of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from dspark.scheduling.cost_table import CostPoint, CostTable, MachineKey

SIMULATED = MachineKey("simulated", 1, "float32", "simulated", "simulated")


def table_of(
    verify_ms: Callable[[int], float],
    draft_ms: Callable[[int], float],
    *,
    drafts: int = 7,
    probes: tuple[int, ...] = (),
) -> CostTable:
    """A table of costs by tokens, probed for 1, 2, 4, ... 256 requests."""
    points = []
    for requests in 2 ** np.arange(9):
        most = int(requests) * (1 + drafts)
        spaced = np.unique(np.linspace(requests, most, 15).round().astype(int))
        tokens = {*map(int, spaced), *(t for t in probes if requests <= t <= most)}
        points += [
            CostPoint(t, int(requests), verify_ms(t), draft_ms(int(requests))) for t in tokens
        ]
    return CostTable(tuple(points), SIMULATED)


def noisy(table: CostTable, spread: float, seed: int) -> CostTable:
    """The table as a measurement would find it whose medians scatter so much."""
    generator = np.random.default_rng(seed)

    def measured(ms: float) -> float:
        return ms * float(np.exp(spread * generator.normal()))

    points = [
        replace(p, verify_ms=measured(p.verify_ms), draft_ms=measured(p.draft_ms))
        for p in table.points
    ]
    return CostTable(tuple(points), table.machine)


STAIRS = (8, 16, 32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)


def _stair_ms(tokens: int) -> float:
    tier = next(edge for edge in STAIRS if tokens <= edge)
    return 20 * float(np.hypot(1, tier / 160))


def tables() -> dict[str, CostTable]:
    """A smooth, a staircase and a flat table: milliseconds like a mid-sized target's."""

    def draft_ms(requests: int) -> float:
        return 2 + 0.01 * requests

    around = tuple(t for edge in STAIRS for t in (edge, edge + 1))
    return {
        "smooth": table_of(lambda t: 20 * float(np.hypot(1, t / 160)), draft_ms),
        "staircase": table_of(_stair_ms, draft_ms, probes=around),
        "flat": table_of(lambda t: 20 + t / 2000, draft_ms),
    }
