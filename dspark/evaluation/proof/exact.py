"""Cases that must be exact: every rule under every schedule, and `coupled` token for token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from dspark.drafters.heads import MARKOV_KINDS, MarkovKind
from dspark.evaluation.proof import schedules
from dspark.evaluation.proof.case import Case, control, exact, of_schedule
from dspark.evaluation.proof.pairs import SmallPair, telling_pair
from dspark.evaluation.proof.rounds import (
    RULES,
    Memory,
    Schedule,
    Verifier,
    View,
    Walk,
    of_known,
    sparse,
)
from dspark.evaluation.proof.worlds import Distance, Prefix, World, WorldAfter, random_world
from dspark.request import SamplingParams
from dspark.sampling import verification
from dspark.sampling.distribution import Dense
from dspark.sampling.noise import seed_tensor
from dspark.sampling.verification import Blocks, Rule

ScheduleName = Literal["fixed", "threshold", "prefix", "lagged", "lookahead", "measured"]
SCHEDULES: tuple[ScheduleName, ...] = get_args(ScheduleName)
SIZES = {1: ((4, 2), (3, 3)), 2: ((2, 2), (3, 2), (2, 3))}
"""(V, K) of one round of one and of two requests."""
REMEMBERING = ("lagged", "lookahead", "measured")
"""Schedules that learn from the round before: two rounds at (2, 2)."""
PROCESSED = {
    "penalties, top-k": SamplingParams(
        temperature=0.7, top_k=2, presence_penalty=0.6, frequency_penalty=0.3
    ),
    "bias, top-p": SamplingParams(
        temperature=1.3, top_p=0.8, repetition_penalty=1.7, logit_bias={0: 0.4}
    ),
}

FORMS = {
    "p and q by their tokens": (sparse, sparse),
    "q by its tokens": (Blocks.dense, sparse),
    "q of known tokens": (Blocks.dense, of_known),
    "p by its tokens, q of known tokens": (sparse, of_known),
}
"""How the target's and the drafter's distributions are held, in worlds with zeros."""


_World = tuple[list[SmallPair], list[Walk]]
"""The pairs of all requests, and a walk of them by each rule."""


def exact_cases(seed: int = 0) -> Iterator[Case]:
    """Every rule, schedule, head and number of requests, and what else must be exact."""
    for requests, head in product((1, 2), MARKOV_KINDS):
        one_round = _worlds(requests, head, seed, SIZES[requests], rounds=1)
        two_rounds = _worlds(requests, head, seed, ((2, 2),), rounds=2)
        for name in SCHEDULES:
            walks, rounds = (two_rounds, 2) if name in REMEMBERING else (one_round, 1)
            yield from _of_schedule(name, head, walks, rounds)
    for rule in RULES:
        yield from _processed(rule, seed)
    for rule, form in product(RULES, FORMS):
        yield _in_form(rule, form, seed)
    for rule, head in product(RULES, MARKOV_KINDS):
        yield _of_candidates(rule, head, seed)
    for rule in RULES:
        yield _greedy(rule, seed)
    for rule, requests in product(RULES, (1, 2)):
        yield _swapped(rule, requests, seed)


def _worlds(
    requests: int, head: MarkovKind, seed: int, sizes: Sequence[tuple[int, int]], rounds: int
) -> list[_World]:
    """Pairs of all requests, in several worlds: of all sizes, with confidences that tie or not."""
    worlds = list[_World]()
    for (vocab_size, block_size), tied in product(sizes, (False, True)):
        horizon = rounds * (block_size + 1)
        pairs = [
            telling_pair(seed * 2 + r, vocab_size, block_size, head, horizon, tied=tied)
            for r in range(requests)
        ]
        walks = [Walk(pairs, Verifier.of(rule), schedules.fixed(0)) for rule in RULES]
        worlds.append((pairs, walks))
    return worlds


def _of_schedule(
    name: ScheduleName, head: MarkovKind, worlds: Sequence[_World], rounds: int
) -> Iterator[Case]:
    """A cell of the table per rule: the worst of several worlds and settings of the schedule."""
    distances: dict[Rule, list[Distance]] = {rule: [] for rule in RULES}
    lengths = dict.fromkeys(RULES, 0)
    for pairs, walks in worlds:
        for schedule in _settings(name, pairs):
            first = walks[0].under(schedule)
            for rule, walk in zip(RULES, (first, *map(first.by, walks[1:])), strict=True):
                distances[rule].append(Distance.of(walk.law(rounds), walk.targets()))
                lengths[rule] = max(lengths[rule], len(walk.lengths_seen))
    for rule in RULES:
        farthest, requests = Distance.farthest(distances[rule]), len(worlds[0][0])
        yield of_schedule(rule, name, head, requests, farthest, lengths[rule])


def _settings(name: ScheduleName, pairs: Sequence[SmallPair]) -> list[Schedule]:
    """A schedule under every setting that the worlds make telling."""
    block_size = pairs[0].block_size
    if name == "fixed":
        return [schedules.fixed(length) for length in range(block_size + 1)]
    logits = [pair(()).path_logits().numpy() for pair in pairs]
    if name == "threshold":
        return [schedules.threshold(cut) for cut in schedules.telling_thresholds(logits)]
    costs = schedules.step_costs(len(pairs) * block_size)
    if name == "prefix":
        shapes = [*costs.values(), schedules.telling_costs(logits)]
        return [schedules.prefix(step_ms) for step_ms in shapes]
    if name == "measured":
        return [schedules.measured(costs[shape]) for shape in ("linear", "tier")]
    of_costs = schedules.lagged if name == "lagged" else schedules.lookahead
    return [of_costs(costs[shape]) for shape in ("linear", "jagged", "tier")]


def _processed(rule: Rule, seed: int) -> Iterator[Case]:
    """Each row with the state of its own prefix, as the engine batches rows."""
    for name, params in PROCESSED.items():
        distances = []
        for pair_seed in range(seed, seed + 3):
            pair = SmallPair(pair_seed, 3, 2, params=params)
            walk = Walk([pair], Verifier.of(rule), schedules.fixed(2))
            distances.append(Distance.of(walk.law(), walk.targets()))
        yield exact(f"{rule} / fixed / {name}", Distance.farthest(distances))


def _in_form(rule: Rule, form: str, seed: int) -> Case:
    """Distributions that hold only some tokens are verified as those that hold all."""
    distances = []
    for world_seed, length in product(range(seed, seed + 2), (1, 2)):
        world = random_world(world_seed, 4, 2, zeros=True)
        verifier = Verifier.of(rule, *FORMS[form])
        walk = Walk([_always(world)], verifier, schedules.fixed(length))
        distances.append(Distance.of(walk.law(), walk.targets()))
    return exact(f"{rule} / fixed / {form}", Distance.farthest(distances))


def _of_candidates(rule: Rule, head: MarkovKind, seed: int) -> Case:
    """Drafts from a slot's likeliest tokens are verified by the distribution over these."""
    distances = []
    for pair_seed in range(seed, seed + 3):
        pair = SmallPair(pair_seed, 4, 2, head, draft_top_k=2)
        walk = Walk([pair], Verifier.of(rule, Blocks.dense, sparse), schedules.fixed(2))
        distances.append(Distance.of(walk.law(), walk.targets()))
    return exact(f"{rule} / fixed / {head} / 2 of 4 candidates", Distance.farthest(distances))


