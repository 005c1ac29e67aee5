"""Sequential temperature scaling: confidences as calibrated probabilities (section 3.2.1)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from dspark.errors import CompatibilityError, DataError, NumericsError, UsageError
from dspark.request import VERIFIERS, Verifier
from dspark.scheduling.reliability import (
    Reliability,
    expected_calibration_error,
    reliability,
)
from dspark.scheduling.survival import confidence, survival

GRID = np.geomspace(0.1, 10.0, 161)  # 1 is in its middle; steps of 3 %
SHIFTS = np.arange(-20, 21) / 10
FEWEST = 100
TemperatureClass = Literal["greedy", "sampled"]
FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]


def temperature_class(temperature: float) -> TemperatureClass:
    """Which calibration a sampling temperature takes: drafts of greedy requests stay otherwise."""
    return "sampled" if temperature > 0 else "greedy"


@dataclass(frozen=True)
class TemperatureScaling:
    """One temperature per draft position, dividing the logit of c_k, and one shift, added to it.

    The paper's has no shifts. Where a verifier keeps drafts by another rule than the drafter was
    trained to predict (block verification, temperature 0), confidences are off by more than their
    sharpness, and no temperature can move a half.

    Attributes:
        temperatures: of positions 1..K, positive.
        shifts: the same number; empty for none.

    Raises:
        DataError: there is no temperature, one is not a positive number, or a shift is not finite.
    """

    temperatures: tuple[float, ...]
    shifts: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not np.isfinite(self.shifts).all() or len(self.shifts) not in (
            0,
            len(self.temperatures),
        ):
            raise DataError(
                f"Calibration shifts must be finite and as many as temperatures, but are "
                f"{list(self.shifts)}; "
                "calibrate again (dspark calibrate) or go on with uncalibrated confidences."
            )
        if not self.temperatures or not all(0 < t < np.inf for t in self.temperatures):
            raise DataError(
                f"Calibration temperatures must be positive, but are {list(self.temperatures)}; "
                "calibrate again (dspark calibrate) or go on with uncalibrated confidences."
            )

    def apply(self, logits_RK: npt.ArrayLike) -> FloatArray:
        """Calibrated confidences c_k = sigmoid(logit / T_k + shift_k).

        Order-preserving per position: division and sigmoid never fall in floating point.

        Args:
            logits_RK: confidence logits; of a shorter block the first temperatures serve.

        Returns:
            [R, K] float64 in [0, 1]; their running product (`survival.survival`) never rises.

        Raises:
            CompatibilityError: there are more positions than temperatures.
            NumericsError: a logit is NaN.
        """
        logits = np.asarray(logits_RK, dtype=np.float64)
        if logits.shape[-1] > len(self.temperatures):
            raise CompatibilityError(
                f"The drafter offers {logits.shape[-1]} drafts, but the calibration has "
                f"{len(self.temperatures)} temperatures; calibrate this block size "
                "(dspark calibrate) or go on with uncalibrated confidences."
            )
        count = logits.shape[-1]
        scaled = logits / np.array(self.temperatures[:count])
        return confidence(scaled + np.array(self.shifts[:count]) if self.shifts else scaled)


@dataclass(frozen=True)
class Rounds:
    """Finished rounds to calibrate on.

    Attributes:
        logits_NK: confidence logits of every offered draft.
        accepted_N: drafts that stayed.
        verified_N: drafts that were verified, accepted_N..K.

    Raises:
        DataError: the shapes do not fit, or counts are impossible.
        NumericsError: a logit is NaN.
    """

    logits_NK: FloatArray
    accepted_N: npt.NDArray[np.int64]
    verified_N: npt.NDArray[np.int64]

    def __post_init__(self) -> None:
        shape = self.logits_NK.shape
        counts = (self.accepted_N.shape, self.verified_N.shape)
        if len(shape) != 2 or counts != (shape[:1], shape[:1]):
            raise DataError(
                f"Confidence logits of shape {shape} do not fit accepted and verified drafts of "
                f"shapes {counts[0]} and {counts[1]}; give [N, K], [N] and [N]."
            )
        possible = (self.accepted_N >= 0) & (self.accepted_N <= self.verified_N)
        bad = np.flatnonzero(~(possible & (self.verified_N <= shape[1])))
        if bad.size:
            n = bad[0]
            raise DataError(
                f"Round {n} has {self.accepted_N[n]} accepted of {self.verified_N[n]} verified "
                f"of {shape[1]} offered drafts, which cannot be; record the rounds again."
            )
        rows = np.flatnonzero(np.isnan(self.logits_NK).any(axis=1))
        if rows.size:
            raise NumericsError(
                f"The confidence logits of round {rows[0]} contain NaN; "
                "check the drafter's confidence head."
            )

    @classmethod
    def of(
        cls, logits_NK: npt.ArrayLike, accepted_N: npt.ArrayLike, verified_N: npt.ArrayLike
    ) -> Rounds:
        """The rounds from anything that becomes an array.

        Raises:
            DataError: the shapes do not fit, or counts are impossible.
            NumericsError: a logit is NaN.
        """
        return cls(
            np.asarray(logits_NK, dtype=np.float64),
            np.asarray(accepted_N, dtype=np.int64),
            np.asarray(verified_N, dtype=np.int64),
        )

    def halves(self) -> tuple[Rounds, Rounds]:
        """The first half of the rounds, to fit on, and the second, held out."""
        middle = len(self.accepted_N) // 2
        first, second = (
            Rounds(self.logits_NK[part], self.accepted_N[part], self.verified_N[part])
            for part in (slice(middle), slice(middle, None))
        )
        return first, second

    def observed(self, position: int, verifier: Verifier) -> BoolArray:
        """Rounds [N] in which the fate of a position (from 0) is known.

        A position that was not verified has no outcome, also where an earlier draft was rejected:
        to count those alone would take only the failures of trimmed rounds. Under the block
        rule trimming changes the earlier tests too, so that only rounds in which every offered
        draft was verified count.
        """
        num_drafts = self.logits_NK.shape[1]
        needed = num_drafts if verifier == "block" else position + 1
        return self.verified_N >= needed


def fit(rounds: Rounds, verifier: Verifier, *, shifts: bool = True) -> TemperatureScaling:
    """Fit one temperature, and one shift, after the other.

    For k = 1..K those of position k are the ones whose running product of calibrated confidences
    has the least expected calibration error (20 equal-width bins) against "draft k stayed";
    earlier ones are kept as they are. Temperatures lie on a grid of 161 from 0.1 to 10. With
    shifts, every fourth of them is tried with every shift from -2 to 2 in steps of 0.1, then all
    of them with the best shift. Of equals, the ones nearest 1 and 0.

    Args:
        rounds: held-out rounds, best of full blocks (see `Rounds.observed` for trimmed ones).
        verifier: whose rounds they are: token, block and coupled keep drafts differently.
        shifts: False fits temperatures alone, as the paper does.

    Raises:
        DataError: a position was observed in fewer than 100 rounds.
        UsageError: the verifier is unknown.
    """
    _check_verifier(verifier)
    before_N = np.ones(len(rounds.accepted_N))
    found: list[tuple[float, float]] = []
    for k in range(rounds.logits_NK.shape[1]):
        known = rounds.observed(k, verifier)
        if known.sum() < FEWEST:
            raise DataError(
                f"Draft position {k + 1} was observed in {known.sum()} rounds, but {FEWEST} are "
                "needed; record more rounds with the schedule 'fixed', or go on with "
                "uncalibrated confidences."
            )
        position = _Position(
            before_N[known], rounds.logits_NK[known, k], rounds.accepted_N[known] > k
        )
        shift = position.best(GRID[::4], SHIFTS)[1] if shifts else 0.0
        temperature = position.best(GRID, np.array([shift]))[0]
        found.append((temperature, shift))
        before_N = before_N * confidence(rounds.logits_NK[:, k] / temperature + shift)
    temperatures, offsets = zip(*found, strict=True)
    return TemperatureScaling(temperatures, offsets if shifts else ())


@dataclass(frozen=True)
class _Position:
    """One draft position: survival up to it, its logits, and which of its drafts stayed."""

    before_N: FloatArray
    logits_N: FloatArray
    stayed_N: BoolArray

    def best(self, temperatures: FloatArray, shifts: FloatArray) -> tuple[float, float]:
        """The temperature and shift with the least calibration error, of equals the mildest."""
        tried = [(float(t), float(s)) for t in temperatures for s in shifts]
        tried.sort(key=lambda pair: (abs(pair[1]), abs(math.log(pair[0]))))
        return min(tried, key=lambda pair: self._error(*pair))

    def _error(self, temperature: float, shift: float) -> float:
        predicted_N = self.before_N * confidence(self.logits_N / temperature + shift)
        return expected_calibration_error(predicted_N, self.stayed_N)


def assess(
    rounds: Rounds, verifier: Verifier, scaling: TemperatureScaling | None = None
) -> tuple[Reliability, ...]:
    """Reliability of the survival of every position, with a scaling or without.

    Raises:
        CompatibilityError: the scaling is of a smaller block size.
        UsageError: the verifier is unknown.
    """
    _check_verifier(verifier)
    values_NK = confidence(rounds.logits_NK) if scaling is None else scaling.apply(rounds.logits_NK)
    survival_NK = survival(values_NK)
    found = []
    for k in range(survival_NK.shape[1]):
        known = rounds.observed(k, verifier)
        found.append(reliability(survival_NK[known, k], rounds.accepted_N[known] > k))
    return tuple(found)


def _check_verifier(verifier: str) -> None:
    if verifier not in VERIFIERS:
        raise UsageError(
            f"The verifier is {verifier!r}, but must be one of {', '.join(VERIFIERS)}."
        )
