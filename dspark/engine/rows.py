"""Row laws where a row may fail: what is wrong with one request leaves the others as they are."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dspark.errors import DSparkError, NumericsError, RequestError
from dspark.params import SamplingParams
from dspark.sampling.counts import TokenCounts
from dspark.sampling.processors import Chain, rows_without_law

RowRule = Callable[[Tensor, Chain, TokenCounts | None, Tensor | None], Tensor]
"""`processors.law` or `processors.greedy_tokens`."""


def compute_rows(
    rule: RowRule,
    logits_NV: Tensor,
    chain: Chain,
    counts: TokenCounts | None,
    mask_NV: Tensor | None,
    faults: dict[int, DSparkError],
) -> Tensor:
    """Laws or greedy tokens of all rows that have one, bit for bit as without the others.

    Costs nothing while nothing is wrong.

    Args:
        rule: what to compute.
        logits_NV: raw logits.
        chain: processors of the same rows (of any rows, where it is plain and greedy).
        counts: token counts of the same rows, where a row has penalties.
        mask_NV: bool, True where a token is allowed.
        faults: rows already known to have no law, by number; those found here are added.

    Returns:
        What `rule` gives; in the rows that fail token 0, or a law that is one-hot there.
    """
    if not faults:
        try:
            return rule(logits_NV, chain, counts, mask_NV)
        except (NumericsError, RequestError):
            pass  # some row is at fault: find it
    broken_N, empty_N = rows_without_law(logits_NV, chain, counts, mask_NV)
    for row in broken_N.nonzero().flatten().tolist():
        faults.setdefault(row, NumericsError("The logits have NaN or no finite maximum."))
    for row in empty_N.nonzero().flatten().tolist():
        faults.setdefault(
            row,
            RequestError("Penalties, logit bias and mask leave no token; allow at least one."),
        )
    nothing_1V = torch.zeros_like(logits_NV[:1])
    filler = rule(nothing_1V, Chain.of([SamplingParams()], logits_NV.device), None, None)
    out = filler.repeat(len(logits_NV), *(1,) * (filler.dim() - 1))
    sound = [row for row in range(len(logits_NV)) if row not in faults]
    if sound:
        rows_M = torch.tensor(sound, device=logits_NV.device)
        own = chain if chain.greedy and chain.plain else chain.rows(rows_M)
        out[rows_M] = rule(
            logits_NV[rows_M],
            own,
            None if counts is None else counts.rows(rows_M),
            None if mask_NV is None else mask_NV[rows_M],
        )
    return out
