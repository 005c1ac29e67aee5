"""The promise, proved in small worlds: every path, length and outcome, exact to 1e-12."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from dspark.evaluation.proof import schedules, worlds
from dspark.evaluation.proof.rounds import Verifier, Walk, continued, outcomes
from dspark.evaluation.proof.worlds import Distance
from dspark.request import SamplingParams
from dspark.sampling import logits_processors as processors
from dspark.sampling.token_counts import TokenCounts

EXACT = 1e-12
RULES = ("token", "block")
SIZES = ((2, 2), (3, 2), (4, 2), (2, 3), (3, 3))


def distance(requests, rule, schedule):
    """How far the joint law of single rounds is from independent plain decoding."""
    walk = Walk([lambda _, w=w: w for w in requests], Verifier.of(rule), schedule)
    return Distance.of(walk.law(), walk.targets()), walk.lengths_seen


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("vocab_size", "block_size"), SIZES)
@pytest.mark.parametrize("head", worlds.HEADS)
def test_request_law_is_the_targets(rule, vocab_size, block_size, head):
    for seed in range(3):
        world = worlds.random_world(seed, vocab_size, block_size, head, zeros=seed == 2)
        logits = [world.path_logits().numpy()]
        cuts = schedules.telling_thresholds(logits)
        settings = [schedules.fixed(length) for length in range(block_size + 1)]
        settings += [schedules.threshold(cut) for cut in cuts]
        costs = [*schedules.step_costs(block_size).values(), schedules.telling_costs(logits)]
        settings += [schedules.prefix(step_ms) for step_ms in costs]
        for schedule in settings:
            assert distance([world], rule, schedule)[0].largest < EXACT


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("vocab_size", "block_size"), [(2, 2), (3, 2), (2, 3)])
def test_joint_law_of_two_requests_is_that_of_independent_runs(rule, vocab_size, block_size):
    pair = [worlds.random_world(seed, vocab_size, block_size) for seed in (10, 11)]
    logits = [world.path_logits().numpy() for world in pair]
    kinds = (
        [schedules.threshold(cut) for cut in (0.3, *schedules.telling_thresholds(logits))],
        [schedules.prefix(schedules.telling_costs(logits))],
    )
    for settings in kinds:
        results = [distance(pair, rule, schedule) for schedule in settings]
        assert max(len(lengths) for _, lengths in results) > 1  # lengths do depend on drafts
        assert all(found.largest < EXACT for found, _ in results)
    assert distance(pair, rule, schedules.fixed(block_size))[0].largest < EXACT


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.7, top_k=2, presence_penalty=0.6, frequency_penalty=0.3),
        SamplingParams(temperature=1.3, top_p=0.8, repetition_penalty=1.7, logit_bias={0: 0.4}),
        SamplingParams(temperature=0.0, frequency_penalty=0.9),
    ],
)
def test_processed_laws_keep_each_rows_own_prefix(rule, params):
    """Penalties follow the drafts: one batch of draft rows against plain decoding, row by row."""
    vocab_size, block_size = 3, 2
    generator = torch.Generator().manual_seed(5)

    def logits(depth):
        shape = (vocab_size**depth, vocab_size)
        return torch.randn(shape, generator=generator, dtype=torch.float64) * 1.5

    def plain(tables):
        laws = []
        for depth, table in enumerate(tables):
            prefixes = worlds.all_paths(vocab_size, depth).tolist()
            rows = len(prefixes)
            counts = TokenCounts.of([[1]] * rows, [[2, *x] for x in prefixes], vocab_size)
            chain = processors.Chain.of([params] * rows)
            laws.append(processors.token_distribution(table, chain, counts).dense())
        return tuple(laws)

    target_logits = tuple(logits(depth) for depth in range(block_size + 1))
    draft_logits = tuple(logits(depth) for depth in range(block_size))
    target = plain(target_logits)
    paths = worlds.all_paths(vocab_size, block_size)
    state = TokenCounts.of([[1]] * len(paths), [[2]] * len(paths), vocab_size)
    chain = processors.Chain.of([params] * len(paths))

    def batched(tables):
        """The engine's way: every row of every draft path at once."""
        steps = len(tables)
        requests = torch.arange(len(paths)).repeat_interleave(steps)
        step = torch.arange(steps).repeat(len(paths))
        counts = state.after_drafts(requests, step, paths)
        rows = worlds.along(tables, paths).flatten(0, 1)
        laws = processors.token_distribution(rows, chain.rows(requests), counts).dense()
        return laws.view(len(paths), steps, vocab_size)

    p, q = batched(target_logits), batched(draft_logits)
    reference = worlds.World(target, plain(draft_logits), ())
    assert torch.equal(p, worlds.along(target, paths))

    verifier = Verifier.of(rule)
    lengths = torch.full((len(paths),), block_size)
    keep = verifier.keep(p, q, paths, lengths)
    chances = torch.zeros(len(paths), 1, block_size + 1, vocab_size, dtype=torch.float64)
    for uniforms, weight in outcomes(keep):
        accepted = verifier.decide(keep, uniforms, lengths)
        following = verifier.next_distribution(p, q, paths, lengths, accepted)
        chances[torch.arange(len(paths)), 0, accepted] += weight[:, None] * following
    weights = q.gather(2, paths[:, :, None]).squeeze(2).prod(dim=1)
    total = weights @ continued(reference, chances)[:, 0]
    assert worlds.total_variation(total, worlds.target_distribution(reference)) < EXACT


def test_enumeration_of_plain_decoding_matches_a_loop():
    """The yardstick itself: sequence laws against products written out."""
    world = worlds.random_world(3, 3, 2)
    law = worlds.target_distribution(world)
    for x in product(range(3), repeat=3):
        product_law = (
            world.target[0][0, x[0]]
            * world.target[1][x[0], x[1]]
            * world.target[2][3 * x[0] + x[1], x[2]]
        )
        assert abs(float(law[9 * x[0] + 3 * x[1] + x[2]] - product_law)) < 1e-15
