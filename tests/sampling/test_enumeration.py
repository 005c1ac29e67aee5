"""The promise, proved in small worlds: every path, length and outcome, exact to 1e-12."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from dspark.request import SamplingParams
from dspark.sampling import processors
from dspark.sampling.counts import TokenCounts
from dspark.scheduling.prefix import fixed_lengths, threshold_lengths

EXACT = 1e-12
RULES = ("token", "block")
SIZES = ((2, 2), (3, 2), (4, 2), (2, 3), (3, 3))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("vocab_size", "block_size"), SIZES)
@pytest.mark.parametrize("head", ["vanilla", "markov", "history"])
def test_request_law_is_the_targets(enumeration, rule, vocab_size, block_size, head):
    verifier = enumeration.Verifier.of(rule)
    for seed in range(3):
        world = enumeration.random_world(seed, vocab_size, block_size, head, zeros=seed == 2)
        expected = enumeration.target_law(world)
        laws = enumeration.outcome_laws(world, verifier)
        confidences = world.path_confidences()
        schedules = [fixed_lengths(len(laws), length) for length in range(block_size + 1)]
        for place in range(1, block_size):
            # A threshold between the confidences of one place: lengths depend on the path.
            cut = float(confidences[:, place].unique()[-1])
            schedules.append(threshold_lengths(confidences, min(cut, float(confidences[0, 0]))))
        schedules.append(threshold_lengths(confidences, 0.5))
        for lengths in schedules:
            law = enumeration.request_law(world, laws, torch.from_numpy(lengths))
            assert enumeration.total_variation(law, expected) < EXACT


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("vocab_size", "block_size"), [(2, 2), (3, 2), (2, 3)])
def test_joint_law_of_two_requests_is_that_of_independent_runs(
    enumeration, rule, vocab_size, block_size
):
    verifier = enumeration.Verifier.of(rule)
    worlds = [enumeration.random_world(seed, vocab_size, block_size) for seed in (10, 11)]
    confidences = [world.path_confidences().numpy() for world in worlds]
    cut = min(confidences[0][:, 1].max(), confidences[0][0, 0])
    expected = torch.outer(*(enumeration.target_law(world) for world in worlds))

    def threshold(i, j):
        both = np.stack([confidences[0][i], confidences[1][j]])
        return tuple(threshold_lengths(both, cut))

    lengths = {threshold(i, j) for i, j in product(*(range(len(c)) for c in confidences))}
    assert len(lengths) > 1  # the schedule does depend on the drafts
    for schedule in (lambda i, j: tuple(fixed_lengths(2, block_size)), threshold):
        law = enumeration.joint_law(*worlds, verifier, schedule)
        assert enumeration.total_variation(law, expected) < EXACT


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.7, top_k=2, presence_penalty=0.6, frequency_penalty=0.3),
        SamplingParams(temperature=1.3, top_p=0.8, repetition_penalty=1.7, logit_bias={0: 0.4}),
        SamplingParams(temperature=0.0, frequency_penalty=0.9),
    ],
)
def test_processed_laws_keep_each_rows_own_prefix(enumeration, rule, params):
    """Penalties follow the drafts: one batch of draft rows against plain decoding, row by row."""
    vocab_size, block_size = 3, 2
    generator = torch.Generator().manual_seed(5)

    def logits(depth):
        shape = (vocab_size**depth, vocab_size)
        return torch.randn(shape, generator=generator, dtype=torch.float64) * 1.5

    def plain(tables):
        laws = []
        for depth, table in enumerate(tables):
            prefixes = enumeration.all_paths(vocab_size, depth).tolist()
            rows = len(prefixes)
            counts = TokenCounts.of([[1]] * rows, [[2, *x] for x in prefixes], vocab_size)
            chain = processors.Chain.of([params] * rows)
            laws.append(processors.law(table, chain, counts))
        return tuple(laws)

    target_logits = tuple(logits(depth) for depth in range(block_size + 1))
    draft_logits = tuple(logits(depth) for depth in range(block_size))
    target = plain(target_logits)
    paths = enumeration.all_paths(vocab_size, block_size)
    state = TokenCounts.of([[1]] * len(paths), [[2]] * len(paths), vocab_size)
    chain = processors.Chain.of([params] * len(paths))

    def batched(tables):
        """The engine's way: every row of every draft path at once."""
        steps = len(tables)
        requests = torch.arange(len(paths)).repeat_interleave(steps)
        step = torch.arange(steps).repeat(len(paths))
        counts = state.after_drafts(requests, step, paths)
        rows = enumeration.along(tables, paths).flatten(0, 1)
        laws = processors.law(rows, chain.rows(requests), counts)
        return laws.view(len(paths), steps, vocab_size)

    p, q = batched(target_logits), batched(draft_logits)
    reference = enumeration.World(target, plain(draft_logits), ())
    assert torch.equal(p, enumeration.along(target, paths))

    verifier = enumeration.Verifier.of(rule)
    lengths = torch.full((len(paths),), block_size)
    keep = verifier.keep(p, q, paths, lengths)
    total = torch.zeros(1, dtype=torch.float64)
    weights = q.gather(2, paths[:, :, None]).squeeze(2).prod(dim=1)
    for uniforms, weight in enumeration.outcomes(keep):
        accepted = verifier.decide(keep, uniforms, lengths)
        following = verifier.next_law(p, q, paths, lengths, accepted)
        laws = enumeration.continued(reference, paths, accepted, following)
        total = total + (weights * weight) @ laws
    expected = enumeration.target_law(reference)
    assert enumeration.total_variation(total, expected) < EXACT


def test_enumeration_of_plain_decoding_matches_a_loop(enumeration):
    """The yardstick itself: sequence laws against products written out."""
    world = enumeration.random_world(3, 3, 2)
    law = enumeration.target_law(world)
    for x in product(range(3), repeat=3):
        product_law = (
            world.target[0][0, x[0]]
            * world.target[1][x[0], x[1]]
            * world.target[2][3 * x[0] + x[1], x[2]]
        )
        assert abs(float(law[9 * x[0] + 3 * x[1] + x[2]] - product_law)) < 1e-15
