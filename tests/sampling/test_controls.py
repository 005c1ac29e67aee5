"""Controls: each wrong variant must fail the proof, or the proof would prove nothing."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from dspark.sampling.noise import Stream, gumbel, seed_tensor, uniform
from dspark.sampling.processors import sample
from dspark.sampling.verification import (
    accepted_lengths,
    keep_probabilities,
    next_law,
)
from dspark.scheduling.prefix import threshold_lengths
from dspark.scheduling.survival import survival

EXACT, BIASED = 1e-12, 1e-3
RULES = ("token", "block")


def full_length_error(enumeration, world, verifier):
    laws = enumeration.outcome_laws(world, verifier)
    lengths = torch.full((len(laws),), world.block_size)
    law = enumeration.request_law(world, laws, lengths)
    return enumeration.total_variation(law, enumeration.target_law(world))


def test_block_stopping_at_the_first_failure_is_biased(enumeration):
    world = enumeration.random_world(0, 3, 3)
    block, token = enumeration.Verifier.of("block"), enumeration.Verifier.of("token")
    wrong = enumeration.Verifier(block.keep, token.decide, block.next_law)
    assert full_length_error(enumeration, world, block) < EXACT
    assert full_length_error(enumeration, world, wrong) > BIASED


@pytest.mark.parametrize("rule", RULES)
def test_residual_at_the_stop_node_is_biased(enumeration, rule):
    """Where trimming stops the walk, the next token is not a corrected one."""
    world = enumeration.random_world(0, 3, 3)
    right = enumeration.Verifier.of(rule)
    block_size = world.block_size

    def residual(p, q, drafts, lengths, accepted):
        pretended = torch.where(lengths < block_size, lengths + 1, lengths)
        return right.next_law(p, q, drafts, pretended, accepted)

    wrong = enumeration.Verifier(right.keep, right.decide, residual)
    lengths = torch.from_numpy(threshold_lengths(world.path_confidences(), 0.35))
    assert int(lengths.min()) < block_size
    expected = enumeration.target_law(world)
    errors = [
        enumeration.total_variation(
            enumeration.request_law(world, enumeration.outcome_laws(world, verifier), lengths),
            expected,
        )
        for verifier in (right, wrong)
    ]
    assert errors[0] < EXACT
    assert errors[1] > BIASED


@pytest.mark.parametrize("rule", RULES)
def test_threshold_on_the_probability_of_the_drawn_token_is_biased(enumeration, rule):
    world = enumeration.random_world(0, 3, 3)
    laws = enumeration.outcome_laws(world, enumeration.Verifier.of(rule))
    lengths = torch.from_numpy(threshold_lengths(world.path_draft_probs(), 0.4))
    law = enumeration.request_law(world, laws, lengths)
    assert enumeration.total_variation(law, enumeration.target_law(world)) > BIASED


@pytest.mark.parametrize("rule", RULES)
def test_length_that_sees_the_other_requests_own_draft_breaks_only_the_joint_law(enumeration, rule):
    """Each verified iff the other's draft is token 0: both marginals exact, the pair wrong."""
    worlds = [enumeration.random_world(seed, 2, 2) for seed in (10, 11)]
    paths = worlds[0].paths()

    def crossed(i, j):
        return (2 if paths[j, 0] == 0 else 0), (2 if paths[i, 0] == 0 else 0)

    law = enumeration.joint_law(*worlds, enumeration.Verifier.of(rule), crossed)
    targets = [enumeration.target_law(world) for world in worlds]
    assert enumeration.total_variation(law.sum(1), targets[0]) < EXACT
    assert enumeration.total_variation(law.sum(0), targets[1]) < EXACT
    assert enumeration.total_variation(law, torch.outer(*targets)) > BIASED


