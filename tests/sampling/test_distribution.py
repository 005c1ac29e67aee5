"""Both forms of a distribution against numbers for every token, written out."""

from __future__ import annotations

import pytest
import torch

from dspark.request import SamplingParams
from dspark.sampling import distribution, filters, noise
from dspark.sampling.distribution import Dense, Sparse
from dspark.sampling.logits_processors import Chain, Known, token_distribution
from dspark.sampling.noise import gumbel, most_noisy, uniform
from tests.helpers.laws import dense_law, dense_sample

V = 1000
KNOWN = torch.arange(3, V, 7)


def logits(rows, width=V, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator) * scale


def chain(rows, **options):
    return Chain.of([SamplingParams(**{"temperature": 1.0, **options})] * rows)


FORMS = {
    "narrow": (chain(40, top_p=0.8), None),
    "narrow, known": (chain(40, top_k=9, min_p=0.01), Known(KNOWN, V)),
    "wide": (chain(40), None),
    "wide, known": (chain(40), Known(KNOWN, V)),
    "wide, own tokens": (
        chain(40),
        Known(torch.stack([torch.arange(n, V, 50 + n) for n in range(1)] * 40), V),
    ),
}


@pytest.fixture(params=FORMS)
def form(request):
    row_chain, known = FORMS[request.param]
    width = V if known is None else known.tokens.shape[-1]
    return token_distribution(logits(40, width), row_chain, None, None, known)


def test_tokens_are_drawn_as_by_the_whole_distribution_function(form):
    uniforms = uniform(torch.arange(40), 1, 2)
    for _ in range(20):
        uniforms = uniform((uniforms * 2**40).long(), 3)
        assert torch.equal(form.draw(uniforms), dense_sample(form.dense(), uniforms))


def test_coupled_tokens_are_the_argmax_over_all_tokens(form):
    seeds, positions = torch.arange(40) * 17, torch.arange(40)
    wanted = (form.dense().double().log() + gumbel(seeds, positions, torch.arange(V))).argmax(1)
    assert torch.equal(form.draw_coupled(seeds, positions), wanted)


@pytest.mark.parametrize("scale", [0.0, 0.3, 3.0, 30.0])
def test_the_race_is_won_by_the_same_token_however_flat_the_law(monkeypatch, scale):
    monkeypatch.setattr(noise, "_FEW_TOKENS", 0)
    seeds, positions = torch.arange(300), torch.zeros(300, dtype=torch.int64)
    probs = logits(300, scale=scale, seed=4).softmax(1)
    wanted = (probs.double().log() + gumbel(seeds, positions, torch.arange(V))).argmax(1)
    assert torch.equal(most_noisy(probs, seeds, positions), wanted)


def test_probabilities_and_masses_are_those_of_the_dense_rows(form):
    rows = torch.tensor([3, 3, 0, 39])
    tokens = torch.stack([torch.arange(0, V, 3)] * 4)
    assert torch.equal(form.at(rows, tokens), form.dense()[rows].gather(1, tokens))
    assert torch.equal(form.rows(rows).dense(), form.dense()[rows])
    assert torch.allclose(form.mass(), torch.ones(40, dtype=torch.float64), atol=1e-6)


def test_excess_is_that_of_the_dense_rows(form):
    weights = torch.linspace(0, 1, 40)
    rows = torch.arange(40).flip(0)
    for p in (
        token_distribution(logits(40, seed=2), chain(40)),
        token_distribution(logits(40, seed=2), chain(40, top_p=0.9)),
    ):
        found = p.excess(torch.arange(40), form, rows, weights)
        wanted = (weights[:, None] * p.dense() - form.dense()[rows]).clamp(min=0)
        assert torch.equal(found.dense(), wanted)


