"""Confidences for drafters without a head: an online logistic on the margin of the draft's logits.

A draft's margin is the gap of the two largest raw logits of its row. Two parameters turn it into
the chance that the draft stays, and keep learning from finished rounds (docs/scheduling.md).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from dspark.errors import NumericsError, UsageError

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
LARGEST_MARGIN = 100.0


def observed(
    margins_RK: npt.ArrayLike, accepted_R: npt.ArrayLike, verified_R: npt.ArrayLike
) -> tuple[FloatArray, BoolArray]:
    """The drafts of finished rounds whose own fate is known, and whether they stayed.

    Position k is known if all before it stayed and it was verified. Under the block rule give
    only rounds in which every draft was verified, because trimming changes its earlier tests.
    Leave out requests with penalties or constraints: their distributions are not the drafter's.

    Args:
        margins_RK: margins of every offered draft.
        accepted_R: drafts that stayed.
        verified_R: drafts that were verified.

    Returns:
        [N] margins and [N] outcomes.
    """
    margins = np.asarray(margins_RK, dtype=np.float64)
    accepted_R1 = np.asarray(accepted_R, dtype=np.int64)[:, None]
    places_K = np.arange(margins.shape[1])
    known_RK = (places_K <= accepted_R1) & (places_K < np.asarray(verified_R)[:, None])
    return margins[known_RK], (places_K < accepted_R1)[known_RK]


@dataclass(eq=False)
class OnlineLogistic:
    """c = sigmoid(slope * margin + intercept), fitted by online Newton steps.

    One state serves all requests. What it learns from must be finished rounds, so that lengths
    depend on nothing that this round decides (docs/method.md, scheduling rule 7).

    Attributes:
        slope: of the margin, never negative, so that order is kept.
        intercept: logit of a draft without margin.
        half_life: drafts after which what was learned weighs half.
    """

    slope: float = 1.0
    intercept: float = 0.0
    half_life: float = 20_000.0
    _information: FloatArray = field(default_factory=lambda: np.zeros((2, 2)), repr=False)

    def apply(self, margins_RK: npt.ArrayLike) -> FloatArray:
        """Logits of c from margins, in any shape; they never fall as the margin grows.

        Raises:
            NumericsError: a margin is NaN.
        """
        return self.slope * _clipped(margins_RK) + self.intercept

    def update(self, margins_N: npt.ArrayLike, outcomes_N: npt.ArrayLike) -> None:
        """Learn from drafts of finished rounds (`observed`).

        Args:
            margins_N: their margins.
            outcomes_N: whether each stayed, given that all before it did.

        Raises:
            NumericsError: a margin is NaN; nothing is learned then.
            UsageError: the numbers of margins and outcomes differ.
        """
        margins = _clipped(margins_N)
        outcomes = np.asarray(outcomes_N, dtype=np.float64)
        if margins.shape != outcomes.shape or margins.ndim != 1:
            raise UsageError(
                f"There are margins of shape {margins.shape} for outcomes of shape "
                f"{outcomes.shape}; give one outcome for each."
            )
        if not margins.size:
            return
        features_N2 = np.stack([margins, np.ones_like(margins)], axis=1)
        logits = self.slope * margins + self.intercept
        predicted = 0.5 * (1 + np.tanh(logits / 2))
        self._information *= 0.5 ** (margins.size / self.half_life)
        weights_N1 = (predicted * (1 - predicted))[:, None]
        self._information += features_N2.T @ (weights_N1 * features_N2)
        # As if a few drafts had been seen before: damps the first steps.
        damped = self._information + np.eye(2)
        step = np.linalg.solve(damped, features_N2.T @ (outcomes - predicted))
        self.slope = max(0.0, self.slope + float(step[0]))
        self.intercept += float(step[1])


def _clipped(margins: npt.ArrayLike) -> FloatArray:
    values = np.asarray(margins, dtype=np.float64)
    if np.isnan(values).any():
        raise NumericsError("A margin of draft logits is NaN; check the drafter's logits.")
    return np.clip(values, 0.0, LARGEST_MARGIN)
