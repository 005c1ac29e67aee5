from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dspark.errors import NumericsError, RequestError
from dspark.request import SamplingParams
from dspark.sampling import filters
from dspark.sampling import logits_processors as processors
from dspark.sampling.distribution import Dense
from dspark.sampling.logits_processors import Chain, greedy_tokens
from dspark.sampling.token_counts import TokenCounts

INF = float("inf")
V = 13
PARAMS = [
    SamplingParams(),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.6, top_k=4),
    SamplingParams(temperature=1.4, top_p=0.7),
    SamplingParams(temperature=1.0, min_p=0.2),
    SamplingParams(temperature=0.9, top_k=6, top_p=0.9, min_p=0.05),
    SamplingParams(temperature=1.1, repetition_penalty=1.5, presence_penalty=0.4),
    SamplingParams(temperature=0.0, frequency_penalty=1.2, logit_bias={3: 2.0, 5: -INF}),
    SamplingParams(temperature=0.8, repetition_penalty=0.7, frequency_penalty=-0.3, top_p=0.5),
    SamplingParams(temperature=2.0, top_k=V + 5, logit_bias={0: -1.0}),
    SamplingParams(temperature=0.0, top_k=1, top_p=0.1, min_p=1.0),
]
PROMPTS = [[1, 2, 2, n % V] for n in range(len(PARAMS))]
OUTPUTS = [[(3 * n + k) % V for k in range(n % 4)] * 2 for n in range(len(PARAMS))]


def law(*args):
    return processors.token_distribution(*args).dense()


def sample(probs, uniforms):
    return Dense.of(probs).draw(uniforms)


def random_logits(rows, dtype=torch.float64, seed=0, width=V):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, width, generator=generator, dtype=torch.float64) * 2).to(dtype)


def slow_law(logits, params, prompt, output, allowed=None):
    """One row, one token at a time, as the documentation of SamplingParams says it."""
    scores = list(logits)
    for token in range(len(scores)):
        if token in prompt or token in output:
            rate = params.repetition_penalty
            scores[token] = scores[token] / rate if scores[token] > 0 else scores[token] * rate
        scores[token] -= params.frequency_penalty * output.count(token)
        if token in output:
            scores[token] -= params.presence_penalty
        scores[token] += params.logit_bias.get(token, 0.0)
        if allowed is not None and not allowed[token]:
            scores[token] = -INF
    order = sorted(range(len(scores)), key=lambda token: (-scores[token], token))
    if params.temperature == 0:
        return [float(token == order[0]) for token in range(len(scores))]
    if params.top_k:
        for token in order[params.top_k :]:
            scores[token] = -INF
    peak = max(scores)
    probs = [math.exp((score - peak) / params.temperature) for score in scores]
    probs = [prob / sum(probs) for prob in probs]
    if params.top_p < 1:
        mass = 0.0
        for token in order:
            if mass >= params.top_p:
                probs[token] = 0.0
            mass += probs[token]
    floor = params.min_p * max(probs)
    probs = [prob if prob >= floor else 0.0 for prob in probs]
    return [prob / sum(probs) for prob in probs]


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_law_equals_the_slow_reference_row_by_row(dtype, error):
    """One mixed batch, and every row alone through whatever fast paths it has."""
    generator = torch.Generator().manual_seed(1)
    for seed in range(20):
        logits = random_logits(len(PARAMS), dtype, seed)
        mask = torch.rand(len(PARAMS), V, generator=generator) < 0.8
        mask[:, 7] = True
        counts = TokenCounts.of(PROMPTS, OUTPUTS, V)
        chain = Chain.of(PARAMS)
        for allowed in (None, mask):
            got = law(logits, chain, counts, allowed)
            assert got.dtype == dtype
            for n, params in enumerate(PARAMS):
                row_mask = None if allowed is None else allowed[n]
                want = torch.tensor(
                    slow_law(logits[n].double().tolist(), params, PROMPTS[n], OUTPUTS[n], row_mask),
                    dtype=torch.float64,
                )
                assert torch.allclose(got[n].double(), want, rtol=0, atol=error)
                alone = law(
                    logits[n : n + 1],
                    Chain.of([params]),
                    TokenCounts.of([PROMPTS[n]], [OUTPUTS[n]], V),
                    None if allowed is None else allowed[n : n + 1],
                )
                assert torch.equal(alone[0], got[n])  # other rows change no bit