@pytest.mark.parametrize("rule", RULES)
def test_retrospective_global_argmax_over_a_staircase_is_biased(enumeration, rule):
    """Verifying 2 pays only if the second confidence is high, which depends on the first draft.

    Drafts of token 0 are then always verified and drafts of token 1 never: (.85, .15) for a
    target of (.7, .3), the example of the paper's Appendix A.
    """
    half = torch.tensor([[0.5, 0.5]], dtype=torch.float64)
    target = torch.tensor([[0.7, 0.3]], dtype=torch.float64)
    world = enumeration.World(
        target=(target, target.expand(2, 2), target.expand(4, 2)),
        draft=(half, torch.tensor([[0.7, 0.3], [0.0, 1.0]], dtype=torch.float64)),
        confidence=(
            torch.tensor([0.8], dtype=torch.float64),
            torch.tensor([1.0, 0.0], dtype=torch.float64),
        ),
    )
    steps_per_second = np.array([1.0, 0.5, 0.5])
    gains = 1 + np.cumsum(survival(world.path_confidences()), axis=1)
    throughput = np.concatenate([np.ones((4, 1)), gains], axis=1) * steps_per_second
    lengths = torch.from_numpy(throughput.argmax(axis=1))
    laws = enumeration.outcome_laws(world, enumeration.Verifier.of(rule))
    first_token = enumeration.request_law(world, laws, lengths).view(2, -1).sum(1)
    assert first_token.tolist() == pytest.approx([0.85, 0.15], abs=EXACT)
    # Deciding about draft 1 before it is drawn, from c_1 alone, gives the target's law.
    causal = enumeration.request_law(world, laws, torch.zeros(4, dtype=torch.int64))
    assert causal.view(2, -1).sum(1).tolist() == pytest.approx([0.7, 0.3], abs=EXACT)


@pytest.mark.parametrize("rule", RULES)
def test_drawing_in_bf16_while_reporting_more_is_biased(enumeration, rule):
    world = enumeration.random_world(1, 4, 3)
    rounded = tuple(law.bfloat16().double() for law in world.draft)
    drawn = tuple(law / law.sum(1, keepdim=True) for law in rounded)
    wrong = enumeration.World(world.target, world.draft, world.confidence, drawn)
    honest = enumeration.World(world.target, drawn, world.confidence)
    verifier = enumeration.Verifier.of(rule)
    assert full_length_error(enumeration, wrong, verifier) > 1e-5
    assert full_length_error(enumeration, honest, verifier) < EXACT


def two_round_law(enumeration, world, rule, keyed_by_position):
    """Two rounds of K = 2 over four tokens, where round 2 may meet a uniform of round 1 again.

    Only where round 1 keeps nothing does its second test lie at the position of round 2's first.
    The world's target is laid out to depth 4; both rounds draft with the same Markov tables.
    """
    vocab_size = world.vocab_size
    paths = world.paths()
    p = enumeration.along(world.target[:3], paths)
    q = enumeration.along(world.draft, paths)
    lengths = torch.full((len(paths),), 2)
    keep = keep_probabilities(rule, p, q, paths, lengths)
    total = torch.zeros(vocab_size**4, dtype=torch.float64)
    for n, (weight, path) in enumerate(zip(world.path_weights(), paths, strict=True)):
        row = slice(n, n + 1)
        for uniforms, chance in enumeration.outcomes(keep[row]):
            kept = accepted_lengths(rule, keep[row], uniforms, lengths[row])
            law = next_law(rule, p[row], q[row], paths[row], lengths[row], kept)[0]
            if float(chance) == 0:
                continue
            for token in range(vocab_size):
                prefix = [*path[: int(kept)].tolist(), token]
                share = weight * chance[0] * law[token]
                if int(kept) > 0:
                    rest = enumeration.sequence_law(world.target, 4 - len(prefix), len(prefix))
                    place = enumeration.number(torch.tensor([prefix]), vocab_size)[0]
                    total.view(-1, rest.shape[1])[place] += share * rest[place]
                    continue
                # Where the uniform is shared it lies on the side of keep that round 1 saw.
                edge, passed = float(keep[n, 1]), bool(uniforms[0, 1] <= keep[n, 1])
                seen = (0.0, edge) if passed else (edge, 1.0)
                bounds = seen if keyed_by_position else (0.0, 1.0)
                total += share * second_round(enumeration, world, rule, token, bounds)
    return total


