"""From confidences to survival: the chance that a draft and all before it stay."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dspark.errors import NumericsError

FloatArray = npt.NDArray[np.float64]


def confidence(logits_RK: npt.ArrayLike) -> FloatArray:
    """Confidences c_k = sigmoid(logit) in float64.

    In fp32 the sigmoid reaches exactly 1 from a logit of about 17 on, and survivals that tie only
    because of rounding would hang on which token was drawn before; in float64 that takes 37.

    Args:
        logits_RK: confidence logits of R requests and K draft positions.

    Returns:
        [R, K] in [0, 1].

    Raises:
        NumericsError: a logit is NaN.
    """
    logits = np.asarray(logits_RK, dtype=np.float64)
    _check(logits, "confidence logits")
    small = np.exp(-np.abs(logits))
    return np.where(logits >= 0, 1.0, small) / (1.0 + small)


def survival(confidence_RK: npt.ArrayLike) -> FloatArray:
    """Survival a_k = prod_{i <= k} c_i, never increasing in k, rounding included.

    A running product of factors in [0, 1] cannot grow in floating point: rounding is monotone.

    Args:
        confidence_RK: c_k, the chance that draft k stays given that 1..k-1 did; clipped to [0, 1].

    Returns:
        [R, K] float64.

    Raises:
        NumericsError: a confidence is NaN.
    """
    values = np.asarray(confidence_RK, dtype=np.float64)
    _check(values, "confidences")
    return np.multiply.accumulate(np.clip(values, 0.0, 1.0), axis=-1)


def _check(values_RK: FloatArray, what: str) -> None:
    if np.isnan(values_RK).any():
        bad = np.argwhere(np.isnan(values_RK))
        raise NumericsError(
            f"The {what} of request {bad[0][0]} in this batch contain NaN; "
            "check the drafter's confidence head, or use the schedule 'fixed', which reads none."
        )
