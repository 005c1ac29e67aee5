from __future__ import annotations

import pytest
import torch

from dspark.evaluation.proof import worlds
from dspark.request import SamplingParams
from dspark.sampling import verification
from dspark.sampling.distribution import Dense
from dspark.sampling.logits_processors import Chain, greedy_tokens, token_distribution
from dspark.sampling.noise import Stream, gumbel, uniform
from dspark.sampling.verification import Blocks, accepted_by_identity, accepted_lengths

RULES = ("token", "block")


def keep_probabilities(rule, p, q, *rest):
    return verification.keep_probabilities(rule, Blocks.dense(p), Blocks.dense(q), *rest)


def next_distribution(rule, p, q, *rest):
    return verification.next_distribution(rule, Blocks.dense(p), Blocks.dense(q), *rest).dense()


def coupled_tokens(law, seeds, positions):
    return verification.coupled_tokens(Dense.of(law), seeds, positions)


def sample(probs, uniforms):
    return Dense.of(probs).draw(uniforms)


def random_round(requests, drafts, vocab_size, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    p = torch.randn(requests, drafts + 1, vocab_size, generator=generator, dtype=dtype).softmax(2)
    q = torch.randn(requests, drafts, vocab_size, generator=generator, dtype=dtype).softmax(2)
    x = torch.randint(0, vocab_size, (requests, drafts), generator=generator)
    lengths = torch.randint(0, drafts + 1, (requests,), generator=generator)
    return p, q, x, lengths


def slow_keep(rule, p, q, x, length):
    """One request, from the formulas."""
    ratios = [float(p[k, x[k]] / q[k, x[k]]) for k in range(length)]
    if rule == "token":
        return [min(1.0, ratio) for ratio in ratios]
    weight, keep = 1.0, []
    for i, ratio in enumerate(ratios, start=1):
        weight = min(weight * ratio, 1.0)
        if i == length:
            keep.append(weight)
        else:
            surplus = sum(max(weight * float(a) - float(b), 0) for a, b in zip(p[i], q[i]))  # noqa: B905
            keep.append(surplus / (surplus + 1 - weight))
    return keep


@pytest.mark.parametrize("rule", RULES)
def test_keep_probabilities_equal_the_formulas_at_ragged_lengths(rule):
    p, q, x, lengths = random_round(40, 4, 6)
    keep = keep_probabilities(rule, p, q, x, lengths)
    for r, length in enumerate(lengths.tolist()):
        want = slow_keep(rule, p[r], q[r], x[r], length) + [0.0] * (4 - length)
        assert keep[r].tolist() == pytest.approx(want, abs=1e-14)


def test_token_stops_at_the_first_failure_and_block_keeps_to_the_last_success():
    keep = torch.tensor([[0.5, 0.5, 0.5, 0.5]]).repeat(5, 1)
    low, high = 0.4, 0.6
    uniforms = torch.tensor(
        [
            [low, high, low, high],
            [high, high, high, low],
            [high, high, high, high],
            [low, low, low, low],
            [low, high, high, low],
        ]
    )
    lengths = torch.tensor([4, 4, 4, 4, 3])
    assert accepted_lengths("token", keep, uniforms, lengths).tolist() == [1, 0, 0, 4, 1]
    assert accepted_lengths("block", keep, uniforms, lengths).tolist() == [3, 4, 0, 4, 1]


@pytest.mark.parametrize("rule", RULES)
def test_what_lies_behind_the_length_is_ignored(rule):
    """Padding may hold anything, NaN included."""
    p, q, x, lengths = random_round(60, 3, 5)
    dirty_p, dirty_q, dirty_x = p.clone(), q.clone(), x.clone()
    for r, length in enumerate(lengths.tolist()):
        dirty_p[r, length + 1 :] = float("nan")
        dirty_q[r, length:] = float("nan")
        dirty_x[r, length:] = 0
    uniforms = uniform(torch.arange(60)[:, None], 0, torch.arange(3), Stream.VERIFY)
    results = []
    for laws in ((p, q, x), (dirty_p, dirty_q, dirty_x)):
        keep = keep_probabilities(rule, *laws, lengths)
        accepted = accepted_lengths(rule, keep, uniforms, lengths)
        results.append((keep, accepted, next_distribution(rule, *laws, lengths, accepted)))
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_laws_keep_everything_and_never_give_nan(rule, dtype):
    p, _, x, _ = random_round(50, 4, 6, dtype=dtype)
    p = p.to(dtype)
    lengths = torch.full((50,), 4)
    keep = keep_probabilities(rule, p, p[:, :4].clone(), x, lengths)
    assert torch.equal(keep, torch.ones_like(keep))
    for accepted in range(5):
        following = next_distribution(rule, p, p[:, :4], x, lengths, torch.full((50,), accepted))
        assert torch.equal(following, p[:, accepted])  # no residual mass: p itself


@pytest.mark.parametrize("rule", RULES)
def test_zero_probabilities_give_zeros_and_ones(rule):
    p = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]]).repeat(4, 1, 1)
    q = torch.tensor([[[0.0, 1.0], [0.0, 1.0]]]).repeat(4, 1, 1)
    # Drawn with q = 0 though p = 1; drawn where p = 0; the same at the second place.
    x = torch.tensor([[0, 1], [1, 1], [0, 0], [1, 0]])
    lengths = torch.full((4,), 2)
    keep = keep_probabilities(rule, p, q, x, lengths)
    assert torch.isfinite(keep).all()
    assert keep[0].tolist() == [1, 1]
    assert keep[1, 0] == 0
    uniforms = torch.full((4, 2), 0.5, dtype=torch.float64)
    accepted = accepted_lengths(rule, keep, uniforms, lengths)
    following = next_distribution(rule, p, q, x, lengths, accepted)
    assert torch.isfinite(following).all()
    assert torch.equal(following.sum(1), torch.ones(4))


