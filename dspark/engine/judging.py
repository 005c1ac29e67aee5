"""Judging: which drafts stay, and the token after them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from dspark.engine.drafting import Drafts
from dspark.engine.state import RoundState
from dspark.errors import NumericsError
from dspark.sampling.processors import greedy_tokens, law, sample
from dspark.sampling.verification import (
    Rule,
    accepted_by_identity,
    accepted_lengths,
    coupled_tokens,
    keep_probabilities,
    next_law,
)


@dataclass(frozen=True)
class Verdict:
    """What a round decided, per request.

    Attributes:
        committed: the kept drafts and the token after them.
        accepted: how many of these are drafts.
    """

    committed: Sequence[Sequence[int]]
    accepted: Sequence[int]


def verify(logits_NV: Tensor, drafts: Drafts, state: RoundState) -> Verdict:
    """Decide what stays and draw the token after it.

    Args:
        logits_NV: the target's logits of every request's last 1 + length rows, request by request.
        drafts: what was verified.
        state: of the R requests.

    Raises:
        NumericsError: the target produced NaN or infinite logits.
    """
    try:
        return _verify(logits_NV, drafts, state)
    except NumericsError as error:
        raise NumericsError(f"The target failed: {error}") from error


def _verify(logits_NV: Tensor, drafts: Drafts, state: RoundState) -> Verdict:
    laws, lengths = state.laws, drafts.lengths
    table = _row_table(lengths, logits_NV.device)
    chain_N, counts_N = laws.chain, laws.counts
    if table.longest:
        if not (chain_N.greedy and chain_N.plain):  # what the plain argmax never looks at
            chain_N = laws.chain_rows(lengths, table.request_N)
        if counts_N is not None:
            counts_N = counts_N.after_drafts(table.request_N, table.step_N, drafts.tokens_RK)
    if laws.chain.greedy:
        return _by_identity(greedy_tokens(logits_NV, chain_N, counts_N), table, drafts)
    law_NV = law(logits_NV, chain_N, counts_N)
    if state.verifier == "coupled":
        positions_N = state.anchors_R[table.request_N] + table.step_N + 1
        own_N = coupled_tokens(law_NV, laws.seeds_R[table.request_N], positions_N)
        return _by_identity(own_N, table, drafts)
    return _by_rejection(law_NV, table, drafts, state)


@dataclass(frozen=True)
class _RowTable:
    """Where the ragged rows of R requests stand in a table of L = 1 + longest length columns.

    Attributes:
        request_N: request of each ragged row.
        step_N: drafts before each ragged row, within its request.
        row_RL: ragged row of (request, step); steps past a length repeat its last row. None where
            all lengths are equal, so that the rows are the table as they lie.
        lengths_R: verified drafts.
        longest: the longest length.
    """

    request_N: Tensor
    step_N: Tensor
    row_RL: Tensor | None
    lengths_R: Tensor
    longest: int

    def spread(self, rows: Tensor) -> Tensor:
        """Ragged rows [N, ...] as a table [R, L, ...]."""
        if self.row_RL is None:
            return rows.view(len(self.lengths_R), self.longest + 1, *rows.shape[1:])
        return rows[self.row_RL]


@lru_cache(maxsize=256)
def _row_table(lengths: tuple[int, ...], device: torch.device) -> _RowTable:
    longest = max(lengths)
    request, step, table, row = list[int](), list[int](), list[list[int]](), 0
    for r, length in enumerate(lengths):
        request += [r] * (length + 1)
        step += range(length + 1)
        table.append([row + min(k, length) for k in range(longest + 1)])
        row += length + 1
    return _RowTable(
        request_N=torch.tensor(request, device=device),
        step_N=torch.tensor(step, device=device),
        row_RL=None if min(lengths) == longest else torch.tensor(table, device=device),
        lengths_R=torch.tensor(lengths, device=device),
        longest=longest,
    )


def _by_identity(own_N: Tensor, table: _RowTable, drafts: Drafts) -> Verdict:
    """Keep drafts while they are the target's own tokens."""
    own_RL = table.spread(own_N)
    own = own_RL.tolist()
    if table.longest == 0:
        return Verdict(own, [0] * len(own))
    drafts_RK = drafts.tokens_RK[:, : table.longest]
    accepted = accepted_by_identity(own_RL, drafts_RK, table.lengths_R).tolist()
    # Kept drafts equal the target's own tokens, so those are what is committed.
    return Verdict([row[: n + 1] for row, n in zip(own, accepted, strict=True)], accepted)


def _by_rejection(law_NV: Tensor, table: _RowTable, drafts: Drafts, state: RoundState) -> Verdict:
    """Keep drafts by the rule of the verifier, and correct the law of the token after them."""
    lengths_R = table.lengths_R
    if table.longest == 0 or drafts.laws_RKV is None:
        tokens_R = sample(law_NV, state.next_uniform(lengths_R))
        return Verdict([[token] for token in tokens_R.tolist()], [0] * len(tokens_R))
    rule: Rule = "token" if state.verifier == "token" else "block"
    p_RLV = table.spread(law_NV)
    q_RKV = drafts.laws_RKV[:, : table.longest].to(p_RLV.dtype)
    drafts_RK = drafts.tokens_RK[:, : table.longest]
    keep_RK = keep_probabilities(rule, p_RLV, q_RKV, drafts_RK, lengths_R)
    uniforms_RK = state.verify_uniforms(table.longest)
    accepted_R = accepted_lengths(rule, keep_RK, uniforms_RK, lengths_R)
    law_RV = next_law(rule, p_RLV, q_RKV, drafts_RK, lengths_R, accepted_R)
    next_R = sample(law_RV, state.next_uniform(accepted_R))
    accepted = accepted_R.tolist()
    rows = zip(drafts.tokens, accepted, next_R.tolist(), strict=True)
    return Verdict([[*kept[:n], token] for kept, n, token in rows], accepted)
