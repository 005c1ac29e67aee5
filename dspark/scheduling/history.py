"""What finished rounds of requests say about their next ones."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import numpy.typing as npt

from dspark.errors import UsageError

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
LEAST_FACTOR = 0.05
# Weight of a request's last round, beside its mean of late, in what is expected of the next one: a
# round says little of the next (docs/LOG.md, "What a round says of the next").
LAST = 0.35
# Requests times rounds that a typical survival remembers, and that a given one counts for.
TYPICAL_ROUNDS, PRIOR_ROUNDS = 200.0, 8.0


class RequestHistory:
    """Per request: its earlier survivals, and how its drafts fared against them.

    Learns from finished rounds only, so that lengths depend on nothing that this round decides.
    Every request is named by a tag that is never used again, such as (slot, generation); an
    unknown tag counts as survival 1 and factor 1 (docs/method.md, scheduling rule 9).
    """

    def __init__(
        self,
        num_drafts: int,
        memory: float = 0.9,
        doubt: float = 2.0,
        typical_K: npt.ArrayLike | None = None,
    ) -> None:
        """Start without any request.

        Args:
            num_drafts: K.
            memory: weight of what was known, per round, in realised and predicted acceptance and
                in a request's mean survivals.
            doubt: standard deviations that realised acceptance may lie below the predicted one
                before a request is thought to fail.
            typical_K: what `typical` says before the first round, for example
                `calibration_file.CalibrationEntry.mean_survival`; None says 1.

        Raises:
            UsageError: the memory is outside [0, 1), the doubt is negative, or `typical_K` is
                not K survivals.
        """
        if not 0 <= memory < 1:
            raise UsageError(f"The memory is {memory}, but must be at least 0 and less than 1.")
        if not doubt >= 0:
            raise UsageError(f"The doubt is {doubt}, but must be 0 or more.")
        typical = np.ones(num_drafts) if typical_K is None else np.array(typical_K, np.float64)
        if typical.shape != (num_drafts,):
            raise UsageError(
                f"Typical survivals have the shape {typical.shape}, but {num_drafts} drafts need "
                f"{(num_drafts,)}; take those of this block size."
            )
        self._doubt = doubt
        self._typical_K: FloatArray = typical
        self._typical_weight = PRIOR_ROUNDS if typical_K is not None else 0.0
        self._rows: dict[Hashable, int] = {}
        self._free: list[int] = []
        self._memory = memory
        self._last_MK, self._mean_MK = np.ones((2, 0, num_drafts))
        # Realised and predicted acceptance, and the variance of the latter.
        self._evidence_M3 = np.zeros((0, 3))
        self._fading_3 = np.array([memory, memory, memory**2])
        self._places_K = np.arange(num_drafts)
        self._moments_K2 = np.stack([np.ones(num_drafts), 2.0 * self._places_K + 1], axis=1)

    def __len__(self) -> int:
        return len(self._rows)

    def earlier(self, tags: Sequence[Hashable], unknown_K: npt.ArrayLike = 1.0) -> FloatArray:
        """Survivals that finished rounds let each request expect, [R, K].

        Of one request the mean of its rounds of late, which begins with the typical one, and its
        last round. Several share a budget by the survivals of the round that it is spent in, and
        how far these lie apart the last round shows, not means: of each its last round alone.

        Args:
            tags: name the requests.
            unknown_K: survivals of requests without a history, `typical` for example.
        """
        rows_R = self._find(tags)
        found = np.empty((len(tags), len(self._typical_K)))
        found[:] = unknown_K
        known_R = rows_R >= 0
        rows_R = rows_R[known_R]
        last = LAST if len(tags) == 1 else 1.0
        found[known_R] = (1 - last) * self._mean_MK[rows_R] + last * self._last_MK[rows_R]
        return found

    @property
    def typical(self) -> FloatArray:
        """Mean survivals [K] of all requests of late; what was given, or 1, before the first.

        Where many requests come and go, taking newcomers for sure successes would spend the
        budget on them, and end every pause of drafting at once.
        """
        return self._typical_K.copy()

    def factors(self, tags: Sequence[Hashable]) -> FloatArray:
        """Factors [R] in (0, 1] for the survivals of requests that keep failing.

        Realised over predicted acceptance, both fading, the benefit of the doubt given: 1 while
        a request stays within `doubt` standard deviations of what its confidences promised.
        """
        rows_R = self._find(tags)
        evidence_R3 = np.zeros((len(tags), 3))
        known_R = rows_R >= 0
        evidence_R3[known_R] = self._evidence_M3[rows_R[known_R]]
        realised_R, predicted_R, variance_R = evidence_R3.T
        # One draft of good faith lets the factor return to 1 as the evidence fades.
        likely_R = realised_R + self._doubt * np.sqrt(variance_R) + 1.0
        return np.clip(likely_R / (predicted_R + 1.0), LEAST_FACTOR, 1.0)

    def update(
        self,
        tags: Sequence[Hashable],
        survival_RK: npt.ArrayLike,
        accepted_R: npt.ArrayLike,
        verified_R: npt.ArrayLike,
        shared_R: npt.ArrayLike | None = None,
    ) -> None:
        """Learn from a finished round in which these requests drafted.

        Args:
            tags: name the requests, each once.
            survival_RK: predicted survivals of every offered draft, without the factor; behind a
                shorter block they are taken to fall as they typically do.
            accepted_R: drafts that stayed.
            verified_R: drafts that were verified.
            shared_R: which requests are typical; penalised and constrained ones are not. None
                takes all.

        Raises:
            UsageError: the shapes do not fit, or the counts are impossible.
        """
        survivals_RK = self._whole(np.asarray(survival_RK, dtype=np.float64))
        accepted_R = np.asarray(accepted_R, dtype=np.int64)
        verified_R = np.asarray(verified_R, dtype=np.int64)
        num_requests, num_drafts = survivals_RK.shape
        if not len(tags) == num_requests == len(accepted_R) == len(verified_R):
            raise UsageError(
                f"A round of {len(tags)} requests has {num_requests} rows of survivals, "
                f"{len(accepted_R)} accepted and {len(verified_R)} verified counts; give one each."
            )
        counts = zip(accepted_R.tolist(), verified_R.tolist(), strict=True)
        for request, (accepted, verified) in enumerate(counts):
            if not 0 <= accepted <= verified <= num_drafts:
                raise UsageError(
                    f"Request {request} of a round has {accepted} accepted of {verified} verified "
                    f"of {num_drafts} drafts, which cannot be; give finished rounds."
                )
        rows_R = self._find_or_make(tags, survivals_RK)
        self._last_MK[rows_R] = survivals_RK
        self._mean_MK[rows_R] += (1 - self._memory) * (survivals_RK - self._mean_MK[rows_R])
        tried_RK = survivals_RK * (self._places_K < verified_R[:, None])
        # Of each: survivals, and E[accepted^2] = sum (2j - 1) a_j, because P(accepted >= j) = a_j.
        evidence_R3 = np.empty((num_requests, 3))
        evidence_R3[:, 0] = accepted_R
        evidence_R3[:, 1:] = tried_RK @ self._moments_K2
        evidence_R3[:, 2] -= evidence_R3[:, 1] ** 2
        np.maximum(evidence_R3, 0.0, out=evidence_R3)
        self._evidence_M3[rows_R] = self._fading_3 * self._evidence_M3[rows_R] + evidence_R3
        if shared_R is not None and not np.all(shared_R):
            self._learn_typical(survivals_RK[np.asarray(shared_R, bool)])
        else:
            self._learn_typical(survivals_RK)

    def fade(self, tags: Sequence[Hashable], rounds: int = 1) -> None:
        """Rounds in which these requests drafted nothing: what is known of failures fades.

        So a request whose drafts were given up is tried again.
        """
        rows_R = self._find(tags)
        self._fade(rows_R[rows_R >= 0], rounds)

    def drop(self, tag: Hashable) -> None:
        """Forget a request that has ended; an unknown tag is no error."""
        row = self._rows.pop(tag, None)
        if row is not None:
            self._free.append(row)

    def _find(self, tags: Sequence[Hashable]) -> IntArray:
        return np.array([self._rows.get(tag, -1) for tag in tags], dtype=np.int64)

    def _find_or_make(self, tags: Sequence[Hashable], survivals_RK: FloatArray) -> IntArray:
        for tag, survival_K in zip(tags, survivals_RK, strict=True):
            if tag not in self._rows:
                if not self._free:
                    self._grow()
                row = self._rows[tag] = self._free.pop()
                self._evidence_M3[row] = 0.0
                self._mean_MK[row] = self._typical_K if self._typical_weight else survival_K
        return self._find(tags)

    def _grow(self) -> None:
        size, num_drafts = self._last_MK.shape
        more = max(size, 16)
        fresh_MK = np.ones((more, num_drafts))
        self._last_MK = np.concatenate([self._last_MK, fresh_MK])
        self._mean_MK = np.concatenate([self._mean_MK, fresh_MK])
        self._evidence_M3 = np.concatenate([self._evidence_M3, np.zeros((more, 3))])
        self._free.extend(range(size, size + more))

    def _fade(self, rows_R: IntArray, rounds: int = 1) -> None:
        self._evidence_M3[rows_R] *= self._fading_3**rounds

    def _learn_typical(self, survival_RK: FloatArray) -> None:
        count = len(survival_RK)
        if count:
            self._typical_weight = min(self._typical_weight + count, max(TYPICAL_ROUNDS, count))
            step_K = (survival_RK.mean(axis=0) - self._typical_K) * (count / self._typical_weight)
            self._typical_K = self._typical_K + step_K

    def _whole(self, survival_RK: FloatArray) -> FloatArray:
        """Survivals of K drafts each."""
        most = len(self._typical_K)
        if survival_RK.ndim != 2 or not 1 <= survival_RK.shape[1] <= most:
            raise UsageError(
                f"Survivals of a round have the shape {survival_RK.shape}, but must have 1 to "
                f"{most} columns; say `fade` where nothing was drafted."
            )
        seen = survival_RK.shape[1]
        if seen == most:
            return survival_RK
        last = max(float(self._typical_K[seen - 1]), np.finfo(np.float64).tiny)
        fall_K = np.minimum(self._typical_K[seen:] / last, 1.0)
        return np.concatenate([survival_RK, survival_RK[:, -1:] * fall_K], axis=1)
