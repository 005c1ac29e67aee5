"""A budget that also knows this round's first confidences: exact, and sharper than `lagged`.

c_1 of a request is a function of its anchor, not of any draft token of this round, so every
first survival is known before anything is drawn that a length could bias. Earlier rounds say how
survival falls from there. The budget is searched globally on that expectation, over stairs as
well, and filled by the survivals that come true; it knows no draft token, which is the condition
under which filling is exact (docs/method.md, scheduling rules 1 and 4).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dspark.errors import UsageError
from dspark.scheduling.budget import best_budget, fill_budget

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


def expected_survival(survival_RK: npt.ArrayLike, earlier_RK: npt.ArrayLike) -> FloatArray:
    """This round's first survivals, falling as earlier ones did.

    Args:
        survival_RK: survivals of this round; only the first column is looked at.
        earlier_RK: survivals that earlier rounds showed (`history.RequestHistory.earlier`).

    Returns:
        [R, K], never rising within a row.

    Raises:
        UsageError: the shapes differ.
    """
    survival_RK = np.asarray(survival_RK, dtype=np.float64)
    earlier_RK = np.asarray(earlier_RK, dtype=np.float64)
    if survival_RK.shape != earlier_RK.shape:
        raise UsageError(
            f"Survivals of shape {survival_RK.shape} do not fit earlier ones of shape "
            f"{earlier_RK.shape}; give one row for each request that drafts."
        )
    first_R1 = earlier_RK[:, :1]
    falling_RK = np.divide(earlier_RK, first_R1, out=np.zeros_like(earlier_RK), where=first_R1 > 0)
    falling_RK[:, :1] = 1.0
    expected_RK: FloatArray = survival_RK[:, :1] * falling_RK
    return expected_RK


def lookahead_lengths(
    survival_RK: npt.ArrayLike,
    earlier_RK: npt.ArrayLike,
    step_ms_N: npt.ArrayLike,
    limits_R: npt.ArrayLike | None = None,
    margin: float = 0.0,
) -> IntArray:
    """Lengths under the best budget for the expected survivals, filled by those of this round.

    Args:
        survival_RK: survivals a_k of this round.
        earlier_RK: survivals that earlier rounds showed; 1 for requests without a history.
        step_ms_N: as for `prefix.prefix_lengths`.
        limits_R: most drafts of each request; None allows K.
        margin: as for `prefix.best_budget`.

    Returns:
        [R] int64.

    Raises:
        NumericsError: a survival is NaN.
        UsageError: the shapes differ, survivals rise within a request, a step cost is not
            positive and finite, or the margin is negative.
    """
    expected_RK = expected_survival(survival_RK, earlier_RK)
    return fill_budget(survival_RK, best_budget(expected_RK, step_ms_N, limits_R, margin), limits_R)