@pytest.mark.parametrize(
    ("params", "warpers"),
    [
        (SamplingParams(temperature=0.7), [TemperatureLogitsWarper(0.7)]),
        (SamplingParams(temperature=1.0, top_k=5), [TopKLogitsWarper(5)]),
        (SamplingParams(temperature=1.0, top_p=0.8), [TopPLogitsWarper(0.8)]),
        (SamplingParams(temperature=1.0, min_p=0.1), [MinPLogitsWarper(0.1)]),
        (
            SamplingParams(temperature=1.0, repetition_penalty=1.8),
            [RepetitionPenaltyLogitsProcessor(1.8)],
        ),
        (
            SamplingParams(
                temperature=1.3, repetition_penalty=1.3, top_k=20, top_p=0.9, min_p=0.02
            ),
            [
                RepetitionPenaltyLogitsProcessor(1.3),
                TemperatureLogitsWarper(1.3),
                TopKLogitsWarper(20),
                TopPLogitsWarper(0.9),
                MinPLogitsWarper(0.02),
            ],
        ),
    ],
)
@pytest.mark.parametrize("width", [40, 3000])
def test_law_equals_transformers(params, warpers, width):
    logits = random_logits(6, torch.float64, 3, width)
    prompt = torch.tensor([[1, 5, 9, 5]] * 6)
    output = torch.tensor([[2, 2, 30]] * 6)
    ids = torch.cat([prompt, output], dim=1)
    want = LogitsProcessorList(warpers)(ids, logits.clone()).softmax(1)
    counts = TokenCounts.of(prompt.tolist(), output.tolist(), width)
    got = law(logits, Chain.of([params] * 6), counts)
    assert torch.equal(got > 0, want > 0)
    assert torch.allclose(got, want, rtol=0, atol=1e-14)


def test_top_p_beyond_the_sorted_head_grows_it():
    """A flat law over more tokens than the head holds, beside a peaked one."""
    width = 3 * filters._WIDTHS[-1]
    logits = torch.zeros(2, width, dtype=torch.float64)
    logits[1, 17] = 50.0
    got = law(logits, Chain.of([SamplingParams(temperature=1.0, top_p=0.75)] * 2))
    assert int((got[0] > 0).sum()) == 3 * width // 4
    assert (got[1] > 0).nonzero().flatten().tolist() == [17]
    with_middle = logits[:, : 2 * filters._WIDTHS[0]]
    got = law(with_middle, Chain.of([SamplingParams(temperature=1.0, top_p=0.75)] * 2))
    assert int((got[0] > 0).sum()) == 3 * filters._WIDTHS[0] // 2


