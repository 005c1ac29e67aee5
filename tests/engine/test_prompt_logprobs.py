"""Log-probabilities of prompts, and outputs that may not end before so many tokens."""

from __future__ import annotations

import pytest
import torch

from dspark.errors import UsageError
from dspark.request import Request, SamplingParams

CLOSE = {"rel": 1e-9, "abs": 1e-9}


@pytest.fixture(scope="module")
def exact(tiny):
    """A target in fp64, and the same model as transformers runs it."""
    return (tiny.make_target(dtype=torch.float64), tiny.make_model(dtype=torch.float64))


def check(model, request, output):
    """By one plain forward over the prompt."""
    count, ids = request.prompt_logprobs, request.prompt_ids
    if count is None:
        assert output.prompt_logprobs is None
        return
    with torch.inference_mode():
        rows_TV = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    assert [found.token_id for found in output.prompt_logprobs] == list(ids[1:])
    for row_V, found in zip(rows_TV, output.prompt_logprobs, strict=True):
        assert found.logprob == pytest.approx(row_V[found.token_id].item(), **CLOSE)
        best_K = row_V.argsort(descending=True, stable=True)[:count]
        assert [token for token, _ in found.top] == best_K.tolist()


@pytest.mark.parametrize("step_tokens", [7, 512])
@pytest.mark.parametrize("cache_tokens", [None, 96])
def test_prompts_are_scored_as_the_model_does(tiny, exact, step_tokens, cache_tokens):
    """Read whole or in parts, equal beginnings and requests that give way among them."""
    target, model = exact
    prompts = [tuple(prompt) for prompt in tiny.make_prompts(4, 64, seed=3)]
    prompts += [prompts[0] * 4, prompts[0] * 4 + (5, 6), (9,)]
    requests = [
        Request(prompt, SamplingParams(8, seed=i), prompt_logprobs=(None, 0, 3)[i % 3])
        for i, prompt in enumerate(prompts * 2)
    ]
    plain = [Request(request.prompt_ids, request.params) for request in requests]
    for drafter in (None, tiny.TargetDrafter(target, spoil=3)):
        options = {"max_requests": 5, "step_tokens": step_tokens, "cache_tokens": cache_tokens}
        outputs = tiny.decode(target, drafter, requests, **options)
        for request, output in zip(requests, outputs, strict=True):
            check(model, request, output)
        others = tiny.decode(target, drafter, plain, **options)
        assert [o.token_ids for o in outputs] == [o.token_ids for o in others]


@pytest.mark.parametrize("wanted", [-1, 21, True, 1.0])
def test_counts_that_cannot_be_had_are_refused(wanted):
    with pytest.raises(UsageError, match="prompt_logprobs is"):
        Request((1,), prompt_logprobs=wanted)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_ends_before_min_tokens(tiny, target, temperature):
    """An end token is the likeliest everywhere else; the drafter proposes it all the same."""
    ends = tuple(range(0, 64, 2))
    request = Request(
        (7, 20, 31), SamplingParams(20, temperature=temperature, stop_token_ids=ends, seed=4)
    )
    for least in (0, 1, 6, 20):
        params = SamplingParams(
            20, min_tokens=least, temperature=temperature, stop_token_ids=ends, seed=4
        )
        found = []
        for drafter in (None, tiny.TargetDrafter(target), tiny.ngram(target)):
            [output] = tiny.decode(
                target, drafter, [Request(request.prompt_ids, params)], verifier="coupled"
            )
            before = output.token_ids[:least]
            assert len(before) == least
            assert not set(before) & set(ends)
            found.append(output.token_ids)
        assert found[0] == found[1] == found[2]
        # From there on the first end token ends it.
        assert not set(found[0][least:-1]) & set(ends)


def test_stop_strings_within_the_first_tokens_are_text(tiny, talker):
    target = talker
    [free] = tiny.decode(target, None, [Request((7, 20), SamplingParams(12))])
    letter = next(letter for letter in free.text[1:] if letter.strip() and letter.isascii())
    params = SamplingParams(12, stop=(letter,))
    [cut] = tiny.decode(target, None, [Request((7, 20), params)])
    assert cut.text == free.text[: free.text.index(letter)]
    params = SamplingParams(12, min_tokens=12, stop=(letter,))
    [whole] = tiny.decode(target, None, [Request((7, 20), params)])
    assert whole.text == free.text


def test_min_tokens_beyond_the_limit_are_refused():
    with pytest.raises(UsageError, match="min_tokens is 3"):
        SamplingParams(2, min_tokens=3)
