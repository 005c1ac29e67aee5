"""From logits and sampling parameters to one law per row, and from a law to a token.

The order is fixed, and the same for drafts and for the target: penalties, logit bias, mask,
temperature, top-k, top-p, min-p. At temperature 0 the law is one-hot at the argmax. Wherever
tokens tie, the lowest ids win. Laws are computed in the logits' dtype, in float32 where that is
narrower, and a draft must be drawn from the very law that its verification is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dspark.errors import NumericsError, RequestError
from dspark.request import SamplingParams
from dspark.sampling.counts import TokenCounts
from dspark.sampling.filters import apply_top_k, apply_top_p_and_min_p

_ROW_TENSORS = (
    "temperature_N",
    "top_k_N",
    "top_p_N",
    "min_p_N",
    "repetition_N",
    "presence_N",
    "frequency_N",
    "bias_tokens_NB",
    "bias_values_NB",
)


@dataclass(frozen=True)
class Chain:
    """The processors of N rows, as tensors (float64, int64 for top_k_N and bias_tokens_NB).

    The flags say what the fast paths may skip. They hold for the rows that the chain was built
    from, and so for any choice among them.

    Attributes:
        temperature_N, top_k_N, top_p_N, min_p_N: as in SamplingParams.
        repetition_N, presence_N, frequency_N: the penalties.
        bias_tokens_NB, bias_values_NB: logit biases, padded with token 0 and value 0.
        greedy: every row has temperature 0.
        sampled: no row has temperature 0.
        penalised: some row has a penalty.
        max_bias_token: the highest token id that a bias names, -1 without any.
        filtered: some row has top-k, top-p or min-p.
    """

    temperature_N: Tensor
    top_k_N: Tensor
    top_p_N: Tensor
    min_p_N: Tensor
    repetition_N: Tensor
    presence_N: Tensor
    frequency_N: Tensor
    bias_tokens_NB: Tensor
    bias_values_NB: Tensor
    greedy: bool
    sampled: bool
    penalised: bool
    max_bias_token: int
    filtered: bool

    @classmethod
    def of(cls, params: Sequence[SamplingParams], device: torch.device | str = "cpu") -> Chain:
        """Build the chain of one row per element of `params`."""
        width = max((len(row.logit_bias) for row in params), default=0)
        tokens, values = [], []
        for row in params:
            padding = [0] * (width - len(row.logit_bias))
            tokens.append([*row.logit_bias.keys(), *padding])
            values.append([*row.logit_bias.values(), *padding])

        def numbers(name: str) -> Tensor:
            return torch.tensor([getattr(row, name) for row in params], dtype=torch.float64).to(
                device
            )

        shape = (len(params), width)
        return cls(
            temperature_N=numbers("temperature"),
            top_k_N=numbers("top_k").to(torch.int64),
            top_p_N=numbers("top_p"),
            min_p_N=numbers("min_p"),
            repetition_N=numbers("repetition_penalty"),
            presence_N=numbers("presence_penalty"),
            frequency_N=numbers("frequency_penalty"),
            bias_tokens_NB=torch.tensor(tokens, dtype=torch.int64, device=device).view(shape),
            bias_values_NB=torch.tensor(values, dtype=torch.float64, device=device).view(shape),
            greedy=all(row.temperature == 0 for row in params),
            sampled=all(row.temperature > 0 for row in params),
            penalised=any(row.has_penalties for row in params),
            max_bias_token=max((token for row in params for token in row.logit_bias), default=-1),
            filtered=any(row.top_k > 0 or row.top_p < 1 or row.min_p > 0 for row in params),
        )

    @property
    def plain(self) -> bool:
        """Whether no row has a penalty, a bias or a filter: temperature is all there is."""
        return not (self.penalised or self.filtered) and self.max_bias_token < 0

    def rows(self, index_M: Tensor | Sequence[int]) -> Chain:
        """The chain of the rows named, in that order; a row may be named repeatedly."""
        index_M = torch.as_tensor(index_M, dtype=torch.int64, device=self.temperature_N.device)
        return replace(self, **{name: getattr(self, name)[index_M] for name in _ROW_TENSORS})


def law(
    logits_NV: Tensor,
    chain: Chain,
    counts: TokenCounts | None = None,
    mask_NV: Tensor | None = None,
) -> Tensor:
    """The law that the next token of each row is drawn from.

    Args:
        logits_NV: raw logits; minus infinity excludes a token.
        chain: processors of the same N rows.
        counts: state of the same N rows, needed where a row has a penalty.
        mask_NV: bool, True where a token is allowed.

    Returns:
        Probabilities [N, V], float32, or float64 for float64 logits.

    Raises:
        NumericsError: a row of logits has NaN or plus infinity, or no finite number.
        RequestError: a penalty comes without counts, a bias names a token outside the vocabulary,
            or penalties, bias and mask leave a row no token.
    """
    _check_logits(logits_NV.amax(dim=1))
    scores_NV = _scores(logits_NV, chain, counts, mask_NV)
    peak_N, best_N = scores_NV.max(dim=1)
    if scores_NV is not logits_NV:
        _check_scores(peak_N)
    if chain.greedy:
        return torch.zeros_like(scores_NV).scatter_(1, best_N[:, None], 1.0)
    temperature_N = chain.temperature_N
    if not chain.sampled:
        temperature_N = torch.where(temperature_N > 0, temperature_N, 1.0)
    floor = torch.finfo(scores_NV.dtype).tiny
    divisor_N = temperature_N.clamp(min=floor).to(scores_NV.dtype)
    # Shifting first keeps a tiny temperature from overflowing.
    scores_NV = (scores_NV - peak_N[:, None]).div_(divisor_N[:, None])
    if chain.filtered:
        apply_top_k(scores_NV, chain.top_k_N)
    probs_NV = torch.softmax(scores_NV, dim=1)
    if chain.filtered:
        apply_top_p_and_min_p(probs_NV, chain.top_p_N, chain.min_p_N)
    if not chain.sampled:
        greedy_M = torch.nonzero(chain.temperature_N == 0).squeeze(1)
        probs_NV[greedy_M] = 0
        probs_NV[greedy_M, best_N[greedy_M]] = 1
    return probs_NV


def greedy_tokens(
    logits_NV: Tensor,
    chain: Chain,
    counts: TokenCounts | None = None,
    mask_NV: Tensor | None = None,
) -> Tensor:
    """Each row's argmax after penalties, bias and mask, ties to the lowest id: the law at T = 0.

    Filters cannot remove the most likely token, so they are skipped, and no law is built.

    Args:
        logits_NV: raw logits, used in their own dtype where nothing changes them.
        chain: processors of the same N rows; temperatures are not looked at.
        counts: state of the same N rows, needed where a row has a penalty.
        mask_NV: bool, True where a token is allowed.

    Returns:
        Tokens [N], int64.

    Raises:
        NumericsError, RequestError: as in `law`.
    """
    if not chain.penalised and chain.max_bias_token < 0 and mask_NV is None:
        peak_N, tokens_N = logits_NV.max(dim=1)
        _check_logits(peak_N)
        return tokens_N
    _check_logits(logits_NV.amax(dim=1))
    peak_N, tokens_N = _scores(logits_NV, chain, counts, mask_NV).max(dim=1)
    _check_scores(peak_N)
    return tokens_N


def rows_without_law(
    logits_NV: Tensor,
    chain: Chain,
    counts: TokenCounts | None = None,
    mask_NV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Which rows make `law` and `greedy_tokens` raise.

    Args:
        logits_NV: raw logits.
        chain: processors of the same N rows.
        counts: state of the same N rows, needed where a row has a penalty.
        mask_NV: bool, True where a token is allowed.

    Returns:
        (rows of logits with NaN or without a finite maximum, other rows that the processors leave
        no token), both bool [N].
    """
    broken_N = ~logits_NV.amax(dim=1).isfinite()
    logits_NV = logits_NV.masked_fill(broken_N[:, None], 0)
    peak_N = _scores(logits_NV, chain, counts, mask_NV).amax(dim=1)
    return broken_N, ~broken_N & ~peak_N.isfinite()


