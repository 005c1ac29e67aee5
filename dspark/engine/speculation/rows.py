"""Distributions of rows, some of which may fail without a change to the others."""

from __future__ import annotations

from typing import Protocol, TypeVar

import torch
from torch import Tensor

from dspark.errors import DSparkError, NumericsError, RequestError
from dspark.params import SamplingParams
from dspark.sampling.distribution import Distribution
from dspark.sampling.logits_processors import Chain, Known, rows_without_distribution
from dspark.sampling.token_counts import TokenCounts

RowsT_co = TypeVar("RowsT_co", Tensor, Distribution, covariant=True)


class RowRule(Protocol[RowsT_co]):
    """`token_distribution` or `greedy_tokens` of the logits processors."""

    def __call__(
        self,
        logits_NC: Tensor,
        chain: Chain,
        counts: TokenCounts | None,
        mask_NV: Tensor | None,
        known: Known | None,
        /,
    ) -> RowsT_co: ...


def compute_rows(
    rule: RowRule[RowsT_co],
    logits_NC: Tensor,
    chain: Chain,
    counts: TokenCounts | None,
    mask_NV: Tensor | None,
    faults: dict[int, DSparkError],
    known: Known | None = None,
) -> RowsT_co:
    """Distributions or greedy tokens of all rows that have one, bit for bit as without the others.

    Costs nothing while nothing is wrong.

    Args:
        rule: what to compute.
        logits_NC: raw logits.
        chain: processors of the same rows (of any rows, where it is plain and greedy).
        counts: token counts of the same rows, where a row has penalties.
        mask_NV: bool, True where a token is allowed.
        faults: rows already known to have no distribution, by number; those found here are added.
        known: the tokens of the columns; None where column c is token c.

    Returns:
        What `rule` gives; in the rows that fail token 0, or a one-hot distribution.
    """
    if not faults:
        try:
            return rule(logits_NC, chain, counts, mask_NV, known)
        except (NumericsError, RequestError):
            pass  # some row is at fault: find it
    broken_N, empty_N = rows_without_distribution(logits_NC, chain, counts, mask_NV, known)
    for row in broken_N.nonzero().flatten().tolist():
        faults.setdefault(row, NumericsError("The logits have NaN or no finite maximum."))
    for row in empty_N.nonzero().flatten().tolist():
        faults.setdefault(
            row,
            RequestError("Penalties, logit bias and mask leave no token; allow at least one."),
        )
    count, sound = len(logits_NC), [row for row in range(len(logits_NC)) if row not in faults]
    if not sound:  # the rows of no request: what comes out is not looked at
        nothing_NC = torch.zeros_like(logits_NC)
        temperature = 0.0 if chain.narrow else 1.0  # what comes out has the form of the others
        params = [SamplingParams(temperature=temperature)]
        anything = Chain.of(params, logits_NC.device).rows([0] * count)
        return rule(nothing_NC, anything, None, None, known)
    rows_M = torch.tensor(sound, device=logits_NC.device)
    found = rule(
        logits_NC[rows_M],
        chain if chain.greedy and chain.plain else chain.rows(rows_M),
        None if counts is None else counts.rows(rows_M),
        None if mask_NV is None else mask_NV[rows_M],
        None if known is None else known.rows(rows_M),
    )
    if isinstance(found, Distribution):
        return found.spread(rows_M, count)
    return found.new_zeros(count).index_copy_(0, rows_M, found)