def _always(world: World) -> WorldAfter:
    return lambda _prefix: world


def _greedy(rule: Rule, seed: int) -> Case:
    """Drafts without chance cannot bias anything: even a global search over this round is exact."""
    distances = []
    for pair_seed, step_ms in product(range(seed, seed + 6, 2), schedules.step_costs(4).values()):
        greedy = SamplingParams(temperature=0.0)
        pairs = [SmallPair(pair_seed + r, 3, 2, params=greedy) for r in range(2)]
        walk = Walk(pairs, Verifier.of(rule), schedules.searched_globally(step_ms))
        distances.append(Distance.of(walk.law(), walk.targets()))
    name = f"{rule} / global search / temperature 0 / two requests"
    return exact(name, Distance.farthest(distances))


def _swapped(rule: Rule, requests: int, seed: int) -> Case:
    """A finished round decides which drafter and which calibration serve the next one."""
    distances, lengths = [], 0
    for world_seed in range(seed, seed + 2):
        pairs = [
            _replaced(*(SmallPair(4 * world_seed + 2 * r + n, 2, 2, horizon=6) for n in (0, 1)))
            for r in range(requests)
        ]
        for cut in (0.5, 0.7):
            walk = Walk(pairs, Verifier.of(rule), schedules.recalibrated(cut))
            distances.append(Distance.of(walk.law(2), walk.targets()))
            lengths = max(lengths, len(walk.lengths_seen))
    number = "one request" if requests == 1 else "two requests"
    case = exact(f"{rule} / swapped between rounds / {number}", Distance.farthest(distances))
    return replace(case, lengths=lengths, holds=lengths > 1)


