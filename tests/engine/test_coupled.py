"""The coupled verifier: sampled tokens, and yet the very tokens of plain decoding."""

from __future__ import annotations

from itertools import product

import pytest

from dspark.engine.speculation.schedule import Schedule

NEW_TOKENS = 12


@pytest.fixture(scope="module")
def prompts(tiny):
    return tiny.make_prompts(6, 64, seed=5)


def coupled(tiny, target, drafter, prompts, **options):
    requests = tiny.make_requests(
        prompts,
        max_new_tokens=NEW_TOKENS,
        temperature=1.0,
        top_p=0.95,
        presence_penalty=0.2,
        seed=100,
    )
    return tiny.decode(target, drafter, requests, verifier="coupled", **options)


@pytest.fixture(scope="module")
def plain(tiny, target, prompts):
    return tiny.token_ids(coupled(tiny, target, None, prompts, max_requests=1))


@pytest.mark.parametrize("setting", list(product([1, 2, 4], [None, 0.5, 0.8], [1, 4])), ids=str)
def test_tokens_do_not_hang_on_how_they_were_drafted(tiny, target, prompts, plain, setting):
    options = dict(zip(("block_size", "threshold", "max_requests"), setting, strict=True))
    drafter = tiny.make_drafter(target, head="rnn")
    outputs = coupled(tiny, target, drafter, prompts, **options)
    assert tiny.token_ids(outputs) == plain


@pytest.mark.parametrize("kind", ["target", "spoiled", "markov", "ngram"])
def test_tokens_do_not_hang_on_the_drafter(tiny, target, prompts, plain, kind):
    drafter = {
        "target": tiny.TargetDrafter(target),
        "spoiled": tiny.TargetDrafter(target, spoil=3),
        "markov": tiny.MarkovDrafter(64),
        "ngram": tiny.ngram(target),
    }[kind]
    outputs = coupled(tiny, target, drafter, prompts, max_requests=3)
    assert tiny.token_ids(outputs) == plain
    if kind == "target":  # same law and same noise on both sides
        assert all(output.stats.accepted == output.stats.verified > 0 for output in outputs)


def test_the_sample_is_one(tiny, target, prompts, plain):
    """Control: other seeds, and other verifiers with a drafter, give other tokens."""
    assert len(set(plain)) == len(plain)
    other = tiny.make_requests(prompts, max_new_tokens=NEW_TOKENS, temperature=1.0, seed=101)
    assert tiny.token_ids(tiny.decode(target, None, other, verifier="coupled")) != plain
    params = {"max_new_tokens": NEW_TOKENS, "temperature": 1.0, "top_p": 0.95}
    same = tiny.make_requests(prompts, **params, presence_penalty=0.2, seed=100)
    block = tiny.decode(target, tiny.MarkovDrafter(64), same, schedule=Schedule("fixed"))
    assert tiny.token_ids(block) != plain
