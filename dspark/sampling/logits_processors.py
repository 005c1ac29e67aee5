"""Logits processors: one distribution per row, from logits and sampling parameters.

The order is fixed, and the same for drafts and for the target: penalties, logit bias, mask,
temperature, top-k, top-p, min-p. At temperature 0 it is one-hot at the argmax. Wherever tokens
tie, the lowest ids win. Probabilities are in the logits' dtype, in float32 where that is narrower,
and a draft must be drawn from the very distribution that its verification is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dspark.errors import NumericsError, RequestError
from dspark.request import SamplingParams
from dspark.sampling.distribution import Dense, Distribution, Sparse, row_chunks
from dspark.sampling.filters import Tails, likeliest
from dspark.sampling.token_counts import TokenCounts

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
        narrow: every row has temperature 0 or one of these, so that few tokens can come.
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
    narrow: bool

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
            filtered=any(row.has_filters for row in params),
            narrow=all(row.temperature == 0 or row.has_filters for row in params),
        )

    @property
    def plain(self) -> bool:
        """Whether no row has a penalty, a bias or a filter: temperature is all there is."""
        return not (self.penalised or self.filtered) and self.max_bias_token < 0

    def rows(self, index_M: Tensor | Sequence[int] | slice) -> Chain:
        """The chain of the rows named, in that order; a row may be named repeatedly."""
        if not isinstance(index_M, slice):
            index_M = torch.as_tensor(index_M, dtype=torch.int64, device=self.temperature_N.device)
        return replace(self, **{name: getattr(self, name)[index_M] for name in _ROW_TENSORS})

    @property
    def tails(self) -> Tails:
        """The filters; temperature 0 is top-k of 1."""
        if self.sampled:
            return Tails(self.top_k_N, self.top_p_N, self.min_p_N)
        greedy_N = self.temperature_N == 0
        return Tails(
            self.top_k_N.masked_fill(greedy_N, 1),
            self.top_p_N.masked_fill(greedy_N, 1),
            self.min_p_N.masked_fill(greedy_N, 0),
        )


@dataclass(frozen=True)
class Known:
    """The tokens that a drafter's logits are of, where it does not give one for every token.

    All others have probability 0.

    Attributes:
        tokens: int64 in ascending order, [C] for all rows or [N, C] for each its own.
        vocab_size: V.
    """

    tokens: Tensor
    vocab_size: int

    def of(self, rows_NV: Tensor) -> Tensor:
        """The columns [N, C] of these tokens."""
        if self.tokens.dim() == 1:
            return rows_NV[:, self.tokens]
        return rows_NV.gather(1, self.tokens)

    def columns(self, tokens_NB: Tensor) -> tuple[Tensor, Tensor]:
        """Columns [N, B] of tokens, and whether they are known; column 0 where they are not."""
        place_NB = torch.searchsorted(self.tokens, tokens_NB).clamp_(max=self.tokens.shape[-1] - 1)
        found_NB = self.named(place_NB) == tokens_NB
        return place_NB.masked_fill_(~found_NB, 0), found_NB

    def named(self, columns_NM: Tensor) -> Tensor:
        """The tokens [N, M] of columns."""
        if self.tokens.dim() == 1:
            return self.tokens[columns_NM]
        return self.tokens.gather(1, columns_NM)

    def rows(self, index_M: Tensor | slice) -> Known:
        """The rows named, in that order."""
        return self if self.tokens.dim() == 1 else replace(self, tokens=self.tokens[index_M])


def token_distribution(
    logits_NC: Tensor,
    chain: Chain,
    counts: TokenCounts | None = None,
    mask_NV: Tensor | None = None,
    known: Known | None = None,
    *,
    out: Tensor | None = None,
) -> Distribution:
    """The distribution that the next token of each row is drawn from.

    Args:
        logits_NC: raw logits; minus infinity excludes a token.
        chain: processors of the same N rows.
        counts: state of the same N rows, needed where a row has a penalty.
        mask_NV: bool, True where a token is allowed.
        known: the tokens of the columns; None where column c is token c.
        out: where numbers for every column go, if that is what comes out.

    Returns:
        `Sparse` where few tokens can come in every row, else `Dense`; float32, or float64 for
        float64 logits.

    Raises:
        NumericsError: a row of logits has NaN or plus infinity, or no finite number.
        RequestError: a penalty comes without counts, a bias names a token outside the vocabulary,
            or penalties, bias and mask leave a row no token.
    """
    _check_logits(logits_NC.amax(dim=1))
    whole = _Inputs(logits_NC, chain, counts, mask_NV, known)
    narrow, probs_NC = list[Sparse](), None if out is None else out[: len(logits_NC)]
    if probs_NC is None and not chain.narrow:
        probs_NC = torch.empty_like(logits_NC, dtype=probs_dtype(logits_NC))
    for chunk in row_chunks(*logits_NC.shape):
        inputs = whole.rows(chunk)
        scores_MC = inputs.scores()
        if inputs.changes:
            _check_scores(scores_MC.amax(dim=1), chunk.start)
        tempered_MC = _tempered(scores_MC, inputs.chain)
        if probs_NC is None or chain.narrow:
            narrow.append(_sparse(tempered_MC, inputs))
            continue
        torch.softmax(tempered_MC, dim=1, out=probs_NC[chunk])
        if chain.filtered or not chain.sampled:
            _cut_some(probs_NC[chunk], tempered_MC, inputs)
    if probs_NC is None or chain.narrow:
        return Sparse.stack(narrow)
    if known is None:
        return Dense.of(probs_NC)
    if known.tokens.dim() == 2:
        return Sparse(probs_NC, known.vocab_size, known.tokens)
    return Dense(probs_NC, known.vocab_size, known.tokens)


def greedy_tokens(
    logits_NC: Tensor,
    chain: Chain,
    counts: TokenCounts | None = None,
    mask_NV: Tensor | None = None,
    known: Known | None = None,
) -> Tensor:
    """Each row's argmax after penalties, bias and mask, ties to the lowest id: what T = 0 draws.

    Filters cannot remove the most likely token, so they are skipped, and no distribution is built.

    Args:
        logits_NC: raw logits, used in their own dtype where nothing changes them.
        chain: processors of the same N rows; temperatures are not looked at.
        counts: state of the same N rows, needed where a row has a penalty.
        mask_NV: bool, True where a token is allowed.
        known: the tokens of the columns; None where column c is token c.

    Returns:
        Tokens [N], int64.

    Raises:
        NumericsError, RequestError: as in `token_distribution`.
    """
    inputs = _Inputs(logits_NC, chain, counts, mask_NV, known)
    if not inputs.changes:
        peak_N, columns_N = logits_NC.max(dim=1)
        _check_logits(peak_N)
    else:
        _check_logits(logits_NC.amax(dim=1))
        peak_N, columns_N = inputs.scores().max(dim=1)
        _check_scores(peak_N)
    return columns_N if known is None else known.named(columns_N[:, None]).squeeze(1)


def rows_without_distribution(
    logits_NC: Tensor,
    chain: Chain,
    counts: TokenCounts | None = None,
    mask_NV: Tensor | None = None,
    known: Known | None = None,
) -> tuple[Tensor, Tensor]:
    """Which rows make `token_distribution` and `greedy_tokens` raise.

    Args:
        logits_NC: raw logits.
        chain: processors of the same N rows.
        counts: state of the same N rows, needed where a row has a penalty.
        mask_NV: bool, True where a token is allowed.
        known: the tokens of the columns; None where column c is token c.

    Returns:
        (rows of logits with NaN or without a finite maximum, other rows that the processors leave
        no token), both bool [N].
    """
    broken_N = ~logits_NC.amax(dim=1).isfinite()
    logits_NC = logits_NC.masked_fill(broken_N[:, None], 0)
    peak_N = _Inputs(logits_NC, chain, counts, mask_NV, known).scores().amax(dim=1)
    return broken_N, ~broken_N & ~peak_N.isfinite()


@dataclass(frozen=True)
class _Inputs:
    """What the distribution of N rows is made of."""

    logits_NC: Tensor
    chain: Chain
    counts: TokenCounts | None
    mask_NV: Tensor | None
    known: Known | None

    @property
    def changes(self) -> bool:
        """Whether penalties, bias or mask change a score."""
        return self.chain.penalised or self.chain.max_bias_token >= 0 or self.mask_NV is not None

    @property
    def vocab_size(self) -> int:
        return self.logits_NC.shape[1] if self.known is None else self.known.vocab_size

    def rows(self, chunk: slice) -> _Inputs:
        """A slice of the rows."""
        counts = self.counts
        if counts is not None:
            counts = TokenCounts(counts.prompt_NV[chunk], counts.output_NV[chunk])
        return _Inputs(
            self.logits_NC[chunk],
            self.chain.rows(chunk),
            counts,
            None if self.mask_NV is None else self.mask_NV[chunk],
            None if self.known is None else self.known.rows(chunk),
        )

    def scores(self) -> Tensor:
        """Logits after penalties, bias and mask, in the dtype of the law."""
        chain, known = self.chain, self.known
        scores_NC = self.logits_NC.to(probs_dtype(self.logits_NC))
        if chain.penalised:
            scores_NC = self._penalise(scores_NC)
        if chain.max_bias_token >= 0:
            if chain.max_bias_token >= self.vocab_size:
                raise RequestError(
                    f"logit_bias names token {chain.max_bias_token}, but the vocabulary has "
                    f"{self.vocab_size} tokens."
                )
            tokens_NB, values_NB = chain.bias_tokens_NB, chain.bias_values_NB.to(scores_NC.dtype)
            if known is not None:
                tokens_NB, found_NB = known.columns(tokens_NB)
                values_NB = values_NB.masked_fill(~found_NB, 0)
            scores_NC = scores_NC.scatter_add(1, tokens_NB, values_NB)
        if self.mask_NV is not None:
            mask_NC = self.mask_NV if known is None else known.of(self.mask_NV)
            scores_NC = scores_NC.masked_fill(~mask_NC, float("-inf"))
        return scores_NC

    def _penalise(self, scores_NC: Tensor) -> Tensor:
        chain, counts, known, dtype = self.chain, self.counts, self.known, scores_NC.dtype
        if counts is None:
            raise RequestError("A row has a penalty but no token counts; pass TokenCounts.")
        prompt_NC, output_NC = counts.prompt_NV, counts.output_NV
        if known is not None:
            prompt_NC, output_NC = known.of(prompt_NC), known.of(output_NC)
        repetition_N1 = chain.repetition_N.to(dtype)[:, None]
        output_NC = output_NC.to(dtype)
        seen_NC = prompt_NC | (output_NC > 0)
        scaled_NC = torch.where(scores_NC > 0, scores_NC / repetition_N1, scores_NC * repetition_N1)
        scores_NC = torch.where(seen_NC, scaled_NC, scores_NC)
        scores_NC = scores_NC - chain.frequency_N.to(dtype)[:, None] * output_NC
        return scores_NC - chain.presence_N.to(dtype)[:, None] * (output_NC > 0)


def probs_dtype(logits_NC: Tensor) -> torch.dtype:
    """What distributions are computed in: float32, or float64 for float64 logits."""
    return torch.float64 if logits_NC.dtype == torch.float64 else torch.float32


def _tempered(scores_NC: Tensor, chain: Chain) -> Tensor:
    """Scores over temperature, up to a constant of each row; temperature 0 counts as 1."""
    temperature_N = chain.temperature_N
    if bool(((temperature_N == 1) | (temperature_N == 0)).all()):
        return scores_NC  # to the bit the softmax of what is computed below
    temperature_N = torch.where(temperature_N > 0, temperature_N, 1.0)
    divisor_N = temperature_N.clamp(min=torch.finfo(scores_NC.dtype).tiny).to(scores_NC.dtype)
    # Shifting first keeps a tiny temperature from overflowing.
    return (scores_NC - scores_NC.amax(dim=1, keepdim=True)).div_(divisor_N[:, None])


def _sparse(tempered_NC: Tensor, inputs: _Inputs) -> Sparse:
    """What the filters leave of each row."""
    columns_NM, probs_NM = likeliest(tempered_NC, inputs.chain.tails)
    columns_NM.clamp_(max=tempered_NC.shape[1] - 1)
    if inputs.known is None:
        return Sparse(probs_NM, inputs.vocab_size, columns_NM)
    tokens_NM = inputs.known.named(columns_NM)
    return Sparse(probs_NM, inputs.vocab_size, tokens_NM)


def _cut_some(probs_NC: Tensor, tempered_NC: Tensor, inputs: _Inputs) -> None:
    """Apply the filters of those rows that have some, in place."""
    chain = inputs.chain
    cuts_N = (chain.top_k_N > 0) | (chain.top_p_N < 1) | (chain.min_p_N > 0)
    rows_M = torch.nonzero(cuts_N | (chain.temperature_N == 0)).squeeze(1)
    if rows_M.numel():
        columns_MK, probs_MK = likeliest(tempered_NC[rows_M], chain.tails.rows(rows_M))
        columns_MK.clamp_(max=probs_NC.shape[1] - 1)
        probs_MC = torch.zeros_like(probs_NC[rows_M])
        probs_NC[rows_M] = probs_MC.scatter_add_(1, columns_MK, probs_MK)


def _check_logits(peak_N: Tensor) -> None:
    if not bool(peak_N.isfinite().all()):
        row = int(torch.nonzero(~peak_N.isfinite())[0])
        raise NumericsError(
            f"Row {row} of the logits has NaN or no finite maximum; "
            "check the model's weights and dtype."
        )


def _check_scores(peak_N: Tensor, first_row: int = 0) -> None:
    if not bool(peak_N.isfinite().all()):
        row = first_row + int(torch.nonzero(~peak_N.isfinite())[0])
        raise RequestError(
            f"Penalties, logit bias and mask leave row {row} no token; allow at least one."
        )