def test_ties_go_to_the_lowest_ids_everywhere():
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]])

    def kept(**options):
        got = law(logits, Chain.of([SamplingParams(**{"temperature": 1.0, **options})]))
        return (got[0] > 0).nonzero().flatten().tolist()

    assert kept(temperature=0.0) == [1]
    assert kept(top_k=1) == [1]
    assert kept(top_k=2) == [1, 2]
    assert kept(top_p=0.01) == [1]
    assert kept(top_p=0.5) == [1, 2]
    assert kept(min_p=1.0) == [1, 2, 3]
    assert greedy_tokens(logits, Chain.of([SamplingParams()])).tolist() == [1]
    assert greedy_tokens(logits.bfloat16(), Chain.of([SamplingParams()])).tolist() == [1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_tokens_are_the_argmax_of_the_greedy_law(dtype):
    params = [replace(row, temperature=0.0) for row in PARAMS]
    counts = TokenCounts.of(PROMPTS, OUTPUTS, V)
    chain, plain = Chain.of(params), Chain.of([SamplingParams()] * len(params))
    assert chain.greedy
    assert plain.plain
    mask = torch.rand(len(params), V, generator=torch.Generator().manual_seed(2)) < 0.7
    for seed in range(20):
        logits = random_logits(len(params), dtype, seed)
        for args in ((chain, counts), (chain, counts, mask), (plain,), (plain, None, mask)):
            laws = law(logits, *args)
            assert torch.equal(laws.sum(1), torch.ones(len(params)))
            assert torch.equal(greedy_tokens(logits, *args), laws.argmax(1))


def test_low_precision_logits_give_float32_laws():
    logits = random_logits(2, torch.bfloat16)
    chain = Chain.of([SamplingParams(temperature=0.9)] * 2)
    assert torch.equal(law(logits, chain), law(logits.float(), chain))
    assert law(logits, chain).dtype == torch.float32


def test_chain_rows_repeat_and_choose():
    index = torch.tensor([4, 4, 0, 9, 7, 7, 7])
    logits = random_logits(len(index))
    counts = TokenCounts.of([PROMPTS[n] for n in index], [OUTPUTS[n] for n in index], V)
    whole = Chain.of(PARAMS)
    want = law(logits, Chain.of([PARAMS[n] for n in index]), counts)
    assert torch.equal(law(logits, whole.rows(index), counts), want)
    assert torch.equal(law(logits, whole.rows(index.tolist()), counts), want)


def test_counts_follow_each_rows_own_prefix():
    state = TokenCounts.of([[0], [1, 1]], [[2], [2, 2, 3]], 5)
    drafts = torch.tensor([[3, 3, 4], [2, 0, 1]])
    requests = torch.tensor([0, 0, 0, 0, 1, 1])
    steps = torch.tensor([0, 1, 2, 3, 0, 2])
    rows = state.after_drafts(requests, steps, drafts)
    prompts = [[0]] * 4 + [[1, 1]] * 2
    outputs = [[2], [2, 3], [2, 3, 3], [2, 3, 3, 4], [2, 2, 3], [2, 2, 3, 2, 0]]
    want = TokenCounts.of(prompts, outputs, 5)
    assert torch.equal(rows.output_NV, want.output_NV)
    assert torch.equal(rows.prompt_NV, want.prompt_NV)
    assert torch.equal(state.output_NV, TokenCounts.of([[0]] * 2, [[2], [2, 2, 3]], 5).output_NV)


def test_committed_tokens_are_counted_even_when_repeated():
    state = TokenCounts.of([[0], [1]], [[], [2]], 5)
    state.commit(torch.tensor([0, 0, 1, 0]), torch.tensor([4, 4, 2, 1]))
    assert torch.equal(
        state.output_NV, TokenCounts.of([[0], [1]], [[4, 4, 1], [2, 2]], 5).output_NV
    )


def test_temperature_near_zero_does_not_overflow():
    logits = torch.tensor([[1e4, 1e4 - 1, -1e4]])
    for temperature in (1e-300, 1e-30, 1e-6):
        got = law(logits, Chain.of([SamplingParams(temperature=temperature)]))
        assert got.tolist() == [[1.0, 0.0, 0.0]]


@pytest.mark.parametrize("bad", [float("nan"), INF])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits_name_their_row(bad, temperature):
    logits = random_logits(3)
    logits[2, 4] = bad
    chain = Chain.of([SamplingParams(temperature=temperature)] * 3)
    mask = torch.ones(3, V, dtype=torch.bool)
    mask[2, 4] = False  # masking the token does not make the model sound
    for call in (law, greedy_tokens):
        for allowed in (None, mask):
            with pytest.raises(NumericsError, match="Row 2 of the logits"):
                call(logits, chain, None, allowed)
    with pytest.raises(NumericsError, match="Row 0"):
        law(torch.full((1, 4), -INF), Chain.of([SamplingParams()]))


def test_requests_that_cannot_be_served_are_refused():
    logits = random_logits(2)
    mask = torch.ones(2, V, dtype=torch.bool)
    mask[1] = False
    plain = Chain.of([SamplingParams(temperature=1.0)] * 2)
    for call in (law, greedy_tokens):
        with pytest.raises(RequestError, match="leave row 1 no token"):
            call(logits, plain, None, mask)
        with pytest.raises(RequestError, match="pass TokenCounts"):
            call(logits, Chain.of([SamplingParams(presence_penalty=1.0)] * 2))
        with pytest.raises(RequestError, match="names token 13, but the vocabulary has 13"):
            call(logits, Chain.of([SamplingParams(logit_bias={13: 1.0})] * 2))


def test_sample_is_the_inverse_of_the_distribution_function():
    probs = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]])
    cells = {1e-9: 1, 0.2499: 1, 0.2501: 3, 0.7499: 3, 0.7501: 4, 1 - 2.0**-53: 4}
    uniforms = torch.tensor(list(cells), dtype=torch.float64)
    assert sample(probs.expand(len(cells), -1), uniforms).tolist() == list(cells.values())


def test_sample_never_draws_a_token_of_probability_zero():
    """At both ends of (0, 1), for laws whose sums are rounded in every way."""
    probs = law(
        random_logits(500, torch.float32, width=300),
        Chain.of([SamplingParams(temperature=1.0, top_p=0.6)] * 500),
    )
    for edge in (2.0**-53, 1 - 2.0**-53):
        tokens = sample(probs, torch.full((500,), edge, dtype=torch.float64))
        assert bool((probs.gather(1, tokens[:, None]) > 0).all())


def test_sample_counts_follow_the_law():
    trials = 200_000
    probs = law(random_logits(1, torch.float32), Chain.of([SamplingParams(temperature=1.0)]))
    uniforms = (torch.arange(trials, dtype=torch.float64) + 0.5) / trials
    counts = torch.bincount(sample(probs.expand(trials, -1), uniforms), minlength=V)
    assert torch.allclose(counts / trials, probs[0], rtol=0, atol=2 / trials)
