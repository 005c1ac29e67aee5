"""Cases about randomness: keys that name the round, and noise that must not be shared."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from dspark.evaluation.proof.case import Case, control, exact
from dspark.evaluation.proof.rounds import RULES, outcomes
from dspark.evaluation.proof.worlds import (
    Distance,
    World,
    all_paths,
    along,
    number,
    sequence_distribution,
)
from dspark.sampling import verification
from dspark.sampling.noise import Stream, gumbel, seed_tensor, uniform
from dspark.sampling.verification import Blocks, Rule

TRIALS, WIDE = 200_000, 16
CHI_LIMIT = 45.0
"""Of 15 degrees of freedom: an exact sampler exceeds it once in 10,000 runs."""


def noise_cases(seed: int = 0) -> Iterator[Case]:
    """The wrong keys, and the noise that must not be shared."""
    yield from _keyed_by_position(seed)
    yield _shared_gumbel(seed)


def _keyed_by_position(seed: int) -> Iterator[Case]:
    """A uniform that judged a position in one round must not judge it again in the next."""
    distances: dict[tuple[Rule, bool], Distance] = {}
    worlds = [_two_round_world(s) for s in range(seed, seed + 12)]
    for rule, keyed in product(RULES, (False, True)):
        distances[rule, keyed] = Distance.farthest(
            [
                Distance.of(
                    two_round_distribution(world, rule, keyed_by_position=keyed),
                    [sequence_distribution(world.target, 4)],
                )
                for world in worlds
            ]
        )
    yield control(
        "block: noise keyed by position alone",
        distances["block", True],
        distances["block", False],
        documented=0.031,
    )
    # It never looks behind its first failure, so it alone survives this mistake.
    yield exact("token / noise keyed by position alone", distances["token", True])


def _two_round_world(seed: int) -> World:
    generator = torch.Generator().manual_seed(seed)

    def table(rows: int) -> Tensor:
        return (1.5 * torch.randn(rows, 2, generator=generator, dtype=torch.float64)).softmax(1)

    markov = table(2)
    return World(tuple(table(2**d) for d in range(4)), (markov[:1], markov), ())


def two_round_distribution(world: World, rule: Rule, *, keyed_by_position: bool) -> Tensor:
    """Two rounds of K = 2 over four tokens, where round 2 may meet a uniform of round 1 again.

    Only where round 1 keeps nothing does its second test lie at the position of round 2's first.

    Args:
        world: its target reaches four tokens; both rounds draft with its Markov tables.
        rule: the verifier.
        keyed_by_position: whether the two tests there share their uniform.

    Returns:
        [V**4].
    """
    vocab_size, paths = world.vocab_size, world.paths()
    p, q = (Blocks.dense(along(laws, paths)) for laws in (world.target[:3], world.draft))
    lengths = torch.full((len(paths),), 2)
    keep = verification.keep_probabilities(rule, p, q, paths, lengths)
    total = torch.zeros(vocab_size**4, dtype=torch.float64)
    for uniforms, chance in outcomes(keep):
        kept = verification.accepted_lengths(rule, keep, uniforms, lengths)
        law = verification.next_distribution(rule, p, q, paths, lengths, kept).dense()
        shares = (world.path_weights() * chance)[:, None] * law
        for n, token in product(range(len(paths)), range(vocab_size)):
            if float(shares[n, token]) == 0:
                continue
            if int(kept[n]) > 0:
                prefix = torch.tensor([[*paths[n, : int(kept[n])].tolist(), token]])
                rest = sequence_distribution(world.target, 4 - prefix.shape[1], prefix.shape[1])
                place = number(prefix, vocab_size)[0]
                total.view(-1, rest.shape[1])[place] += shares[n, token] * rest[place]
                continue
            # Where the uniform is shared it lies on the side of keep that round 1 saw.
            edge, passed = float(keep[n, 1]), bool(uniforms[n, 1] <= keep[n, 1])
            seen = (0.0, edge) if passed else (edge, 1.0)
            bounds = seen if keyed_by_position else (0.0, 1.0)
            total += shares[n, token] * _second_round(world, rule, token, bounds)
    return total


def _second_round(world: World, rule: Rule, anchor: int, bounds: tuple[float, float]) -> Tensor:
    """The distribution of four tokens after `anchor`, the first uniform being within `bounds`."""
    vocab_size, paths = world.vocab_size, all_paths(world.vocab_size, 2)
    whole = torch.cat([torch.full((len(paths), 1), anchor), paths], dim=1)
    p = Blocks.dense(along(world.target, whole)[:, 1:4])
    first = world.draft[1][anchor]
    q_RKV = torch.stack([first.expand(len(paths), -1), world.draft[1][paths[:, 0]]], dim=1)
    q = Blocks.dense(q_RKV)
    weights = q.of(paths).prod(1)
    lengths = torch.full((len(paths),), 2)
    keep = verification.keep_probabilities(rule, p, q, paths, lengths)
    low, high = bounds
    total = torch.zeros(vocab_size**4, dtype=torch.float64)
    for passed in product((True, False), repeat=2):
        side = torch.tensor(passed).expand_as(keep)
        uniforms = torch.where(side, keep / 2, (1 + keep) / 2)
        inside = ((keep[:, 0] - low) / (high - low)).clamp(0, 1)
        chances = torch.stack([inside, keep[:, 1]], dim=1)
        chance = torch.where(side, chances, 1 - chances).prod(1)
        kept = verification.accepted_lengths(rule, keep, uniforms, lengths)
        law = verification.next_distribution(rule, p, q, paths, lengths, kept).dense()
        for n, count in enumerate(kept.tolist()):
            depth = count + 2
            rest = sequence_distribution(world.target, 4 - depth, depth)
            place = int(number(whole[n : n + 1, : count + 1], vocab_size)) * vocab_size
            share = weights[n] * chance[n] * law[n][:, None]
            after = slice(place, place + vocab_size)
            total.view(-1, rest.shape[1])[after] += share * rest[after]
    return total


def _shared_gumbel(seed: int) -> Case:
    """One Gumbel noise draws the draft and the residual: sampled, in a narrow vocabulary.

    Narrow on purpose: in a wide one the same mistake hides in the noise.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(WIDE, generator=generator, dtype=torch.float64)
    target, draft = logits.softmax(0), (-logits).softmax(0)
    seeds = seed_tensor(range(seed, seed + TRIALS))
    zeros = torch.zeros(TRIALS, dtype=torch.int64)
    p, q = (
        Blocks.dense(law.expand(TRIALS, places, -1)) for law, places in ((target, 2), (draft, 1))
    )
    noise = gumbel(seeds, zeros, torch.arange(WIDE))

    def counts(drafts: Tensor, *, shared: bool) -> Tensor:
        lengths = torch.ones_like(zeros)
        keep = verification.keep_probabilities("token", p, q, drafts[:, None], lengths)
        tests = uniform(seeds, 0, 0, Stream.VERIFY)[:, None]
        kept = verification.accepted_lengths("token", keep, tests, lengths)
        law = verification.next_distribution("token", p, q, drafts[:, None], lengths, kept)
        fresh = uniform(seeds, 0, 0, Stream.NEXT)
        next_ = (law.dense().log() + noise).argmax(1) if shared else law.draw(fresh)
        return torch.bincount(torch.where(kept > 0, drafts, next_), minlength=WIDE).double()

    wrong = counts((draft.log() + noise).argmax(1), shared=True)
    right = counts(q.distribution.draw(uniform(seeds, 0, 0, Stream.DRAFT)), shared=False)
    chi_wrong, chi_right = (
        float(((seen - target * TRIALS) ** 2 / (target * TRIALS)).sum()) for seen in (wrong, right)
    )
    return control(
        "token: Gumbel noise shared by draft and residual",
        Distance(float((wrong / TRIALS - target).abs().sum() / 2)),
        note=f"{TRIALS:,} samples: chi-squared {chi_wrong:.0f}, independent {chi_right:.0f}",
        holds=chi_wrong > 10 * CHI_LIMIT and chi_right < CHI_LIMIT,
    )