def _replaced(first: SmallPair, other: SmallPair) -> WorldAfter:
    """The first pair's target; the other's drafter, once a round has committed such tokens."""

    def world(prefix: Prefix) -> World:
        here = first(prefix)
        if not prefix or (len(prefix) + prefix[0]) % 2:
            return here
        there = other(prefix)
        return replace(here, draft=there.draft, drawn=there.drawn, logits=there.logits)

    return world


SEEDS, TOKENS = 24, 5


def coupled_cases(seed: int = 0) -> Iterator[Case]:
    """Every schedule and head, compared over many seeds, and a key that breaks the identity."""
    for head in MARKOV_KINDS:
        yield from _coupled(head, seed)
    pairs = _pairs("vanilla", seed)
    wrong, _seen = _differing(_Drawn(pairs, keyed_by_slot=True), schedules.fixed(3), seed)
    yield control("coupled: noise keyed by the slot in the block", wrong)


def _pairs(head: MarkovKind, seed: int) -> list[SmallPair]:
    return [telling_pair(2 * seed + r, 2, 3, head, TOKENS + 4, tied=False) for r in range(2)]


def _coupled(head: MarkovKind, seed: int) -> Iterator[Case]:
    """A global search over this round, wrong elsewhere, is right here like any other schedule."""
    drawn, costs = _Drawn(_pairs(head, seed)), schedules.step_costs(6).values()
    ways = {
        "fixed": [schedules.fixed(3)],
        "threshold": [schedules.threshold(0.7)],
        "prefix": [schedules.prefix(step_ms) for step_ms in costs],
        "lagged": [schedules.lagged(step_ms) for step_ms in costs],
        "lookahead": [schedules.lookahead(step_ms) for step_ms in costs],
        "global search": [schedules.searched_globally(step_ms) for step_ms in costs],
    }
    for name, settings in ways.items():
        found = [_differing(drawn, schedule, seed) for schedule in settings]
        distance = Distance.farthest([distance for distance, _seen in found])
        lengths = max(seen for _distance, seen in found)
        yield of_schedule("coupled", name, head, 2, distance, lengths)


def _differing(drawn: _Drawn, schedule: Schedule, seed: int) -> tuple[Distance, int]:
    """The share of outputs, and of pairs of outputs, that are not plain decoding's own.

    Returns:
        The shares, and how many different lengths the schedule has chosen.
    """
    different, seen = [], set[tuple[int, ...]]()
    for first in range(seed, seed + 2 * SEEDS, 2):
        outputs = _speculative(drawn, schedule, first, seen)
        plain = drawn.plain(first)
        different.append([ours != theirs for ours, theirs in zip(outputs, plain, strict=True)])
    shares = np.array(different)
    return Distance(float(shares.mean(axis=0).max()), float(shares.any(axis=1).mean())), len(seen)


