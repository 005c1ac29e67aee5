"""Enumeration of speculative rounds: the exact distribution of their output.

Every draft path, verification length and verifier outcome of one or more rounds is enumerated, for
one request or several that share a schedule; tokens after the last round are drawn from the target.
Keep probabilities, decisions, residuals and lengths come from the functions that the engine calls,
looked up in their modules at run time, so that a change there takes effect here. The result must be
the target's distribution, of each request and of all of them jointly.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial, reduce
from itertools import product

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dspark.evaluation.proof.worlds import (
    Prefix,
    World,
    WorldAfter,
    number,
    sequence_distribution,
    target_distribution,
)
from dspark.sampling import verification
from dspark.sampling.distribution import Dense, Sparse
from dspark.sampling.verification import Blocks, Rule
from dspark.scheduling import survival as chances

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
RULES: tuple[Rule, ...] = ("token", "block")
Form = Callable[[Tensor], Blocks]
"""Probabilities [R, L, V] in the form in which they are verified."""


def sparse(probs_RLV: Tensor) -> Blocks:
    """Distributions held by the tokens that have mass, rows padded as in a batch."""
    blocks = Blocks.dense(probs_RLV)
    probs_NV = probs_RLV.flatten(0, 1)
    vocab_size = probs_NV.shape[1]
    tokens_NV = torch.arange(vocab_size).expand_as(probs_NV).masked_fill(probs_NV <= 0, vocab_size)
    tokens_NC = tokens_NV.sort(dim=1).values[:, : int((probs_NV > 0).sum(dim=1).max()) + 1]
    padded_NC = tokens_NC == vocab_size
    tokens_NC = tokens_NC.clamp(max=vocab_size - 1)
    probs_NC = probs_NV.gather(1, tokens_NC).masked_fill(padded_NC, 0)
    return Blocks(Sparse(probs_NC, vocab_size, tokens_NC), blocks.row_RL)


def of_known(probs_RLV: Tensor) -> Blocks:
    """Distributions over the tokens that have mass anywhere, as of a reduced vocabulary."""
    blocks = Blocks.dense(probs_RLV)
    probs_NV = probs_RLV.flatten(0, 1)
    known_C = torch.nonzero((probs_NV > 0).any(dim=0)).squeeze(1)
    law = Dense(probs_NV[:, known_C], probs_NV.shape[1], known_C)
    return Blocks(law, blocks.row_RL)


@dataclass(frozen=True)
class Verifier:
    """The three functions of verification, each replaceable by a wrong variant."""

    keep: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    decide: Callable[[Tensor, Tensor, Tensor], Tensor]
    next_distribution: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

    @classmethod
    def of(cls, rule: Rule, target: Form = Blocks.dense, draft: Form = Blocks.dense) -> Verifier:
        """The production functions of a rule, given distributions in some form."""

        def keep(p: Tensor, q: Tensor, drafts: Tensor, lengths: Tensor) -> Tensor:
            blocks = target(p), draft(q)
            return verification.keep_probabilities(rule, *blocks, drafts, lengths)

        def next_distribution(
            p: Tensor, q: Tensor, drafts: Tensor, lengths: Tensor, kept: Tensor
        ) -> Tensor:
            blocks = target(p), draft(q)
            return verification.next_distribution(rule, *blocks, drafts, lengths, kept).dense()

        return cls(keep, partial(verification.accepted_lengths, rule), next_distribution)


@dataclass(frozen=True)
class View:
    """What R requests have drafted: more than a schedule may look at, so that wrong ones can.

    Attributes:
        logits_RK: confidence logits.
        drafts_RK: the tokens drawn.
        draft_probs_RK: q_k(x_k).
    """

    logits_RK: FloatArray
    drafts_RK: IntArray
    draft_probs_RK: FloatArray

    @cached_property
    def survivals_RK(self) -> FloatArray:
        """What a schedule may make of the confidences."""
        return chances.survival(chances.confidence(self.logits_RK))


Memory = Hashable
"""What a schedule knows of earlier rounds; None before the first."""


def _forget(_view: View, _accepted: IntArray, _verified: IntArray) -> Memory:
    return None


@dataclass(frozen=True)
class Schedule:
    """Verification lengths of a round, and what is remembered of it afterwards.

    Attributes:
        lengths: view and memory -> lengths [R].
        remember: view, accepted and verified lengths -> memory of the next round.
    """

    lengths: Callable[[View, Memory], IntArray]
    remember: Callable[[View, IntArray, IntArray], Memory] = _forget


def outcomes(keep_RK: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Every pattern of passed and failed tests: uniforms that show it, and its probability [R]."""
    for pattern in product((True, False), repeat=keep_RK.shape[1]):
        passed_RK = torch.tensor(pattern).expand_as(keep_RK)
        uniforms_RK = torch.where(passed_RK, keep_RK / 2, (1 + keep_RK) / 2)
        yield uniforms_RK, torch.where(passed_RK, keep_RK, 1 - keep_RK).prod(dim=1)


