"""Synthetic traffic: confidences of requests that come and go, and what would be accepted.

Confidences follow Beta laws around a mean that differs between requests and wanders from round to
round; outcomes are drawn from them, so they are calibrated.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dspark.scheduling.survival import confidence, survival

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
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


def record_of(
    traffic: Traffic,
    requests: int,
    drafts: int,
    rounds: int,
    seed: int,
    slope_K: FloatArray | None = None,
) -> Record:
    """Draw a record.

    Args:
        traffic: its laws.
        requests: R, which run at once.
        drafts: K.
        rounds: T.
        seed: of all randomness.
        slope_K: logits of each position beside the first's; None lets them fall by .08 a position.
    """
    generator = np.random.default_rng((seed, requests, drafts))
    if slope_K is None:
        slope_K = -0.08 * np.arange(drafts, dtype=np.float64)
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