@dataclass
class _Drawn:
    """What requests with seeds `first`, `first + 1` draw; independent of the schedule.

    Attributes:
        pairs: of the requests.
        keyed_by_slot: key noise by the slot in the block (a wrong variant).
    """

    pairs: Sequence[SmallPair]
    keyed_by_slot: bool = False
    _plain: dict[int, list[Prefix]] = field(default_factory=dict)
    _blocks: dict[tuple[int, tuple[Prefix, ...]], _Block] = field(default_factory=dict)

    def plain(self, first: int) -> list[Prefix]:
        """Plain decoding's own samples."""
        if first not in self._plain:
            seeds_R = self._seeds(first)
            own = [_plain(pair, seeds_R[r : r + 1]) for r, pair in enumerate(self.pairs)]
            self._plain[first] = own
        return self._plain[first]

    def block(self, first: int, outputs: tuple[Prefix, ...]) -> _Block:
        """What is drafted and judged after these outputs."""
        if (first, outputs) not in self._blocks:
            worlds = [pair(done) for pair, done in zip(self.pairs, outputs, strict=True)]
            starts_R = torch.tensor([0 if self.keyed_by_slot else len(done) for done in outputs])
            self._blocks[first, outputs] = _Block.draw(worlds, self._seeds(first), starts_R)
        return self._blocks[first, outputs]

    def _seeds(self, first: int) -> Tensor:
        return seed_tensor(list(range(first, first + len(self.pairs))))


def _plain(pair: SmallPair, seed_1: Tensor) -> Prefix:
    tokens: Prefix = ()
    while len(tokens) < TOKENS:
        law_1V = Dense.of(pair(tokens).target[0])
        tokens += (int(verification.coupled_tokens(law_1V, seed_1, torch.tensor([len(tokens)]))),)
    return tokens


def _speculative(
    drawn: _Drawn, schedule: Schedule, first: int, seen: set[tuple[int, ...]]
) -> list[Prefix]:
    """The first tokens of requests that share their rounds; one that is done idles along."""
    outputs: list[Prefix] = [()] * len(drawn.pairs)
    memory: Memory = None
    while min(map(len, outputs)) < TOKENS:
        block = drawn.block(first, tuple(outputs))
        lengths = schedule.lengths(block.view, memory)
        seen.add(tuple(map(int, lengths)))
        accepted = verification.accepted_by_identity(
            block.own_RK1, block.drafts_RK, torch.from_numpy(lengths)
        )
        memory = schedule.remember(block.view, accepted.numpy(), lengths)
        for r, kept in enumerate(accepted.tolist()):
            outputs[r] = (*outputs[r], *block.own_RK1[r, : kept + 1].tolist())[:TOKENS]
    return outputs


@dataclass(frozen=True)
class _Block:
    """A drafted block of every request, and the target's own token at each of its rows."""

    drafts_RK: Tensor
    own_RK1: Tensor
    view: View

    @classmethod
    def draw(cls, worlds: Sequence[World], seeds_R: Tensor, starts_R: Tensor) -> _Block:
        """Draft K tokens after each request's prefix, and take the target's own along them."""
        places = [0] * len(worlds)
        drafts, probs, logits, own = [], [], [], []
        for k in range(worlds[0].block_size + 1):
            here = list(zip(worlds, places, strict=True))
            judged = torch.stack([(w.judged or w.target)[k][n] for w, n in here])
            own.append(verification.coupled_tokens(Dense.of(judged), seeds_R, starts_R + k))
            if k == worlds[0].block_size:
                break
            law_RV = torch.stack([w.draft[k][n] for w, n in here])
            drafts.append(verification.coupled_tokens(Dense.of(law_RV), seeds_R, starts_R + k))
            probs.append(law_RV.gather(1, drafts[-1][:, None]).squeeze(1))
            logits.append(torch.stack([w.logits[k][n] for w, n in here]))
            places = [
                n * w.vocab_size + x for (w, n), x in zip(here, drafts[-1].tolist(), strict=True)
            ]
        columns = (torch.stack(c, dim=1) for c in (logits, drafts, probs))
        view = View(*(column.numpy() for column in columns))
        return cls(torch.stack(drafts, dim=1), torch.stack(own, dim=1), view)