def verdicts(world: World, verifier: Verifier) -> Tensor:
    """The chance of every verdict, given the draft path and the verification length.

    Returns:
        [N paths, K+1 lengths, K+1 accepted, V next tokens].
    """
    drafts = world.paths()
    p, q = world.rows()
    rows, block_size = torch.arange(len(drafts)), world.block_size
    found = torch.zeros(len(drafts), block_size + 1, block_size + 1, world.vocab_size).double()
    for length in range(block_size + 1):
        lengths = torch.full((len(drafts),), length)
        keep = verifier.keep(p, q, drafts, lengths)
        for uniforms, weight in outcomes(keep):
            accepted = verifier.decide(keep, uniforms, lengths)
            following = verifier.next_distribution(p, q, drafts, lengths, accepted)
            found[rows, length, accepted] += weight[:, None] * following
    return found


def continued(world: World, verdicts_NLAV: Tensor) -> Tensor:
    """Distribution [N, L, V**T]: the kept prefix, the next token, then plain decoding."""
    paths, vocab_size = world.paths(), world.vocab_size
    count, lengths = verdicts_NLAV.shape[:2]
    laws = torch.zeros(count, lengths, vocab_size**world.horizon, dtype=torch.float64)
    for kept in range(world.block_size + 1):
        rest = sequence_distribution(world.target, world.horizon - kept - 1, start=kept + 1)
        prefix = number(paths[:, :kept], vocab_size)
        after = rest.view(vocab_size**kept, vocab_size, -1)[prefix]
        # A view on `laws`: the block of sequences that begin with the kept prefix.
        block = laws.view(count, lengths, vocab_size**kept, vocab_size, -1)
        block[torch.arange(count), :, prefix] += verdicts_NLAV[:, :, kept, :, None] * after[:, None]
    return laws


@dataclass
class Walk:
    """Walks rounds of R requests that one schedule serves.

    Attributes:
        requests: the worlds of each request.
        verifier: of all.
        schedule: of all.
        lengths_seen: every choice of lengths that the schedule has made.
    """

    requests: Sequence[WorldAfter]
    verifier: Verifier
    schedule: Schedule
    lengths_seen: set[tuple[int, ...]] = field(default_factory=set)
    _rounds: dict[tuple[int, Prefix], _Round] = field(default_factory=dict)
    _paths: dict[tuple[Prefix, ...], list[_Paths]] = field(default_factory=dict)
    _chosen: dict[tuple[tuple[Prefix, ...], Memory], list[_Choice]] = field(default_factory=dict)
    _laws: dict[tuple[Hashable, ...], Tensor] = field(default_factory=dict)

    def under(self, schedule: Schedule) -> Walk:
        """The same under another schedule; what is independent of the schedule is computed once."""
        return Walk(
            self.requests, self.verifier, schedule, _rounds=self._rounds, _paths=self._paths
        )

    def by(self, other: Walk) -> Walk:
        """The same by another walk's verifier; what that knows and what both share is kept."""
        return replace(
            self, verifier=other.verifier, lengths_seen=set(), _rounds=other._rounds, _laws={}
        )

    def law(self, rounds: int = 1) -> Tensor:
        """The joint distribution of the next T tokens of every request, [V**T] * R."""
        return self._law(((),) * len(self.requests), None, rounds)

    def targets(self) -> list[Tensor]:
        """What plain decoding gives each request, [V**T]."""
        return [target_distribution(world_after(())) for world_after in self.requests]

    def _law(self, prefixes: tuple[Prefix, ...], memory: Memory, rounds: int) -> Tensor:
        key = (prefixes, memory, rounds)
        if key not in self._laws:
            last = rounds == 1
            self._laws[key] = (self._last if last else self._earlier)(prefixes, memory, rounds)
        return self._laws[key]

    def _last(self, prefixes: tuple[Prefix, ...], memory: Memory, _rounds: int) -> Tensor:
        """Paths that get the same lengths are summed in one product per request."""
        here = self._round_of_each(prefixes)
        weights: dict[tuple[int, ...], Tensor] = {}
        shape = [len(each.weights_N) for each in here]
        for paths, lengths in self._choices(prefixes, memory):
            share = weights.setdefault(lengths, torch.zeros(shape, dtype=torch.float64))
            share[paths.choice] = paths.chance
        total = torch.zeros(1, dtype=torch.float64)
        for lengths, share in weights.items():
            # Each product consumes the first axis, a request's paths, and appends its sequences.
            law = share
            for each, length in zip(here, lengths, strict=True):
                law = torch.tensordot(law, each.laws_NLS[:, length], dims=([0], [0]))
            total = total + law
        return total

    def _earlier(self, prefixes: tuple[Prefix, ...], memory: Memory, rounds: int) -> Tensor:
        here = self._round_of_each(prefixes)
        total = torch.zeros([each.world.vocab_size**each.world.horizon for each in here]).double()
        for paths, lengths in self._choices(prefixes, memory):
            ends = [
                each.ends(path, length)
                for each, path, length in zip(here, paths.choice, lengths, strict=True)
            ]
            memories: dict[tuple[int, ...], Memory] = {}
            for verdict in product(*ends):
                accepted = tuple(len(end.committed) - 1 for end in verdict)
                if accepted not in memories:
                    memories[accepted] = self.schedule.remember(
                        paths.view, np.array(accepted), np.array(lengths)
                    )
                remembered = memories[accepted]
                after = tuple(
                    (*old, *end.committed) for old, end in zip(prefixes, verdict, strict=True)
                )
                share = paths.chance * float(np.prod([end.chance for end in verdict]))
                where = tuple(end.sequences for end in verdict)
                total[where] += share * self._law(after, remembered, rounds - 1)
        return total

    def _choices(self, prefixes: tuple[Prefix, ...], memory: Memory) -> list[_Choice]:
        """Every choice of a path per request, and its lengths."""
        if prefixes not in self._paths:
            self._paths[prefixes] = list(_Paths.of(self._round_of_each(prefixes)))
        if (prefixes, memory) not in self._chosen:
            self._chosen[prefixes, memory] = [
                (paths, tuple(map(int, self.schedule.lengths(paths.view, memory))))
                for paths in self._paths[prefixes]
            ]
        choices = self._chosen[prefixes, memory]
        self.lengths_seen.update(lengths for _, lengths in choices)
        return choices

    def _round_of_each(self, prefixes: tuple[Prefix, ...]) -> list[_Round]:
        for r, prefix in enumerate(prefixes):
            if (r, prefix) not in self._rounds:
                self._rounds[r, prefix] = _Round.of(self.requests[r](prefix), self.verifier)
        return [self._rounds[r, prefix] for r, prefix in enumerate(prefixes)]


