"""The promise: what must be exact, enumerated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Literal, get_args

from dspark.drafters.heads import MARKOV_KINDS, MarkovKind
from dspark.evaluation.proof import schedules
from dspark.evaluation.proof.case import Case, exact, of_schedule
from dspark.evaluation.proof.pairs import SmallPair, telling_pair
from dspark.evaluation.proof.rounds import (
    RULES,
    Schedule,
    Verifier,
    Walk,
    of_known,
    sparse,
)
from dspark.evaluation.proof.worlds import Distance, World, WorldAfter, random_world
from dspark.request import SamplingParams
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


def exact_cases(seed: int = 0) -> Iterator[Case]:
    """Every rule, schedule, head and number of requests, and what else must be exact."""
    for requests, head in product((1, 2), MARKOV_KINDS):
        one_round = _worlds(requests, head, seed, SIZES[requests], rounds=1)
        two_rounds = _worlds(requests, head, seed, ((2, 2),), rounds=2)
        for name, rule in product(SCHEDULES, RULES):
            worlds, rounds = (two_rounds, 2) if name in REMEMBERING else (one_round, 1)
            yield _of_schedule(rule, name, worlds, rounds)
    for rule in RULES:
        yield from _processed(rule, seed)
    for rule, form in product(RULES, FORMS):
        yield _in_form(rule, form, seed)
    for rule, head in product(RULES, MARKOV_KINDS):
        yield _of_candidates(rule, head, seed)
    for rule in RULES:
        yield _greedy(rule, seed)


def _worlds(
    requests: int, head: MarkovKind, seed: int, sizes: Sequence[tuple[int, int]], rounds: int
) -> list[list[SmallPair]]:
    """Pairs of all requests, in several worlds: of all sizes, with confidences that tie or not."""
    worlds = []
    for (vocab_size, block_size), tied in product(sizes, (False, True)):
        horizon = rounds * (block_size + 1)
        pairs = [
            telling_pair(seed * 2 + r, vocab_size, block_size, head, horizon, tied=tied)
            for r in range(requests)
        ]
        worlds.append(pairs)
    return worlds


def _of_schedule(
    rule: Rule, name: ScheduleName, worlds: Sequence[Sequence[SmallPair]], rounds: int
) -> Case:
    """One cell of the table: the worst of several worlds and settings of the schedule."""
    distances, lengths = [], 0
    for pairs in worlds:
        first, *others = _settings(name, pairs)
        one = Walk(pairs, Verifier.of(rule), first)
        for walk in (one, *map(one.under, others)):
            distances.append(Distance.of(walk.law(rounds), walk.targets()))
            lengths = max(lengths, len(walk.lengths_seen))
    head, requests = worlds[0][0].head, len(worlds[0])
    return of_schedule(rule, name, head, requests, Distance.farthest(distances), lengths)


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