def second_round(enumeration, world, rule, anchor, bounds):
    """The law of four tokens after `anchor`, where the first uniform is uniform in `bounds`."""
    vocab_size = world.vocab_size
    paths = world.paths()
    whole = torch.cat([torch.full((len(paths), 1), anchor), paths], dim=1)
    p = enumeration.along(world.target, whole)[:, 1:4]
    first = world.draft[1][anchor]
    q = torch.stack([first.expand(len(paths), -1), world.draft[1][paths[:, 0]]], dim=1)
    weights = q.gather(2, paths[:, :, None]).squeeze(2).prod(1)
    lengths = torch.full((len(paths),), 2)
    keep = keep_probabilities(rule, p, q, paths, lengths)
    low, high = bounds
    total = torch.zeros(vocab_size**4, dtype=torch.float64)
    for passed in product((True, False), repeat=2):
        side = torch.tensor(passed).expand_as(keep)
        uniforms = torch.where(side, keep / 2, (1 + keep) / 2)
        inside = ((keep[:, 0] - low) / (high - low)).clamp(0, 1)
        chances = torch.stack([inside, keep[:, 1]], dim=1)
        chance = torch.where(side, chances, 1 - chances).prod(1)
        kept = accepted_lengths(rule, keep, uniforms, lengths)
        law = next_law(rule, p, q, paths, lengths, kept)
        for n, count in enumerate(kept.tolist()):
            depth = count + 2
            rest = enumeration.sequence_law(world.target, 4 - depth, depth)
            place = enumeration.number(whole[n : n + 1, : count + 1], vocab_size)[0] * vocab_size
            rows = slice(int(place), int(place) + vocab_size)
            share = weights[n] * chance[n] * law[n][:, None]
            total.view(-1, rest.shape[1])[rows] += share * rest[rows]
    return total


def test_block_noise_keyed_by_position_is_biased(enumeration):
    vocab_size = 2
    generator = torch.Generator().manual_seed(0)

    def table(rows):
        logits = torch.randn(rows, vocab_size, generator=generator, dtype=torch.float64)
        return (1.5 * logits).softmax(1)

    markov = table(vocab_size)
    target = tuple(table(vocab_size**d) for d in range(4))
    world = enumeration.World(target, (markov[:1], markov), ())
    expected = enumeration.sequence_law(target, 4)
    errors = {
        (rule, keyed): enumeration.total_variation(
            two_round_law(enumeration, world, rule, keyed), expected
        )
        for rule, keyed in product(RULES, (False, True))
    }
    assert errors["token", False] < EXACT
    assert errors["block", False] < EXACT
    assert errors["block", True] > BIASED
    # The token rule never looks behind its first failure, so it alone survives this mistake.
    assert errors["token", True] < EXACT


def chi_squared(tokens, law):
    expected = law * len(tokens)
    counts = torch.bincount(tokens, minlength=len(law))
    return float(((counts - expected) ** 2 / expected).sum())


def test_gumbel_noise_shared_by_draft_and_residual_is_biased():
    """Narrow on purpose: in a wide vocabulary the same mistake hides in the noise."""
    trials, vocab_size = 200_000, 16
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(vocab_size, generator=generator, dtype=torch.float64)
    target, draft = logits.softmax(0), (-logits).softmax(0)
    seeds = seed_tensor(range(trials))
    zeros = torch.zeros(trials, dtype=torch.int64)
    p, q = target.expand(trials, 2, -1), draft.expand(trials, 1, -1)
    noise = gumbel(seeds, zeros, vocab_size)

    def first_tokens(drafts, draw):
        lengths = torch.ones_like(zeros)
        keep = keep_probabilities("token", p, q, drafts[:, None], lengths)
        uniforms = uniform(seeds, 0, 0, Stream.VERIFY)[:, None]
        kept = accepted_lengths("token", keep, uniforms, lengths)
        following = next_law("token", p, q, drafts[:, None], lengths, kept)
        return torch.where(kept > 0, drafts, draw(following))

    shared = first_tokens(
        (draft.log() + noise).argmax(1), lambda law: (law.log() + noise).argmax(1)
    )
    independent = first_tokens(
        sample(q[:, 0], uniform(seeds, 0, 0, Stream.DRAFT)),
        lambda law: sample(law, uniform(seeds, 0, 0, Stream.NEXT)),
    )
    assert chi_squared(independent, target) < 45  # 15 degrees of freedom: p = 1e-4 at 44
    assert chi_squared(shared, target) > 1000
