"""Bytes copied in a round: a few rows of logits, never the head or a table of the vocabulary."""

from __future__ import annotations

import math

import pytest
from torch.profiler import ProfilerActivity, profile

from dspark.engine.engine import Engine

VOCAB, ROUNDS = 4096, 3


def copied_bytes(profiled) -> int:
    """What `aten::copy_` wrote: clones, `contiguous` and changes of dtype all end there."""
    copies = [event for event in profiled.events() if event.name == "aten::copy_"]
    return sum(4 * math.prod(event.input_shapes[0]) for event in copies)


def heads_by_batch(profiled, columns) -> int:
    """Products that take the head once per slot or request: `bmm` copies it inside, unseen."""
    products = [event for event in profiled.events() if event.name == "aten::bmm"]
    return sum(columns in event.input_shapes[1] for event in products)


@pytest.fixture(scope="module")
def wide(tiny):
    target = tiny.make_target(vocab=VOCAB)
    target._anatomy.head.weight.mul_(40)  # sharp, as a language model's logits are
    return target


@pytest.mark.parametrize(
    ("params", "most"),
    [
        ({"temperature": 0.0}, 0.1),
        ({"temperature": 1.0, "top_p": 0.95}, 1.0),
        ({"temperature": 1.0, "top_p": 0.95, "seed": 3, "verifier": "coupled"}, 1.0),
        ({"temperature": 1.0}, 1.5),
    ],
    ids=str,
)
@pytest.mark.parametrize("known", [None, range(0, VOCAB, 4)], ids=["all", "some"])
@pytest.mark.parametrize("requests", [1, 8])
def test_a_round_of_fewer_drafts_than_a_block_has_copies_little(
    tiny, wide, params, most, known, requests
):
    """Near their end, requests have room for fewer drafts; lengths of prompts differ."""
    drafter = tiny.make_drafter(wide, known=known, std=2.0)
    options = dict(params)
    verifier = options.pop("verifier", "block")
    engine = Engine(wide, drafter, max_requests=8, max_length=60, verifier=verifier)
    prompts = tiny.make_prompts(requests, VOCAB, seed=2)
    for request in tiny.make_requests(prompts, max_new_tokens=5, **options):
        engine.add(request)
    engine.step()  # the prompts
    rounds = 0
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        while engine.has_work and rounds < ROUNDS:
            engine.step()
            rounds += 1
    logits = 4 * VOCAB * requests * (drafter.block_size + 1)  # of one round
    assert rounds > 0
    assert heads_by_batch(profiled, VOCAB if known is None else len(known)) == 0
    assert copied_bytes(profiled) < most * rounds * logits
