"""Packed weights on the bundled pair: speculative decoding is the plain decoding of that model."""

from __future__ import annotations

import pytest
import torch

import dspark
from dspark.engine.model import Model
from dspark.request import Request, SamplingParams
from dspark.targets.fast import products
from dspark.targets.fast.packing import Packer

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


def test_weights_are_packed_where_an_engine_is_made_and_in_no_round(monkeypatch):
    packs, pack = [], Packer.pack
    monkeypatch.setattr(
        Packer, "pack", lambda *args, **options: packs.append(args) or pack(*args, **options)
    )
    model = dspark.load("bundled", device="cpu", dtype="float32")
    loaded = len(packs)
    engine = model.open_engine(max_requests=2, max_length=96, schedule="fixed")
    assert len(packs) > loaded
    ready = len(packs)
    model.open_engine(max_requests=2, max_length=96, schedule="auto")  # the second packs nothing
    requests = [Request(model.encode(prompt), SamplingParams(12)) for prompt in PROMPTS[:2]]
    assert sum(output.stats.drafted for output in engine.run(requests)) > 0
    assert len(packs) == ready


def test_another_drafter_is_packed_where_it_is_swapped_in(monkeypatch):
    model = dspark.load("bundled", device="cpu", dtype="float32")
    engine = model.open_engine(max_requests=1, max_length=96, schedule="fixed")
    other = dspark.load("bundled", device="cpu", dtype="float32").drafter
    packs, pack = [], Packer.pack
    monkeypatch.setattr(
        Packer, "pack", lambda *args, **options: packs.append(args) or pack(*args, **options)
    )
    other.bind(model.target.parts())
    engine.replace_drafter(other)
    ready = len(packs)
    assert ready > 0
    engine.run([Request(model.encode(PROMPTS[0]), SamplingParams(8))])
    assert len(packs) == ready
