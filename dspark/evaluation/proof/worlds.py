"""Small worlds: a target and a drafter whose distributions are tabulated over every prefix.

Letters: V vocabulary, K drafts of a round, T tokens that a world's target reaches, N = V**K draft
paths. A prefix of d tokens is numbered by its base-V digits, first token most significant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import product

import numpy as np
import torch
from torch import Tensor

Distributions = tuple[Tensor, ...]
"""laws[d] is [V**d, V]: the distribution of token d+1 after each prefix of d tokens."""
Prefix = tuple[int, ...]
"""The tokens of a request that earlier rounds have committed."""


@dataclass(frozen=True)
class World:
    """One round of one request, after some prefix.

    Attributes:
        target: distributions at depths 0..T-1, with T > K.
        draft: the drafter's distributions at depths 0..K-1, as reported to the verifier.
        logits: logits[d] [V**d], the confidence logit of draft d+1 after each prefix.
        drawn: the distributions that drafts are drawn from; None: as reported.
        judged: the target's distributions at depths 0..K as the verifier sees them; None: `target`.
    """

    target: Distributions
    draft: Distributions
    logits: Distributions
    drawn: Distributions | None = None
    judged: Distributions | None = None

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.target[0].shape[1]

    @property
    def block_size(self) -> int:
        """K."""
        return len(self.draft)

    @property
    def horizon(self) -> int:
        """T."""
        return len(self.target)

    def paths(self) -> Tensor:
        """All draft paths, [N, K]."""
        return all_paths(self.vocab_size, self.block_size)

    def path_weights(self) -> Tensor:
        """The probability that the drafter draws each path, [N]."""
        return sequence_distribution(self.drawn or self.draft, self.block_size)

    def path_logits(self) -> Tensor:
        """Confidence logits along each path, [N, K]; that of draft k does not see x_k."""
        paths = self.paths()
        columns = [
            self.logits[k][number(paths[:, :k], self.vocab_size)] for k in range(self.block_size)
        ]
        return torch.stack(columns, dim=1)

    def path_draft_probs(self) -> Tensor:
        """q_k(x_k) along each path, [N, K]."""
        paths = self.paths()
        return along(self.draft, paths).gather(2, paths[:, :, None]).squeeze(2)

    def rows(self) -> tuple[Tensor, Tensor]:
        """What the verifier is given along each path: p [N, K+1, V] and q [N, K, V]."""
        paths = self.paths()
        judged = self.judged or self.target[: self.block_size + 1]
        return along(judged, paths), along(self.draft, paths)


WorldAfter = Callable[[Prefix], World]
"""The round that follows each committed prefix; its world reaches as far as the first one's."""


def all_paths(vocab_size: int, length: int) -> Tensor:
    """Every sequence of `length` tokens, [V**length, length], in the order of its number."""
    sequences = list(product(range(vocab_size), repeat=length))
    return torch.tensor(sequences, dtype=torch.int64).view(vocab_size**length, length)


def number(prefixes_ND: Tensor, vocab_size: int) -> Tensor:
    """The number of each prefix, [N]."""
    total = torch.zeros(prefixes_ND.shape[0], dtype=torch.int64)
    for column in prefixes_ND.unbind(1):
        total = total * vocab_size + column
    return total


def along(laws: Distributions, paths_NL: Tensor) -> Tensor:
    """The distributions met along each path: depths 0..len(laws)-1, [N, len(laws), V]."""
    vocab_size = laws[0].shape[1]
    rows = [law[number(paths_NL[:, :d], vocab_size)] for d, law in enumerate(laws)]
    return torch.stack(rows, dim=1)


def sequence_distribution(laws: Distributions, length: int, start: int = 0) -> Tensor:
    """The distribution of `length` tokens after each prefix of `start` tokens.

    Returns:
        [V**length] for start 0, else [V**start, V**length].
    """
    vocab_size = laws[0].shape[1]
    total = torch.ones(vocab_size**start, 1, dtype=torch.float64)
    for d in range(start, start + length):
        step = laws[d].view(vocab_size**start, -1, vocab_size)
        total = (total[:, :, None] * step).flatten(1)
    return total if start else total[0]


def target_distribution(world: World) -> Tensor:
    """The distribution of T tokens in plain decoding, [V**T]."""
    return sequence_distribution(world.target, world.horizon)


def total_variation(one: Tensor, other: Tensor) -> float:
    """Half the sum of absolute differences."""
    return float((one - other).abs().sum() / 2)


@dataclass(frozen=True)
class Distance:
    """Total variation between a distribution and plain decoding's.

    Attributes:
        request: the farthest of the requests' own distributions.
        joint: of all requests' outputs together; None for one request.
    """

    request: float
    joint: float | None = None

    @property
    def largest(self) -> float:
        """The larger of both."""
        return float(np.max([self.request, self.joint or 0.0]))  # propagates NaN

    @classmethod
    def of(cls, law: Tensor, targets: Sequence[Tensor]) -> Distance:
        """From a joint distribution [V**T] * R to independent ones of the requests, [V**T] each."""
        axes = range(len(targets))
        own = [law.sum(dim=[a for a in axes if a != r]) if len(targets) > 1 else law for r in axes]
        pairs = zip(own, targets, strict=True)
        request = float(np.max([total_variation(one, other) for one, other in pairs]))
        if len(targets) == 1:
            return cls(request)
        independent = reduce(lambda all_, one: torch.tensordot(all_, one, dims=0), targets)
        return cls(request, total_variation(law, independent))

    @classmethod
    def farthest(cls, distances: Sequence[Distance]) -> Distance:
        """The largest of each kind."""
        joints = [d.joint for d in distances if d.joint is not None]
        request = float(np.max([d.request for d in distances]))
        return cls(request, float(np.max(joints)) if joints else None)


HEADS = ("vanilla", "markov", "history")


def random_world(
    seed: int,
    vocab_size: int,
    block_size: int,
    head: str = "markov",
    *,
    zeros: bool = False,
    peak: float = 1.2,
) -> World:
    """A random target over full prefixes, with a random drafter.

    Args:
        seed: of everything.
        vocab_size: V.
        block_size: K.
        head: what the drafter sees: "vanilla" nothing, "markov" the token before, "history" all.
        zeros: whether some probabilities are 0, as filters leave them.
        peak: standard deviation of the logits.
    """
    generator = torch.Generator().manual_seed(seed)

    def table(rows: int) -> Tensor:
        logits = torch.randn(rows, vocab_size, generator=generator, dtype=torch.float64) * peak
        if zeros:
            out = torch.rand(rows, vocab_size, generator=generator) < 0.4
            out[torch.arange(rows), logits.argmax(dim=1)] = False
            logits = logits.masked_fill(out, float("-inf"))
        return logits.softmax(dim=1)

    target = tuple(table(vocab_size**d) for d in range(block_size + 1))
    draft, logits = [], []
    for d in range(block_size):
        seen = {"vanilla": 0, "markov": min(d, 1), "history": d}[head]
        state = torch.arange(vocab_size**d) % vocab_size**seen
        draft.append(table(vocab_size**seen)[state])
        scores = torch.rand(vocab_size**seen, generator=generator, dtype=torch.float64)
        # The first is high, so that most paths reach the places where confidences differ.
        logits.append((scores[state] if d else (1 + scores[state]) / 2).logit())
    return World(target, tuple(draft), tuple(logits))
