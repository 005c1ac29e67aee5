"""Exact laws of speculative decoding in small worlds, by enumeration in float64.

A world has a vocabulary of V tokens and lays out every law over every prefix. One round is
enumerated over all draft paths, verification lengths and verifier outcomes; what follows the round
is drawn from the target. The result is the law of the next K+1 tokens, which must be the target's.
Keep probabilities, decisions and residuals come from the functions that the engine calls.

A prefix of d tokens is numbered by its base-V digits, first token most significant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor

from dspark.sampling.verification import Rule, accepted_lengths, keep_probabilities, next_law

Laws = tuple[Tensor, ...]
"""laws[d] is [V**d, V]: the law of token d+1 after each prefix of d tokens."""


@dataclass(frozen=True)
class World:
    """A target, a drafter and its confidences.

    Attributes:
        target: laws at depths 0..K (or deeper).
        draft: the drafter's laws at depths 0..K-1, as reported to the verifier.
        confidence: confidence[d] [V**d], the confidence of draft d+1 after each prefix.
        drawn: the laws that drafts are really drawn from; None: as reported.
    """

    target: Laws
    draft: Laws
    confidence: Laws
    drawn: Laws | None = None

    @property
    def vocab_size(self) -> int:
        return self.target[0].shape[1]

    @property
    def block_size(self) -> int:
        return len(self.draft)

    def paths(self) -> Tensor:
        """All draft paths, [V**K, K]."""
        return all_paths(self.vocab_size, self.block_size)

    def path_weights(self) -> Tensor:
        """The probability that the drafter draws each path, [V**K]."""
        return sequence_law(self.drawn or self.draft, self.block_size)

    def path_confidences(self) -> Tensor:
        """c_1..c_K along each path, [V**K, K]; c_k does not see x_k."""
        paths = self.paths()
        columns = [
            self.confidence[k][number(paths[:, :k], self.vocab_size)]
            for k in range(self.block_size)
        ]
        return torch.stack(columns, dim=1)

    def path_draft_probs(self) -> Tensor:
        """q_k(x_k) along each path, [V**K, K]."""
        paths = self.paths()
        return along(self.draft, paths).gather(2, paths[:, :, None]).squeeze(2)


@dataclass(frozen=True)
class Verifier:
    """The three functions of verification, each replaceable by a wrong variant."""

    keep: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    decide: Callable[[Tensor, Tensor, Tensor], Tensor]
    next_law: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

    @classmethod
    def of(cls, rule: Rule) -> Verifier:
        return cls(
            partial(keep_probabilities, rule),
            partial(accepted_lengths, rule),
            partial(next_law, rule),
        )


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


def along(laws: Laws, paths_NL: Tensor) -> Tensor:
    """The laws met along each path: depths 0..len(laws)-1, [N, len(laws), V]."""
    vocab_size = laws[0].shape[1]
    rows = [law[number(paths_NL[:, :d], vocab_size)] for d, law in enumerate(laws)]
    return torch.stack(rows, dim=1)


def sequence_law(laws: Laws, length: int, start: int = 0) -> Tensor:
    """The law of `length` tokens after each prefix of `start` tokens.

    Returns:
        [V**length] for start 0, else [V**start, V**length].
    """
    vocab_size = laws[0].shape[1]
    total = torch.ones(vocab_size**start, 1, dtype=torch.float64)
    for d in range(start, start + length):
        step = laws[d].view(vocab_size**start, -1, vocab_size)
        total = (total[:, :, None] * step).flatten(1)
    return total if start else total[0]


def outcomes(keep_RK: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Every pattern of passed and failed tests: uniforms that show it, and its probability [R]."""
    for pattern in product((True, False), repeat=keep_RK.shape[1]):
        passed_RK = torch.tensor(pattern).expand_as(keep_RK)
        uniforms_RK = torch.where(passed_RK, keep_RK / 2, (1 + keep_RK) / 2)
        yield uniforms_RK, torch.where(passed_RK, keep_RK, 1 - keep_RK).prod(dim=1)


def continued(world: World, drafts_RK: Tensor, accepted_R: Tensor, next_RV: Tensor) -> Tensor:
    """The law of K+1 tokens: the kept prefix, the next token, then plain decoding. [R, V**(K+1)]"""
    vocab_size, total = world.vocab_size, world.block_size + 1
    laws = torch.zeros(drafts_RK.shape[0], vocab_size**total, dtype=torch.float64)
    for kept in range(total):
        rows = torch.nonzero(accepted_R == kept).squeeze(1)
        rest = sequence_law(world.target, total - kept - 1, start=kept + 1)
        prefix = number(drafts_RK[rows, :kept], vocab_size)
        block = laws.new_zeros(len(rows), vocab_size**kept, vocab_size, rest.shape[1])
        after = rest.view(vocab_size**kept, vocab_size, -1)[prefix]
        block[torch.arange(len(rows)), prefix] = next_RV[rows, :, None] * after
        laws[rows] = block.flatten(1)
    return laws