@pytest.mark.parametrize("rule", RULES)
def test_float32_rounding_never_leaves_a_broken_law(rule):
    """p and q a few last bits apart: residuals of pure rounding, still laws."""
    p, _, x, lengths = random_round(200, 3, 50, dtype=torch.float32)
    noise = 1 + (torch.rand(200, 3, 50, generator=torch.Generator().manual_seed(1)) - 0.5) * 3e-7
    q = p[:, :3] * noise
    keep = keep_probabilities(rule, p, q, x, lengths)
    assert bool(((keep >= 0) & (keep <= 1)).all())
    for accepted in range(4):
        stop = torch.full((200,), accepted).minimum(lengths)
        following = next_distribution(rule, p, q, x, lengths, stop)
        assert bool((following >= 0).all())
        assert torch.allclose(following.sum(1), torch.ones(200), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_of_single_drafts_both_rules_say_the_same(dtype):
    """So the engine may take the cheaper one; of two drafts they do not."""
    for drafts in (1, 2):
        p, q, x, lengths = random_round(64, drafts, 9, seed=3, dtype=dtype)
        keeps = [keep_probabilities(rule, p, q, x, lengths) for rule in RULES]
        accepted = torch.minimum(torch.arange(64) % (drafts + 1), lengths)
        laws = [next_distribution(rule, p, q, x, lengths, accepted) for rule in RULES]
        assert torch.equal(*keeps) == torch.equal(*laws) == (drafts == 1)


def test_no_drafts_at_all_draw_from_the_target():
    p = random_round(3, 0, 5)[0]
    q, x, lengths = (
        p[:, :0],
        torch.zeros(3, 0, dtype=torch.int64),
        torch.zeros(3, dtype=torch.int64),
    )
    for rule in RULES:
        keep = keep_probabilities(rule, p, q, x, lengths)
        accepted = accepted_lengths(rule, keep, keep, lengths)
        assert accepted.tolist() == [0, 0, 0]
        assert torch.equal(next_distribution(rule, p, q, x, lengths, accepted), p[:, 0])
    assert accepted_by_identity(torch.zeros(3, 1), x, lengths).tolist() == [0, 0, 0]


@pytest.mark.parametrize("rule", RULES)
def test_block_keeps_at_least_as_much_as_token_on_average(rule):
    """Sun et al. 2024: never worse; here both expected accepted lengths, exactly."""
    p, q, _, _ = random_round(1, 3, 3, seed=4)
    paths = torch.cartesian_prod(*[torch.arange(3)] * 3)
    p, q = p.expand(27, -1, -1), q.expand(27, -1, -1)
    lengths = torch.full((27,), 3)
    weights = q.gather(2, paths[:, :, None]).squeeze(2).prod(1)
    token = keep_probabilities("token", p, q, paths, lengths).cumprod(1).sum(1)
    fail = 1 - keep_probabilities("block", p, q, paths, lengths)
    block = (1 - fail.flip(1).cumprod(1)).sum(1)
    assert float(weights @ block) > float(weights @ token) + 1e-3


@pytest.mark.parametrize("rule", RULES)
def test_greedy_equals_every_rule_on_one_hot_laws(rule):
    """Identity of tokens is the T = 0 case of the sampled rules, whatever the uniforms."""
    generator = torch.Generator().manual_seed(0)
    requests, drafts, vocab_size = 300, 4, 3
    logits = torch.randn(requests, drafts + 1, vocab_size, generator=generator)
    chain = Chain.of([SamplingParams()] * (requests * (drafts + 1)))
    tokens = greedy_tokens(logits.flatten(0, 1), chain).view(requests, drafts + 1)
    guesses = torch.randint(0, vocab_size, (requests, drafts), generator=generator)
    right = torch.rand(requests, drafts, generator=generator) < 0.7
    x = torch.where(right, tokens[:, :drafts], guesses)
    lengths = torch.randint(0, drafts + 1, (requests,), generator=generator)
    accepted = accepted_by_identity(tokens, x, lengths)

    p = token_distribution(logits.flatten(0, 1), chain).dense().view_as(logits)
    q = torch.nn.functional.one_hot(x, vocab_size).to(p.dtype)
    keep = keep_probabilities(rule, p, q, x, lengths)
    uniforms = uniform(torch.arange(requests)[:, None], 0, torch.arange(drafts), Stream.VERIFY)
    kept = accepted_lengths(rule, keep, uniforms, lengths)
    following = next_distribution(rule, p, q, x, lengths, kept)
    drawn = sample(following, uniform(torch.arange(requests), 0, 0, Stream.NEXT))
    assert torch.equal(kept, accepted)
    assert torch.equal(drawn, tokens[torch.arange(requests), accepted])
    assert len(set(accepted.tolist())) == drafts + 1  # every outcome occurs


@pytest.mark.parametrize("rule", RULES)
def test_the_real_noise_gives_the_targets_law(rule):
    """The whole round with the engine's own draws and streams, chi-squared against the target."""
    trials = 100_000
    world = worlds.random_world(6, 3, 2)
    seeds = torch.arange(trials)

    def laws(depth_laws, tokens):
        return depth_laws[worlds.number(tokens, 3)]

    drafts = torch.zeros(trials, 0, dtype=torch.int64)
    for k in range(2):
        drawn = sample(laws(world.draft[k], drafts), uniform(seeds, 0, k, Stream.DRAFT))
        drafts = torch.cat([drafts, drawn[:, None]], dim=1)
    p, q = worlds.along(world.target, drafts), worlds.along(world.draft, drafts)
    lengths = (drafts[:, 0] == 0).long() + 1  # c_2 would know x_1: a lawful trimming
    keep = keep_probabilities(rule, p, q, drafts, lengths)
    tests = uniform(seeds[:, None], 0, torch.arange(2), Stream.VERIFY)
    kept = accepted_lengths(rule, keep, tests, lengths)
    following = next_distribution(rule, p, q, drafts, lengths, kept)
    token = sample(following, uniform(seeds, 0, 0, Stream.NEXT))
    row = torch.arange(trials)
    output = torch.cat([drafts, torch.zeros(trials, 1, dtype=torch.int64)], dim=1)
    output[row, kept] = token
    for depth in (1, 2):  # what the round left open, plain decoding draws in later rounds
        rest = sample(laws(world.target[depth], output[:, :depth]), uniform(seeds, depth, 0, 2))
        output[:, depth] = torch.where(kept < depth, rest, output[:, depth])
    expected = worlds.target_distribution(world) * trials
    counts = torch.bincount(worlds.number(output, 3), minlength=27)
    assert float(((counts - expected) ** 2 / expected).sum()) < 58  # 26 degrees: p = 3e-4


def plain_coupled(world, seeds, length):
    """What the target alone draws, one token at a time."""
    tokens = torch.zeros(len(seeds), 0, dtype=torch.int64)
    for position in range(length):
        rows = world.target[position][worlds.number(tokens, world.vocab_size)]
        drawn = coupled_tokens(rows, seeds, torch.full_like(seeds, position))
        tokens = torch.cat([tokens, drawn[:, None]], dim=1)
    return tokens


def test_coupled_output_is_plain_decodings_whatever_the_drafter():
    """Three drafters, lengths chosen with sight of everything: the same tokens."""
    seeds = torch.arange(400)
    longest = 0
    for number, head in enumerate(worlds.HEADS):
        world = worlds.random_world(2, 4, 3)
        drafter = worlds.random_world(50 + number, 4, 3, head).draft
        plain = plain_coupled(world, seeds, 4)
        drafts = torch.zeros(len(seeds), 0, dtype=torch.int64)
        for k in range(3):
            q = drafter[k][worlds.number(drafts, 4)]
            drawn = coupled_tokens(q, seeds, torch.full_like(seeds, k))
            drafts = torch.cat([drafts, drawn[:, None]], dim=1)
        lengths = (drafts.sum(1) + seeds) % 4
        p = worlds.along(world.target, drafts)
        tokens = torch.stack(
            [coupled_tokens(p[:, k], seeds, torch.full_like(seeds, k)) for k in range(4)], dim=1
        )
        accepted = accepted_by_identity(tokens, drafts, lengths)
        longest = max(longest, int(accepted.max()))
        for r, count in enumerate(accepted.tolist()):
            output = [*drafts[r, :count].tolist(), int(tokens[r, count])]
            assert output == plain[r, : count + 1].tolist()
    assert longest == 3


def test_coupled_tokens_follow_the_law():
    trials = 100_000
    world = worlds.random_world(2, 3, 1)
    tokens = plain_coupled(world, torch.arange(trials), 2)
    expected = worlds.target_distribution(world) * trials
    counts = torch.bincount(worlds.number(tokens, 3), minlength=9)
    assert float(((counts - expected) ** 2 / expected).sum()) < 30  # 8 degrees: p = 2e-4


def test_coupled_acceptance_reaches_its_bound():
    """At least (1 - TV) / (1 + TV) per token (Daliri et al. 2024), and below the token rule."""
    trials = 100_000
    p, q, _, _ = random_round(1, 1, 8, seed=3)
    p, q = p[0, 0], q[0, 0]
    distance = float((p - q).abs().sum() / 2)
    seeds, zeros = torch.arange(trials), torch.zeros(trials, dtype=torch.int64)
    same = coupled_tokens(p.expand(trials, -1), seeds, zeros) == coupled_tokens(
        q.expand(trials, -1), seeds, zeros
    )
    rate = float(same.double().mean())
    assert (1 - distance) / (1 + distance) - 0.01 < rate < 1 - distance


def test_coupled_never_draws_a_token_of_probability_zero():
    laws = torch.tensor([[0.0, 1e-30, 0.0]]).expand(1000, -1)
    tokens = coupled_tokens(laws, torch.arange(1000), torch.zeros(1000, dtype=torch.int64))
    assert torch.equal(tokens, torch.ones_like(tokens))
    assert bool((gumbel(torch.arange(1000), tokens, torch.arange(3)).argmax(1) != 1).any())
