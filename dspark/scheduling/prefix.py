"""How many drafts of each request to verify: fixed and threshold lengths.

A length may depend on draft tokens only through prefixes that are already admitted: c_k is known
before x_k is drawn, so deciding about draft k from c_1..c_k keeps every output exact. Deciding
from the probability of the token drawn, or from confidences behind the first that fails, does not.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dspark.errors import UsageError

IntArray = npt.NDArray[np.int64]


def fixed_lengths(num_requests: int, length: int) -> IntArray:
    """The same verification length for every request.

    Args:
        num_requests: R.
        length: drafts to verify, K for all of them.

    Returns:
        [R] int64.

    Raises:
        UsageError: the length is negative.
    """
    if length < 0:
        raise UsageError(f"The verification length is {length}, but must be 0 or more.")
    return np.full(num_requests, length, dtype=np.int64)


def threshold_lengths(confidence_RK: npt.ArrayLike, threshold: float) -> IntArray:
    """The longest prefix of every request whose confidences all reach the threshold.

    Args:
        confidence_RK: c_k in [0, 1]; NaN reaches no threshold.
        threshold: between 0 (verify everything) and 1.

    Returns:
        [R] int64, 0..K.

    Raises:
        UsageError: the threshold is outside [0, 1].
    """
    if not 0 <= threshold <= 1:
        raise UsageError(f"The confidence threshold is {threshold}, but must be between 0 and 1.")
    reached_RK = np.asarray(confidence_RK, dtype=np.float64) >= threshold
    lengths_R: IntArray = np.logical_and.accumulate(reached_RK, axis=-1).sum(axis=-1)
    return lengths_R
