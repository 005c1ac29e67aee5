"""Distributions over the vocabulary in two forms, by how many tokens can come.

Filters leave a few tokens of tens of thousands, so `Sparse` rows hold these alone; without filters
`Dense` rows hold a number per token. A request's form follows from its parameters, never from who
else is in the batch, and no result of a row depends on how far the other rows of a `Sparse` batch
pad it: sums run from the first token to the last, in float64.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import Self

from dspark.sampling.noise import gumbel, most_noisy

_BLOCK_TOKENS = 128
_CHUNK_NUMBERS = 1 << 19


def row_chunks(rows: int, columns: int) -> Iterator[slice]:
    """Slices of rows that several passes find in the processor's cache."""
    step = max(1, _CHUNK_NUMBERS // max(columns, 1))
    for begin in range(0, rows, step):
        yield slice(begin, min(begin + step, rows))


@dataclass(frozen=True)
class Distribution(ABC):
    """N distributions over V tokens; rows need not sum to 1 exactly.

    Attributes:
        probs_NC: the numbers that are held.
        vocab_size: V.
    """

    probs_NC: Tensor
    vocab_size: int

    def __len__(self) -> int:
        return len(self.probs_NC)

    @abstractmethod
    def rows(self, index_M: Tensor) -> Self:
        """The rows named, in that order; copies."""

    @abstractmethod
    def at(self, rows_M: Tensor, tokens_MC: Tensor) -> Tensor:
        """Probabilities [M, C] of tokens in the rows named, 0 where a row does not hold one."""

    @abstractmethod
    def subtract_from(self, probs_MV: Tensor, rows_M: Tensor) -> None:
        """Subtract the rows named from dense rows, in place."""

    @abstractmethod
    def mass(self) -> Tensor:
        """The sum of each row, float64 [N]."""

    @abstractmethod
    def draw(self, uniforms_N: Tensor) -> Tensor:
        """One token [N] per row, by the inverse of its distribution function, in float64.

        A token of probability 0 is never drawn.
        """

    @abstractmethod
    def draw_coupled(self, seed_N: Tensor, position_N: Tensor) -> Tensor:
        """argmax(log p + g(seed, position, token)) of each row, [N]."""

    @abstractmethod
    def dense(self) -> Tensor:
        """All probabilities, [N, V]."""

    @abstractmethod
    def spread(self, rows_M: Tensor, count: int) -> Self:
        """`count` rows, of which those named are these, and the others are token 0 for sure."""

    @abstractmethod
    def excess(
        self, rows_M: Tensor, other: Distribution, others_M: Tensor, weight_M: Tensor
    ) -> Self:
        """max(w p - q, 0) of pairs of rows, p of this and q of the other one, [M]."""

    def probability(self, rows_M: Tensor, tokens_M: Tensor) -> Tensor:
        """The probability [M] of one token in each of the rows named."""
        return self.at(rows_M, tokens_M[:, None]).squeeze(1)


@dataclass(frozen=True)
class Dense(Distribution):
    """A number for every token, or for every token of a drafter's own vocabulary.

    Attributes:
        columns_C: the token of each column, ascending; None where column c is token c.
    """

    columns_C: Tensor | None = None

    @classmethod
    def of(cls, probs_NV: Tensor) -> Dense:
        """Probabilities of all tokens."""
        return cls(probs_NV, probs_NV.shape[1])

    def rows(self, index_M: Tensor) -> Dense:
        return Dense(self.probs_NC[index_M], self.vocab_size, self.columns_C)

    def at(self, rows_M: Tensor, tokens_MC: Tensor) -> Tensor:
        if self.columns_C is None:
            return self.probs_NC[rows_M[:, None], tokens_MC]
        place_MC = torch.searchsorted(self.columns_C, tokens_MC.contiguous())
        place_MC.clamp_(max=self.columns_C.numel() - 1)
        probs_MC = self.probs_NC[rows_M[:, None], place_MC]
        return probs_MC.masked_fill_(self.columns_C[place_MC] != tokens_MC, 0)

    def subtract_from(self, probs_MV: Tensor, rows_M: Tensor) -> None:
        rows_MC = self.probs_NC[rows_M]
        if self.columns_C is None:
            probs_MV -= rows_MC
        else:
            # No column comes twice; adding by index takes 20 times as long along rows.
            probs_MV.scatter_add_(1, self.columns_C.expand_as(rows_MC), rows_MC.neg_())

    def mass(self) -> Tensor:
        return _block_masses(self.probs_NC).sum(dim=1)

    def draw(self, uniforms_N: Tensor) -> Tensor:
        """By blocks first, then within the block: float64 sums of blocks are few."""
        count = self.probs_NC.shape[1]
        cdf_NB = _block_masses(self.probs_NC).cumsum(dim=1)
        block_N, rest_N = _invert(cdf_NB, uniforms_N * cdf_NB[:, -1])
        inside = torch.arange(_BLOCK_TOKENS, device=block_N.device)
        place_NS = block_N[:, None] * _BLOCK_TOKENS + inside
        probs_NS = self.probs_NC.gather(1, place_NS.clamp(max=count - 1))
        probs_NS = probs_NS.masked_fill(place_NS >= count, 0)
        column_N = block_N * _BLOCK_TOKENS
        column_N += _invert(probs_NS.cumsum(dim=1, dtype=torch.float64), rest_N)[0]
        return column_N if self.columns_C is None else self.columns_C[column_N]

    def draw_coupled(self, seed_N: Tensor, position_N: Tensor) -> Tensor:
        column_N = most_noisy(self.probs_NC, seed_N, position_N, self.columns_C)
        return column_N if self.columns_C is None else self.columns_C[column_N]

    def dense(self) -> Tensor:
        if self.columns_C is None:
            return self.probs_NC
        probs_NV = self.probs_NC.new_zeros(len(self), self.vocab_size)
        return probs_NV.index_copy_(1, self.columns_C, self.probs_NC)

    def spread(self, rows_M: Tensor, count: int) -> Dense:
        probs_NC = self.probs_NC.new_zeros(count, self.probs_NC.shape[1])
        probs_NC[:, 0] = 1
        probs_NC[rows_M] = self.probs_NC
        return Dense(probs_NC, self.vocab_size, self.columns_C)

    def excess(
        self, rows_M: Tensor, other: Distribution, others_M: Tensor, weight_M: Tensor
    ) -> Dense:
        probs_MC = self.probs_NC[rows_M].mul_(weight_M[:, None])
        other.subtract_from(probs_MC, others_M)
        return Dense(probs_MC.clamp_(min=0), self.vocab_size, self.columns_C)


@dataclass(frozen=True)
class Sparse(Distribution):
    """The tokens that can come, and their probabilities.

    Attributes:
        tokens_NC: tokens in ascending order; rows that have fewer end in the last token of the
            vocabulary, repeated with probability 0.
    """

    tokens_NC: Tensor

    @classmethod
    def stack(cls, parts: Sequence[Sparse]) -> Sparse:
        """The rows of all parts, one after the other."""
        if len(parts) == 1:
            return parts[0]
        width, last = max(part.probs_NC.shape[1] for part in parts), parts[0].vocab_size - 1
        probs, tokens = [], []
        for part in parts:
            missing = (0, width - part.probs_NC.shape[1])
            probs.append(pad(part.probs_NC, missing))
            tokens.append(pad(part.tokens_NC, missing, value=last))
        return cls(torch.cat(probs), last + 1, torch.cat(tokens))

    def rows(self, index_M: Tensor) -> Sparse:
        return Sparse(self.probs_NC[index_M], self.vocab_size, self.tokens_NC[index_M])

    def at(self, rows_M: Tensor, tokens_MC: Tensor) -> Tensor:
        held_MD = self.tokens_NC[rows_M]
        place_MC = torch.searchsorted(held_MD, tokens_MC.contiguous())
        place_MC.clamp_(max=held_MD.shape[1] - 1)
        probs_MC = self.probs_NC[rows_M].gather(1, place_MC)
        return probs_MC.masked_fill_(held_MD.gather(1, place_MC) != tokens_MC, 0)

    def subtract_from(self, probs_MV: Tensor, rows_M: Tensor) -> None:
        probs_MV.scatter_add_(1, self.tokens_NC[rows_M], -self.probs_NC[rows_M])

    def mass(self) -> Tensor:
        return self.probs_NC.cumsum(dim=1, dtype=torch.float64)[:, -1]

    def draw(self, uniforms_N: Tensor) -> Tensor:
        cdf_NC = self.probs_NC.cumsum(dim=1, dtype=torch.float64)
        column_N = _invert(cdf_NC, uniforms_N * cdf_NC[:, -1])[0]
        return self.tokens_NC.gather(1, column_N[:, None]).squeeze(1)

    def draw_coupled(self, seed_N: Tensor, position_N: Tensor) -> Tensor:
        noise_NC = gumbel(seed_N, position_N, self.tokens_NC)
        best_N1 = noise_NC.add_(self.probs_NC.to(torch.float64).log()).argmax(dim=1, keepdim=True)
        return self.tokens_NC.gather(1, best_N1).squeeze(1)

    def dense(self) -> Tensor:
        probs_NV = self.probs_NC.new_zeros(len(self), self.vocab_size)
        return probs_NV.scatter_add_(1, self.tokens_NC, self.probs_NC)

    def spread(self, rows_M: Tensor, count: int) -> Sparse:
        width = self.probs_NC.shape[1]
        probs_NC = self.probs_NC.new_zeros(count, width)
        tokens_NC = self.tokens_NC.new_full((count, width), self.vocab_size - 1)
        probs_NC[:, 0], tokens_NC[:, 0] = 1, 0
        probs_NC[rows_M], tokens_NC[rows_M] = self.probs_NC, self.tokens_NC
        return Sparse(probs_NC, self.vocab_size, tokens_NC)

    def excess(
        self, rows_M: Tensor, other: Distribution, others_M: Tensor, weight_M: Tensor
    ) -> Sparse:
        tokens_MC = self.tokens_NC[rows_M]
        probs_MC = self.probs_NC[rows_M].mul_(weight_M[:, None])
        # Where p is 0 nothing is in excess, so no other token of q matters.
        probs_MC -= other.at(others_M, tokens_MC)
        return Sparse(probs_MC.clamp_(min=0), self.vocab_size, tokens_MC)


def _block_masses(probs_NC: Tensor) -> Tensor:
    """Sums of blocks of columns, float64 [N, B]."""
    blocks = probs_NC.shape[1] // _BLOCK_TOKENS
    whole, rest = probs_NC[:, : blocks * _BLOCK_TOKENS], probs_NC[:, blocks * _BLOCK_TOKENS :]
    blocks_NBS = torch.unflatten(whole, 1, (blocks, _BLOCK_TOKENS))
    masses_NB = blocks_NBS.sum(dim=2, dtype=torch.float64)
    if rest.shape[1] == 0:
        return masses_NB
    return torch.cat([masses_NB, rest.sum(dim=1, keepdim=True, dtype=torch.float64)], dim=1)


def _invert(cdf_NC: Tensor, mass_N: Tensor) -> tuple[Tensor, Tensor]:
    """The first column whose cumulated mass exceeds `mass_N`, and the mass left before it."""
    total_N = cdf_NC[:, -1]
    # The bound guards against a mass that was rounded up to the total.
    mass_N = torch.minimum(mass_N, torch.nextafter(total_N, torch.zeros_like(total_N)))
    column_N1 = torch.searchsorted(cdf_NC, mass_N[:, None], right=True)
    before_N1 = pad(cdf_NC, (1, 0)).gather(1, column_N1)
    return column_N1.squeeze(1), mass_N - before_N1.squeeze(1)
