"""Packed weights on the bundled pair: speculative decoding is the plain decoding of that model."""

from __future__ import annotations

import pytest
import torch

import dspark
from dspark.engine.model import Model
from dspark.targets.fast import products

PROMPTS = [
    "Once upon a time there was a small",
    "The capital of a country is",
    "Q: What is 12 + 7? A:",
    "def add(a, b):",
]
NEW_TOKENS = 24

pytestmark = pytest.mark.skipif(
    not (products.fp16_works() and products.int8_works()), reason="no packed products here"
)


def token_ids(model, batch_size):
    outputs = model.generate(PROMPTS, max_new_tokens=NEW_TOKENS, batch_size=batch_size)
    return [output.token_ids for output in outputs]


@pytest.fixture(scope="module", params=[None, "int8"], ids=["fp16", "int8"])
def packed(request):
    return dspark.load("bundled", device="cpu", dtype="float32", quantize=request.param)


def test_greedy_tokens_are_plain_decodings(packed):
    assert packed.target.weights == (
        "int8 flat" if "int8" in packed.target.weights else "fp16 flat"
    )
    plain = token_ids(Model(packed.target), 1)
    for batch_size in (1, 4):
        assert token_ids(packed, batch_size) == plain


def test_drafts_are_kept_as_with_plain_weights(packed):
    options = {"max_new_tokens": NEW_TOKENS, "batch_size": 4, "schedule": "fixed"}
    unpacked = dspark.load("bundled", device="cpu", dtype="float32", weights="plain")
    accepted = [
        sum(output.stats.accepted for output in model.generate(PROMPTS, **options))
        for model in (packed, unpacked)
    ]
    if packed.target.weights == "fp16 flat":
        assert abs(accepted[0] - accepted[1]) <= 2  # a draft law may differ in its last bits
    assert accepted[0] > 0.7 * accepted[1]


def test_a_head_that_learns_has_gradients(packed):
    borrowed = packed.drafter.borrowed
    hidden = torch.randn(2, packed.target.hidden_size, requires_grad=True)
    borrowed.logits(hidden).sum().backward()
    assert hidden.grad is not None
    with torch.no_grad():
        distance = (borrowed.logits(hidden) - borrowed.head(hidden)).abs().max()
    assert float(distance) == 0