@dataclass(frozen=True)
class _End:
    """One verdict: what it commits, its chance, and the sequences that begin so."""

    committed: Prefix
    chance: float
    sequences: slice


@dataclass(frozen=True)
class _Paths:
    """A path per request: their numbers, chance and view."""

    choice: tuple[int, ...]
    chance: float
    view: View

    @classmethod
    def of(cls, here: Sequence[_Round]) -> Iterator[_Paths]:
        """Every choice that can happen."""
        for choice in product(*(range(len(each.weights_N)) for each in here)):
            pairs = list(zip(here, choice, strict=True))
            chance = float(np.prod([each.weights_N[n] for each, n in pairs]))
            if chance > 0:
                view = View(
                    np.stack([each.logits_NK[n] for each, n in pairs]),
                    np.stack([each.drafts_NK[n] for each, n in pairs]),
                    np.stack([each.draft_probs_NK[n] for each, n in pairs]),
                )
                yield cls(choice, chance, view)


_Choice = tuple[_Paths, tuple[int, ...]]
"""A path per request, and the lengths that the schedule gives it."""


@dataclass(frozen=True)
class _Round:
    """A world with everything about it that is computed once."""

    world: World
    verdicts_NLAV: Tensor
    laws_NLS: Tensor
    weights_N: FloatArray
    logits_NK: FloatArray
    drafts_NK: IntArray
    draft_probs_NK: FloatArray

    @classmethod
    def of(cls, world: World, verifier: Verifier) -> _Round:
        verdicts_NLAV = verdicts(world, verifier)
        return cls(
            world,
            verdicts_NLAV,
            continued(world, verdicts_NLAV),
            world.path_weights().numpy(),
            world.path_logits().numpy(),
            world.paths().numpy(),
            world.path_draft_probs().numpy(),
        )

    def ends(self, path: int, length: int) -> list[_End]:
        """The verdicts that can happen to a path."""
        vocab_size, found = self.world.vocab_size, []
        chances_AV = self.verdicts_NLAV[path, length]
        for accepted, token in torch.nonzero(chances_AV).tolist():
            committed = (*map(int, self.drafts_NK[path, :accepted]), token)
            place = reduce(lambda n, x: n * vocab_size + x, committed, 0)
            size = vocab_size ** (self.world.horizon - len(committed))
            sequences = slice(place * size, (place + 1) * size)
            found.append(_End(committed, float(chances_AV[accepted, token]), sequences))
        return found
