"""What is offered under simulated load, and what it costs: traffic, its records, cost tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from dspark.scheduling.cost_table import CostPoint, CostTable, MachineKey
from dspark.scheduling.survival import confidence, survival

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
SIMULATED = MachineKey("simulated", 1, "float32", "simulated", "simulated")
FAILING = 0.3


@dataclass(frozen=True)
class Traffic:
    """What drafters are offered: how easy texts are, and how that changes.

    Attributes:
        ease: mean logit of a confidence.
        between: its standard deviation between requests.
        within: its standard deviation between rounds of a request.
        persistence: correlation of one round with the next.
        sharpness: of the Beta law of confidences around their mean; more is narrower.
        life: mean rounds of a request.
        failing: share of requests of whose drafts, whatever their confidences claim, each stays
            only 0.3 times as often.
    """

    ease: float = 1.3
    between: float = 0.8
    within: float = 0.7
    persistence: float = 0.8
    sharpness: float = 5.0
    life: float = 60.0
    failing: float = 0.0


TRAFFIC = {
    "mixed": Traffic(),
    "easy": Traffic(ease=2.5),
    "hard": Traffic(ease=-0.3),
}


@dataclass(frozen=True)
class Record:
    """Rounds of a load.

    Attributes:
        survival_TRK: calibrated survivals.
        claimed_TRK: survivals as the drafter claims them: the same where nobody fails.
        accepted_TR: how many drafts would stay if all were verified.
        generation_TR: which request of its slot runs.
    """

    survival_TRK: FloatArray
    claimed_TRK: FloatArray
    accepted_TR: IntArray
    generation_TR: IntArray


def record_of(traffic: Traffic, requests: int, drafts: int, rounds: int, seed: int) -> Record:
    """Draw a record."""
    generator = np.random.default_rng((seed, requests, drafts))
    slope_K = -0.08 * np.arange(drafts)
    ease_R = generator.normal(traffic.ease, traffic.between, requests)
    swing_R = generator.normal(0, traffic.within, requests)
    generation_R = np.zeros(requests, dtype=np.int64)
    honesty_R = np.where(generator.random(requests) < traffic.failing, FAILING, 1.0)
    survivals, claimed, accepted, generations = [], [], [], []
    for _ in range(rounds):
        new_R = generator.random(requests) < 1 / traffic.life
        generation_R = generation_R + new_R
        ease_R = np.where(new_R, generator.normal(traffic.ease, traffic.between, requests), ease_R)
        if traffic.failing:
            fails_R = generator.random(requests) < traffic.failing
            honesty_R = np.where(new_R, np.where(fails_R, FAILING, 1.0), honesty_R)
        noise_R = generator.normal(0, traffic.within, requests)
        swing_R = traffic.persistence * swing_R + np.sqrt(1 - traffic.persistence**2) * noise_R
        mean_RK = confidence((ease_R + swing_R)[:, None] + slope_K)
        confidence_RK = generator.beta(
            traffic.sharpness * mean_RK, traffic.sharpness * (1 - mean_RK)
        )
        true_RK = confidence_RK * honesty_R[:, None]
        stays_RK = generator.random((requests, drafts)) < true_RK
        survivals.append(survival(true_RK))
        claimed.append(survival(confidence_RK))
        accepted.append(np.logical_and.accumulate(stays_RK, axis=1).sum(axis=1))
        generations.append(generation_R)
    return Record(*map(np.array, (survivals, claimed, accepted, generations)))


def expected_survival_of(traffic: Traffic, drafts: int, seed: int) -> FloatArray:
    """Mean survivals [K] of other requests of this traffic, as calibration has them."""
    mean_K: FloatArray = record_of(traffic, 64, drafts, 100, seed).survival_TRK.mean(axis=(0, 1))
    return mean_K


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
