"""Reported log-probabilities: of the raw row that emitted the token, whoever drafted it."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from dspark.engine.engine import Engine
from dspark.engine.requests.logprobs import emitted_logprobs
from dspark.engine.speculation import verify as judging
from dspark.request import VERIFIERS, Request, SamplingParams

CLOSE = {"rel": 1e-9, "abs": 1e-9}


@pytest.fixture(scope="module")
def exact(tiny):
    """A target in fp64, and the same model as transformers runs it."""
    return (tiny.make_target(dtype=torch.float64), tiny.make_model(dtype=torch.float64))


def requests_of(tiny, temperature):
    """Every kind of processor, and different numbers of top tokens."""
    prompts = tiny.make_prompts(6, 64, seed=4)
    kinds = (
        {"logprobs": 0},
        {"logprobs": 3, "presence_penalty": 0.8, "logit_bias": {7: 5.0, 9: float("-inf")}},
        {"logprobs": None},
        {"logprobs": 20, "top_k": 2, "top_p": 0.8, "repetition_penalty": 1.4},
        {"logprobs": 1, "stop_token_ids": tuple(range(0, 64, 5))},
        {"logprobs": 2, "min_p": 0.2},
    )
    return [
        Request(tuple(prompt), SamplingParams(11 + i, temperature=temperature, seed=i, **kind))
        for i, (prompt, kind) in enumerate(zip(prompts, kinds, strict=True))
    ]


def check_against_the_model(model, request, output):
    """By one plain forward over prompt and output."""
    count = request.params.logprobs
    if count is None:
        assert output.logprobs is None
        return
    ids = [*request.prompt_ids, *output.token_ids]
    with torch.inference_mode():
        rows_TV = model(torch.tensor([ids])).logits[0, len(request.prompt_ids) - 1 : -1]
    rows_TV = rows_TV.log_softmax(-1)
    assert len(output.logprobs) == len(output.token_ids)
    for token, row_V, found in zip(output.token_ids, rows_TV, output.logprobs, strict=True):
        assert found.token_id == token
        assert found.logprob == pytest.approx(row_V[token].item(), **CLOSE)
        best_K = row_V.argsort(descending=True, stable=True)[:count]
        assert [t for t, _ in found.top] == best_K.tolist()
        assert [p for _, p in found.top] == pytest.approx(row_V[best_K].tolist(), **CLOSE)


@pytest.mark.parametrize("verifier", VERIFIERS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_they_are_the_models_own(tiny, exact, verifier, temperature):
    target, model = exact
    requests = requests_of(tiny, temperature)
    for drafter in (None, tiny.make_drafter(target), tiny.TargetDrafter(target, spoil=3)):
        for batch in (1, 4):
            options = {"max_requests": batch, "verifier": verifier}
            outputs = tiny.decode(target, drafter, requests, **options)
            for request, output in zip(requests, outputs, strict=True):
                check_against_the_model(model, request, output)
    assert sum(output.stats.accepted for output in outputs) > 10


@pytest.mark.parametrize(
    ("verifier", "temperature"), [*product(VERIFIERS, (0.0,)), ("coupled", 1.0)]
)
def test_they_are_equal_with_and_without_speculation(tiny, exact, verifier, temperature):
    target, _ = exact
    requests = requests_of(tiny, temperature)
    plain = tiny.decode(target, None, requests, verifier=verifier, max_requests=1)
    for drafter in (tiny.make_drafter(target), tiny.TargetDrafter(target, spoil=3)):
        outputs = tiny.decode(target, drafter, requests, verifier=verifier, max_requests=3)
        assert tiny.token_ids(outputs) == tiny.token_ids(plain)
        for mine, theirs in zip(outputs, plain, strict=True):
            for a, b in zip(mine.logprobs or (), theirs.logprobs or (), strict=True):
                assert a.token_id == b.token_id
                assert a.logprob == pytest.approx(b.logprob, **CLOSE)
                assert [t for t, _ in a.top] == [t for t, _ in b.top]


def test_pieces_carry_them_and_nothing_stands_behind_the_end(tiny, exact):
    target, _ = exact
    [plain] = tiny.decode(target, None, [Request((7, 20, 31), SamplingParams(20))])
    for last in set(plain.token_ids):
        engine = Engine(target, tiny.TargetDrafter(target), max_length=60)
        engine.add(Request((7, 20, 31), SamplingParams(20, stop_token_ids=(last,), logprobs=1)))
        pieces, output = [], None
        while engine.has_work:
            for event in engine.step():
                pieces += event.pieces
                output = event.output
        assert tuple(piece.logprob for piece in pieces) == output.logprobs
        assert [piece.logprob.token_id for piece in pieces] == [p.token_id for p in pieces]
        assert len(output.logprobs) == plain.token_ids.index(last) + 1


def test_nothing_is_computed_where_nobody_asks(tiny, target, monkeypatch):
    def fail(*_args):
        raise AssertionError("log-probabilities were computed")

    monkeypatch.setattr(judging, "emitted_logprobs", fail)
    requests = tiny.make_requests(tiny.make_prompts(3, 64), max_new_tokens=6)
    outputs = tiny.decode(target, tiny.make_drafter(target), requests)
    assert [output.logprobs for output in outputs] == [None] * 3
    asking = Request((1, 2), SamplingParams(4, logprobs=0))
    with pytest.raises(AssertionError, match="were computed"):
        tiny.decode(target, None, [asking])


def test_ties_and_tokens_that_are_ruled_out():
    inf = float("inf")
    logits = torch.tensor([[1.0, 3.0, 3.0, -inf, 3.0], [0.0, -inf, -inf, -inf, 1.0]])
    [first, second] = emitted_logprobs(logits, (0, 0), [[1], [4]], [2, 20])
    assert [token for token, _ in first[0].top] == [1, 2]
    assert [token for token, _ in second[0].top] == [4, 0]
    assert second[0].logprob == second[0].top[0][1] == pytest.approx(-0.3132617)


def test_short_dtypes_are_reported_in_fp32():
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    [[found]] = emitted_logprobs(logits, (0,), [[3]], [0])
    assert found.logprob == logits.float().log_softmax(-1)[0, 3].item()
    assert found.top == ()
