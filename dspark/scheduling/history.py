"""What finished rounds of a request say about its next one."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dspark.errors import UsageError

FloatArray = npt.NDArray[np.float64]
LEAST_FACTOR = 0.05
# Requests times rounds that a typical survival remembers, and that a given one counts for.
TYPICAL_ROUNDS, PRIOR_ROUNDS = 200.0, 8.0


@dataclass
class _Record:
    survival_K: FloatArray
    predicted: float = 0.0
    realised: float = 0.0
    variance: float = 0.0


class RequestHistory:
    """Per request: its earlier survivals, and how its drafts fared against them.

    Learns from finished rounds only, so that lengths depend on nothing that this round decides.
    Every request is named by a tag that is never used again, such as (slot, generation); an
    unknown tag counts as survival 1 and factor 1 (LOSSLESS.md, scheduling rule 9).
    """

    def __init__(
        self, memory: float = 0.9, doubt: float = 2.0, typical_K: npt.ArrayLike = ()
    ) -> None:
        """Start without any request.

        Args:
            memory: weight of what was known, per round, in realised and predicted acceptance.
            doubt: standard deviations that realised acceptance may lie below the predicted one
                before a request is thought to fail.
            typical_K: what `typical` says before the first round, for example
                `calibration_file.CalibrationEntry.mean_survival`; 1 where it says nothing.

        Raises:
            UsageError: the memory is outside [0, 1), or the doubt is negative.
        """
        if not 0 <= memory < 1:
            raise UsageError(f"The memory is {memory}, but must be at least 0 and less than 1.")
        if not doubt >= 0:
            raise UsageError(f"The doubt is {doubt}, but must be 0 or more.")
        self._memory, self._doubt = memory, doubt
        self._records: dict[Hashable, _Record] = {}
        self._typical: FloatArray = np.array(typical_K, dtype=np.float64)
        self._weight = PRIOR_ROUNDS

    def __len__(self) -> int:
        return len(self._records)

    def earlier(
        self, tags: Sequence[Hashable], num_drafts: int, unknown_K: npt.ArrayLike = 1.0
    ) -> FloatArray:
        """Survivals that earlier rounds showed, [R, K].

        They never rise within a row: a position unknown behind known ones takes the last of them.

        Args:
            tags: name the requests.
            num_drafts: K.
            unknown_K: survivals of requests without a history, `typical` for example.
        """
        found = np.empty((len(tags), num_drafts))
        found[:] = unknown_K
        for row, tag in zip(found, tags, strict=True):
            record = self._records.get(tag)
            if record is not None and record.survival_K.size:
                known = record.survival_K[:num_drafts]
                row[: len(known)] = known
                row[len(known) :] = known[-1]
        return found

    def typical(self, num_drafts: int) -> FloatArray:
        """Mean survivals of all requests of late, [K]; 1 before anything is known.

        Shared by all requests. Where many come and go, taking newcomers for sure successes would
        spend the budget on them, and end every pause of drafting at once.
        """
        found = np.ones(num_drafts)
        known = self._typical[:num_drafts]
        found[: len(known)] = known
        found[len(known) :] = known[-1] if known.size else 1.0
        return found

    def factors(self, tags: Sequence[Hashable]) -> FloatArray:
        """Factors [R] in (0, 1] for the survivals of requests that keep failing.

        Realised over predicted acceptance, both fading, the benefit of the doubt given: 1 while
        a request stays within `doubt` standard deviations of what its confidences promised.
        """
        return np.array([self._factor(self._records.get(tag)) for tag in tags], dtype=np.float64)

    def update(
        self,
        tag: Hashable,
        survival_K: npt.ArrayLike,
        accepted: int,
        verified: int,
        *,
        shared: bool = True,
    ) -> None:
        """Learn from a finished round of a request.

        A round in which nothing was drafted is given with no survivals: it fades what is known
        of its failures, so that a request is tried again.

        Args:
            tag: names the request.
            survival_K: predicted survivals of every offered draft, without the factor.
            accepted: drafts that stayed.
            verified: drafts that were verified.
            shared: whether it is typical; penalised and constrained requests are not.

        Raises:
            UsageError: the counts are impossible.
        """
        survival = np.array(survival_K, dtype=np.float64)
        if not 0 <= accepted <= verified <= len(survival):
            raise UsageError(
                f"A round has {accepted} accepted of {verified} verified of {len(survival)} "
                "offered drafts, which cannot be; give the counts of one finished round."
            )
        record = self._records.get(tag)
        if record is None:
            record = self._records[tag] = _Record(survival)
        elif survival.size:
            record.survival_K = survival
        if shared and survival.size:
            self._learn_typical(survival)
        tried = survival[:verified]
        mean = float(tried.sum())
        # E[accepted^2] = sum (2j - 1) a_j, because P(accepted >= j) = a_j.
        square = float(((2 * np.arange(verified) + 1) * tried).sum())
        record.predicted = self._memory * record.predicted + mean
        record.realised = self._memory * record.realised + accepted
        record.variance = self._memory**2 * record.variance + max(square - mean * mean, 0.0)

    def _learn_typical(self, survival_K: FloatArray) -> None:
        if survival_K.shape != self._typical.shape:  # another block size: start anew
            self._typical, self._weight = survival_K.copy(), 1.0
            return
        self._weight = min(self._weight + 1.0, TYPICAL_ROUNDS)
        self._typical = self._typical + (survival_K - self._typical) / self._weight

    def drop(self, tag: Hashable) -> None:
        """Forget a request that has ended; an unknown tag is no error."""
        self._records.pop(tag, None)

    def _factor(self, record: _Record | None) -> float:
        if record is None:
            return 1.0
        # One draft of good faith lets the factor return to 1 as the evidence fades.
        likely = record.realised + self._doubt * record.variance**0.5 + 1.0
        return float(np.clip(likely / (record.predicted + 1.0), LEAST_FACTOR, 1.0))