@pytest.mark.parametrize(
    "options", [{"top_p": 0.95}, {"top_k": 50}, {"min_p": 0.02}, {"top_k": 80, "top_p": 0.7}]
)
@pytest.mark.parametrize("scale", [0.05, 1.0, 4.0])
@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_the_likeliest_tokens_are_the_reference_s(options, scale, temperature):
    """A vocabulary that is searched by groups, in double precision, from flat to sharp."""
    wide = logits(24, 9000, scale=scale).double()
    wide[::3] = wide[::3].round(decimals=1)  # ties
    rows = chain(24, temperature=temperature, **options)
    wanted = dense_law(wide, rows)
    got = token_distribution(wide, rows)
    assert isinstance(got, Sparse)
    assert bool((got.tokens_NC[:, 1:] >= got.tokens_NC[:, :-1]).all())
    assert torch.equal(got.dense() > 0, wanted > 0)
    assert torch.allclose(got.dense(), wanted, rtol=1e-12, atol=0)
    single = dense_law(wide.float(), rows)
    assert torch.allclose(
        token_distribution(wide.float(), rows).dense(), single, rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize(
    "options",
    [{"top_p": 0.95}, {"top_p": 1 - 1e-6}, {"min_p": 1e-3}, {"top_p": 0.9, "min_p": 1e-2}],
)
@pytest.mark.parametrize("scale", [0.0, 0.05, 1.0, 2.0, 16.0])
def test_a_histogram_finds_what_a_selection_finds(monkeypatch, options, scale):
    flat = logits(24, 9000, scale=scale)
    flat[::3] = flat[::3].round(decimals=1)  # ties
    flat[1, ::2] = float("-inf")
    found = token_distribution(flat, chain(24, **options))

    def select(scores_NC, tails):
        return filters._selected(scores_NC, tails, torch.full((len(scores_NC),), 9000))

    monkeypatch.setattr(filters, "_binned", select)
    wanted = token_distribution(flat, chain(24, **options))
    kept_N = (wanted.dense() > 0).sum(1)
    assert bool((kept_N > 512).any()) or scale == 16.0
    assert torch.equal(found.tokens_NC, wanted.tokens_NC)
    assert torch.allclose(found.probs_NC, wanted.probs_NC, rtol=1e-6, atol=0)


def test_no_bit_of_a_row_hangs_on_a_neighbour_s_top_k():
    rows = logits(24, 9000, scale=2.0)
    alone = token_distribution(rows, chain(24, top_p=0.9)).dense()
    params = [SamplingParams(temperature=1.0, top_p=0.9)] * 24
    beside = Chain.of([*params, SamplingParams(temperature=1.0, top_k=700)], "cpu").rows(range(25))
    together = token_distribution(torch.cat([rows, rows[:1]]), beside).dense()
    assert torch.equal(together[:24], alone)


def test_highest_of_groups_equals_topk():
    for width in (5000, 4097, 70000):
        scores = logits(6, width, seed=width)
        values, columns = filters.highest(scores, 64)
        wanted = scores.topk(64, dim=1)
        assert torch.equal(values, wanted.values)
        assert torch.equal(columns, wanted.indices)


@pytest.mark.parametrize("form_name", ["narrow", "wide"])
def test_no_bit_of_a_row_hangs_on_the_others(form_name, monkeypatch):
    """Nor on chunks, nor on how wide its neighbours are."""
    sharp, flat = logits(5, scale=8.0), logits(1, scale=0.01)
    row_chain = chain(6, **({"top_p": 0.97} if form_name == "narrow" else {}))
    together = token_distribution(torch.cat([sharp, flat]), row_chain)
    monkeypatch.setattr(distribution, "_CHUNK_NUMBERS", 1)
    chunked = token_distribution(torch.cat([sharp, flat]), row_chain)
    assert torch.equal(chunked.dense(), together.dense())
    uniforms = uniform(torch.arange(6), 5)
    for n in range(5):
        alone = token_distribution(sharp[n : n + 1], row_chain.rows([n]))
        assert torch.equal(alone.dense()[0], together.dense()[n])
        assert alone.draw(uniforms[n : n + 1])[0] == together.draw(uniforms)[n]
        assert torch.equal(alone.mass()[0], together.mass()[n])


def test_processors_act_on_known_tokens_as_on_all():
    """Bias, penalties and mask of a reduced vocabulary: the same law, 0 elsewhere."""
    from dspark.sampling.token_counts import TokenCounts

    params = SamplingParams(
        temperature=0.8,
        top_k=30,
        logit_bias={3: 5.0, 4: 7.0, 10: -2.0},
        repetition_penalty=1.4,
        frequency_penalty=0.2,
        presence_penalty=0.3,
    )
    rows = Chain.of([params] * 8)
    counts = TokenCounts.of([[3, 5, 17]] * 8, [[24, 24, 31]] * 8, V)
    mask = torch.rand(8, V, generator=torch.Generator().manual_seed(1)) < 0.7
    everything = logits(8)
    unknown = torch.ones(V, dtype=torch.bool)
    unknown[KNOWN] = False
    wanted = token_distribution(everything.masked_fill(unknown, float("-inf")), rows, counts, mask)
    for tokens in (KNOWN, KNOWN.expand(8, -1).contiguous()):
        got = token_distribution(everything[:, KNOWN], rows, counts, mask, Known(tokens, V))
        assert torch.equal(got.dense(), wanted.dense())


def test_numbers_for_all_columns_go_where_they_are_wanted():
    room = torch.empty(6, V)
    found = token_distribution(logits(4), chain(4), out=room)
    assert isinstance(found, Dense)
    assert found.probs_NC.data_ptr() == room.data_ptr()
    assert torch.equal(found.probs_NC, token_distribution(logits(4), chain(4)).dense())