def outcome_laws(world: World, verifier: Verifier) -> Tensor:
    """The law of the next K+1 tokens, given the draft path and the verification length.

    Returns:
        [V**K paths, K+1 lengths, V**(K+1) sequences].
    """
    drafts = world.paths()
    p = along(world.target[: world.block_size + 1], drafts)
    q = along(world.draft, drafts)
    per_length = []
    for length in range(world.block_size + 1):
        lengths = torch.full((len(drafts),), length)
        keep = verifier.keep(p, q, drafts, lengths)
        total = torch.zeros(1, dtype=torch.float64)
        for uniforms, weight in outcomes(keep):
            accepted = verifier.decide(keep, uniforms, lengths)
            following = verifier.next_law(p, q, drafts, lengths, accepted)
            total = total + weight[:, None] * continued(world, drafts, accepted, following)
        per_length.append(total)
    return torch.stack(per_length, dim=1)


def request_law(world: World, laws: Tensor, lengths: Tensor) -> Tensor:
    """The law of one request's next K+1 tokens, where path n is verified to lengths[n].

    Args:
        world: the request.
        laws: its `outcome_laws`.
        lengths: one verification length per path.
    """
    return world.path_weights() @ laws[torch.arange(len(lengths)), lengths]


def joint_law(
    first: World,
    second: World,
    verifier: Verifier,
    schedule: Callable[[int, int], tuple[int, int]],
) -> Tensor:
    """The joint law of two requests in one round.

    Args:
        first: one request.
        second: the other, with the same V and K.
        verifier: of both.
        schedule: both requests' path numbers -> both verification lengths.

    Returns:
        [V**(K+1), V**(K+1)].
    """
    laws_1, laws_2 = outcome_laws(first, verifier), outcome_laws(second, verifier)
    weights_1, weights_2 = first.path_weights(), second.path_weights()
    total = torch.zeros(laws_1.shape[2], laws_2.shape[2], dtype=torch.float64)
    for i, j in product(range(len(weights_1)), range(len(weights_2))):
        length_1, length_2 = schedule(i, j)
        pair = torch.outer(laws_1[i, length_1], laws_2[j, length_2])
        total += weights_1[i] * weights_2[j] * pair
    return total


def total_variation(one: Tensor, other: Tensor) -> float:
    """Half the sum of absolute differences."""
    return float((one - other).abs().sum() / 2)


def target_law(world: World) -> Tensor:
    """What plain decoding gives: the law of K+1 tokens."""
    return sequence_law(world.target, world.block_size + 1)


HEADS = ("vanilla", "markov", "history")


def random_world(
    seed: int, vocab_size: int, block_size: int, head: str = "markov", zeros: bool = False
) -> World:
    """A random target over full prefixes, with a random drafter.

    Args:
        seed: of everything.
        vocab_size: V.
        block_size: K.
        head: what the drafter sees: "vanilla" nothing, "markov" the token before, "history" all.
        zeros: whether some probabilities are 0, as filters leave them.
    """
    generator = torch.Generator().manual_seed(seed)

    def table(rows: int) -> Tensor:
        logits = torch.randn(rows, vocab_size, generator=generator, dtype=torch.float64) * 1.2
        if zeros:
            out = torch.rand(rows, vocab_size, generator=generator) < 0.4
            out[torch.arange(rows), logits.argmax(dim=1)] = False
            logits = logits.masked_fill(out, float("-inf"))
        return logits.softmax(dim=1)

    target = tuple(table(vocab_size**d) for d in range(block_size + 1))
    draft, confidence = [], []
    for d in range(block_size):
        seen = {"vanilla": 0, "markov": min(d, 1), "history": d}[head]
        state = torch.arange(vocab_size**d) % vocab_size**seen
        draft.append(table(vocab_size**seen)[state])
        scores = torch.rand(vocab_size**seen, generator=generator, dtype=torch.float64)
        # The first is high, so that most paths reach the places where confidences differ.
        confidence.append(scores[state] if d else (1 + scores[state]) / 2)
    return World(target, tuple(draft), tuple(confidence))
