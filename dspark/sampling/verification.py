"""Whether a draft may stay: distributions first, then decisions.

One function turns (p, q, drafts, lengths) into keep probabilities, another decides from uniforms,
a third gives the distribution of the token after the kept prefix. The engine calls them; an exact
proof calls the same functions in float64 and enumerates.

Indices: drafts_RK holds x_1..x_K; row k - 1 of q is the distribution that x_k was really drawn from
and row k - 1 of p the target's at the same place, both given x_<k; row `length` of p is that of the
bonus token. Rows are ragged: only the first lengths_R[r] drafts of request r were verified, what
p, q and drafts hold behind them is ignored (draft ids there must still be valid).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from dspark.sampling.distribution import Dense, Distribution, row_chunks

Rule = Literal["token", "block"]


@dataclass(frozen=True)
class Blocks:
    """The distributions along R blocks of L places, each a row of `distribution`.

    Attributes:
        distribution: all rows, in any order.
        row_RL: the row of each place; any row behind a request's length.
    """

    distribution: Distribution
    row_RL: Tensor

    @classmethod
    def dense(cls, probs_RLV: Tensor) -> Blocks:
        """Probabilities of all tokens at every place."""
        shape = probs_RLV.shape[:2]
        rows_RL = torch.arange(shape.numel(), device=probs_RLV.device).view(shape)
        return cls(Dense.of(probs_RLV.flatten(0, 1)), rows_RL)

    def of(self, tokens_RK: Tensor) -> Tensor:
        """The probabilities [R, K] of one token at each of the first K places."""
        rows_RK = self.row_RL[:, : tokens_RK.shape[1]]
        return self.distribution.probability(rows_RK.flatten(), tokens_RK.flatten()).view_as(
            tokens_RK
        )


def keep_probabilities(
    rule: Rule, p: Blocks, q: Blocks, drafts_RK: Tensor, lengths_R: Tensor
) -> Tensor:
    """The probability with which each draft passes its own test.

    token (Leviathan et al. 2023; Chen et al. 2023): min(1, p_k(x_k) / q_k(x_k)).

    block (Sun et al. 2024, arXiv 2403.10444): with P_0 = 1,
    P_i = min(P_{i-1} p_i(x_i) / q_i(x_i), 1) and S_i = sum_x max(P_i p_{i+1}(x) - q_{i+1}(x), 0),
    h_i = S_i / (S_i + 1 - P_i) before the last verified draft and h_length = P_length at it.

    Args:
        rule: the verifier.
        p: the target's distributions, K + 1 places.
        q: the drafter's, K places.
        drafts_RK: draft tokens.
        lengths_R: verified drafts of each request, 0..K.

    Returns:
        [R, K] in the dtype of p; 0 beyond the length.
    """
    if rule == "token":
        keep_RK = _ratios(p, q, drafts_RK).clamp(max=1)
    else:
        keep_RK = _block_keep(p, q, drafts_RK, lengths_R)
    return torch.where(_verified(drafts_RK, lengths_R), keep_RK, torch.zeros_like(keep_RK))


def accepted_lengths(rule: Rule, keep_RK: Tensor, uniforms_RK: Tensor, lengths_R: Tensor) -> Tensor:
    """How many drafts stay, given one uniform number per draft.

    Draft i passes if u_i <= keep_i. The token rule stops at the first that fails; the block rule
    keeps everything up to the *last* that passes, whatever failed before it.

    Args:
        rule: the verifier that gave the keep probabilities.
        keep_RK: keep probabilities.
        uniforms_RK: independent uniforms in (0, 1), of the VERIFY stream.
        lengths_R: verified drafts of each request.

    Returns:
        Accepted lengths [R], int64, 0..length.
    """
    passed_RK = (uniforms_RK <= keep_RK) & _verified(keep_RK, lengths_R)
    if rule == "token":
        return _leading(passed_RK)
    rank_K = torch.arange(1, keep_RK.shape[1] + 1, device=keep_RK.device)
    none_R1 = torch.zeros_like(lengths_R, dtype=torch.int64)[:, None]
    return torch.cat([none_R1, passed_RK * rank_K], dim=1).amax(dim=1)


def next_distribution(
    rule: Rule,
    p: Blocks,
    q: Blocks,
    drafts_RK: Tensor,
    lengths_R: Tensor,
    accepted_R: Tensor,
) -> Distribution:
    """The distribution of the token after the kept prefix.

    After a rejection the residual, proportional to max(P_i p_{i+1} - q_{i+1}, 0) at i = accepted
    (P_i = 1 for the token rule); where all verified drafts stay, p of the stop node: the bonus
    token. Where rounding leaves the residual without mass (p and q equal up to the last bit),
    p itself.

    Args:
        rule: the verifier.
        p: the target's distributions, K + 1 places.
        q: the drafter's, K places.
        drafts_RK: draft tokens.
        lengths_R: verified drafts of each request.
        accepted_R: kept drafts of each request, 0..length.

    Returns:
        One row per request.
    """
    requests_R = torch.arange(accepted_R.shape[0], device=accepted_R.device)
    rows_R = p.row_RL[requests_R, accepted_R]
    num_drafts = drafts_RK.shape[1]
    if num_drafts == 0:
        return p.distribution.rows(rows_R)
    drafted_R = q.row_RL[requests_R, accepted_R.clamp(max=num_drafts - 1)]
    weight_R = torch.ones_like(rows_R, dtype=p.distribution.probs_NC.dtype)
    if rule == "block":
        weight_R = _path_weights(p, q, drafts_RK)[requests_R, accepted_R]
    excess = p.distribution.excess(rows_R, q.distribution, drafted_R, weight_R)
    mass_R = excess.mass().to(weight_R.dtype)
    rejected_R = (accepted_R < lengths_R) & (mass_R > 0)
    probs_RC = torch.where(
        rejected_R[:, None], excess.probs_NC / mass_R[:, None], p.distribution.probs_NC[rows_R]
    )
    return replace(excess, probs_NC=probs_RC)


def coupled_tokens(distribution: Distribution, seed_N: Tensor, position_N: Tensor) -> Tensor:
    """The coupled verifier's token of each row: argmax(log p + g(seed, position, token)).

    Drafter-invariant speculative decoding (Daliri et al. 2024): drafter and target call this with
    the same noise, each on its own distribution, and a draft stays while both name the same token.
    The output is what the target alone would draw, whatever was drafted.

    Args:
        distribution: one per row.
        seed_N: int64 seeds of the rows' requests.
        position_N: int64 absolute positions of the tokens to be drawn.

    Returns:
        Tokens [N], int64.
    """
    return distribution.draw_coupled(seed_N, position_N)


def accepted_by_identity(tokens_RK1: Tensor, drafts_RK: Tensor, lengths_R: Tensor) -> Tensor:
    """How many drafts equal the target's own tokens: for coupled, and for temperature 0.

    Args:
        tokens_RK1: the target's token at each row [R, K+1] (columns behind the length, and the
            last one, are not looked at).
        drafts_RK: draft tokens.
        lengths_R: verified drafts of each request.

    Returns:
        Accepted lengths [R]; the next token of request r is tokens_RK1[r, accepted_R[r]].
    """
    same_RK = tokens_RK1[:, : drafts_RK.shape[1]] == drafts_RK
    return _leading(same_RK & _verified(drafts_RK, lengths_R))


def _leading(passed_RK: Tensor) -> Tensor:
    return passed_RK.to(torch.int64).cumprod(dim=1).sum(dim=1)


def _verified(like_RK: Tensor, lengths_R: Tensor) -> Tensor:
    return torch.arange(like_RK.shape[1], device=like_RK.device) < lengths_R[:, None]


def _ratios(p: Blocks, q: Blocks, drafts_RK: Tensor) -> Tensor:
    """p(x) / q(x); a draft with q = 0 (only rounding can draw it) counts as what p says: 1 or 0."""
    p_RK, q_RK = p.of(drafts_RK), q.of(drafts_RK)
    return torch.where(q_RK > 0, p_RK / q_RK, (p_RK > 0).to(p_RK.dtype))


def _path_weights(p: Blocks, q: Blocks, drafts_RK: Tensor) -> Tensor:
    """P_0..P_K of the block rule, [R, K+1]."""
    ratios_RK = _ratios(p, q, drafts_RK)
    weights = [ratios_RK.new_ones(len(ratios_RK))]
    for k in range(drafts_RK.shape[1]):
        weights.append((weights[-1] * ratios_RK[:, k]).clamp(max=1))
    return torch.stack(weights, dim=1)


def _block_keep(p: Blocks, q: Blocks, drafts_RK: Tensor, lengths_R: Tensor) -> Tensor:
    weights_RK = _path_weights(p, q, drafts_RK)[:, 1:]
    num_drafts = drafts_RK.shape[1]
    if num_drafts == 0:
        return weights_RK
    weights_RJ = weights_RK[:, :-1]  # J = K - 1: a surplus needs a draft behind it
    is_inner_RJ = torch.arange(1, num_drafts, device=lengths_R.device) < lengths_R[:, None]
    surplus_RJ = torch.zeros_like(weights_RJ)
    needed = is_inner_RJ & (weights_RJ > 0)  # without weight there is nothing in excess
    surplus_RJ[needed] = _excess_masses(
        p.distribution,
        p.row_RL[:, 1:num_drafts][needed],
        q.distribution,
        q.row_RL[:, 1:num_drafts][needed],
        weights_RJ[needed],
    )
    total_RJ = surplus_RJ + 1 - weights_RJ
    # total = 0 only for P = 1 before p = q: the prefix is perfect so far, and stays.
    inner_RJ = torch.where(total_RJ > 0, surplus_RJ / total_RJ, torch.ones_like(total_RJ))
    keep_RJ = torch.where(is_inner_RJ, inner_RJ, weights_RJ)
    return torch.cat([keep_RJ, weights_RK[:, -1:]], dim=1)


def _excess_masses(
    p: Distribution, rows_M: Tensor, q: Distribution, others_M: Tensor, weight_M: Tensor
) -> Tensor:
    """sum_x max(w p(x) - q(x), 0) of pairs of rows, [M]."""
    masses = [weight_M.new_zeros(0)]
    for chunk in row_chunks(len(rows_M), p.probs_NC.shape[1]):
        excess = p.excess(rows_M[chunk], q, others_M[chunk], weight_M[chunk])
        masses.append(excess.mass().to(weight_M.dtype))
    return torch.cat(masses)
