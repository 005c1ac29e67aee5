"""How far predicted survivals can be trusted: calibration error, discrimination, Brier score."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dspark.errors import UsageError

BINS = 20
FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Reliability:
    """Predictions of one draft position against what came of them.

    Attributes:
        count: rounds in which the position was observed.
        ece: expected calibration error over equal-width bins; 0 without rounds.
        auc: chance that a draft that stayed was predicted higher than one that did not, ties
            half; None where all outcomes are the same.
        brier: mean squared difference of prediction and outcome.
        bin_counts: rounds per bin; bin b holds predictions in [b, b + 1) / 20, 1 in the last.
        bin_predicted: mean prediction per bin, 0 where it is empty.
        bin_observed: share of drafts that stayed per bin, 0 where it is empty.
    """

    count: int
    ece: float
    auc: float | None
    brier: float
    bin_counts: tuple[int, ...]
    bin_predicted: tuple[float, ...]
    bin_observed: tuple[float, ...]

    @property
    def ece_by_chance(self) -> float:
        """The calibration error that chance alone gives right predictions of so many rounds.

        A bin's share wavers by its standard deviation; the mean of |x| is sqrt(2 / pi) of it.
        """
        counts, chances = np.array(self.bin_counts), np.array(self.bin_predicted)
        wavers = np.sqrt(2 / np.pi * counts * chances * (1 - chances))
        return float(wavers.sum() / max(self.count, 1))


def reliability(predicted_N: npt.ArrayLike, stayed_N: npt.ArrayLike) -> Reliability:
    """Compare predicted survivals with outcomes.

    Args:
        predicted_N: survivals in [0, 1].
        stayed_N: whether the draft stayed.

    Raises:
        UsageError: a prediction is outside [0, 1], or the numbers of entries differ.
    """
    predicted = np.asarray(predicted_N, dtype=np.float64)
    stayed = np.asarray(stayed_N, dtype=np.bool_)
    if predicted.shape != stayed.shape or predicted.ndim != 1:
        raise UsageError(
            f"There are predictions of shape {predicted.shape} for outcomes of shape "
            f"{stayed.shape}; give one outcome for each."
        )
    if not ((predicted >= 0) & (predicted <= 1)).all():
        raise UsageError("A predicted survival lies outside [0, 1]; give probabilities.")
    counts, sums, hits = _binned(predicted, stayed)
    filled = np.maximum(counts, 1)
    return Reliability(
        count=len(predicted),
        ece=expected_calibration_error(predicted, stayed),
        auc=_auc(predicted, stayed),
        brier=float(np.mean((predicted - stayed) ** 2)) if len(predicted) else 0.0,
        bin_counts=tuple(int(n) for n in counts),
        bin_predicted=tuple(float(p) for p in sums / filled),
        bin_observed=tuple(float(p) for p in hits / filled),
    )


def expected_calibration_error(predicted_N: FloatArray, stayed_N: BoolArray) -> float:
    """Mean over predictions of |mean prediction - share that stayed| of their bin (20 bins)."""
    _, sums, hits = _binned(predicted_N, stayed_N)
    return float(np.abs(sums - hits).sum() / max(len(predicted_N), 1))


def _binned(
    predicted_N: FloatArray, stayed_N: BoolArray
) -> tuple[npt.NDArray[np.int64], FloatArray, FloatArray]:
    bins_N = np.minimum((predicted_N * BINS).astype(np.int64), BINS - 1)
    counts: npt.NDArray[np.int64] = np.bincount(bins_N, minlength=BINS).astype(np.int64)
    sums: FloatArray = np.bincount(bins_N, predicted_N, BINS).astype(np.float64)
    hits: FloatArray = np.bincount(bins_N, stayed_N, BINS).astype(np.float64)
    return counts, sums, hits


def _auc(predicted_N: FloatArray, stayed_N: BoolArray) -> float | None:
    stayed, failed = int(stayed_N.sum()), int((~stayed_N).sum())
    if not stayed or not failed:
        return None
    _, inverse, counts = np.unique(predicted_N, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2  # ties share their mean rank
    above = ranks[inverse][stayed_N].sum() - stayed * (stayed + 1) / 2
    return float(above / (stayed * failed))