def sample(probs_NV: Tensor, uniforms_N: Tensor) -> Tensor:
    """Draw one token per row by the inverse of the law's distribution function.

    Computed in float64, so that the draw follows the reported law to 2^-52; a token of
    probability 0 is never drawn, and a law need not sum to 1 exactly.

    Args:
        probs_NV: laws, any floating dtype.
        uniforms_N: float64 in (0, 1).

    Returns:
        Tokens [N], int64.
    """
    cdf_NV = probs_NV.cumsum(dim=1, dtype=torch.float64)
    total_N = cdf_NV[:, -1]
    # The first token whose cumulated mass exceeds u * total; the bound guards against rounding up.
    below_N = torch.nextafter(total_N, torch.zeros_like(total_N))
    mass_N1 = torch.minimum(uniforms_N * total_N, below_N)[:, None]
    return torch.searchsorted(cdf_NV, mass_N1, right=True).squeeze(1)


def _scores(
    logits_NV: Tensor, chain: Chain, counts: TokenCounts | None, mask_NV: Tensor | None
) -> Tensor:
    """Logits after penalties, bias and mask, in the dtype of the law."""
    dtype = torch.float64 if logits_NV.dtype == torch.float64 else torch.float32
    scores_NV = logits_NV.to(dtype)
    if chain.penalised:
        scores_NV = _penalise(scores_NV, chain, counts)
    if chain.max_bias_token >= 0:
        if chain.max_bias_token >= scores_NV.shape[1]:
            raise RequestError(
                f"logit_bias names token {chain.max_bias_token}, but the vocabulary has "
                f"{scores_NV.shape[1]} tokens."
            )
        values_NB = chain.bias_values_NB.to(dtype)
        scores_NV = scores_NV.scatter_add(1, chain.bias_tokens_NB, values_NB)
    if mask_NV is not None:
        scores_NV = scores_NV.masked_fill(~mask_NV, float("-inf"))
    return scores_NV


def _penalise(scores_NV: Tensor, chain: Chain, counts: TokenCounts | None) -> Tensor:
    if counts is None:
        raise RequestError("A row has a penalty but no token counts; pass TokenCounts.")
    dtype = scores_NV.dtype
    repetition_N1 = chain.repetition_N.to(dtype)[:, None]
    output_NV = counts.output_NV.to(dtype)
    seen_NV = counts.prompt_NV | (output_NV > 0)
    scaled_NV = torch.where(scores_NV > 0, scores_NV / repetition_N1, scores_NV * repetition_N1)
    scores_NV = torch.where(seen_NV, scaled_NV, scores_NV)
    scores_NV = scores_NV - chain.frequency_N.to(dtype)[:, None] * output_NV
    return scores_NV - chain.presence_N.to(dtype)[:, None] * (output_NV > 0)


def _check_logits(peak_N: Tensor) -> None:
    if not bool(peak_N.isfinite().all()):
        row = int(torch.nonzero(~peak_N.isfinite())[0])
        raise NumericsError(
            f"Row {row} of the logits has NaN or no finite maximum; "
            "check the model's weights and dtype."
        )


def _check_scores(peak_N: Tensor) -> None:
    if not bool(peak_N.isfinite().all()):
        row = int(torch.nonzero(~peak_N.isfinite())[0])
        raise RequestError(
            f"Penalties, logit bias and mask leave row {row} no token; allow at least one."
        )
