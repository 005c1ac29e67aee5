"""Decoder layers through torch.compile: the same numbers, features included, or none of it."""

import logging

import pytest
import torch

from dspark.attention.paged_cache import BlockTable
from dspark.attention.ragged_batch import RaggedBatch
from dspark.errors import UsageError
from dspark.targets.target import Target

TAPS = (-1, 1, 3)
STEPS = (  # a prompt beside a decoding step, then two decoding steps
    lambda a, b: [(a, 0, [5, 9, 2, 7, 30]), (b, 0, [4])],
    lambda a, b: [(a, 5, [8]), (b, 1, [6, 3, 1])],
)


def outputs(target):
    cache = target.new_cache(2)
    a, b = BlockTable((1,)), BlockTable((0,))
    found = []
    for step in STEPS:
        batch = RaggedBatch.build(step(a, b), target.device)
        rows = torch.arange(batch.offsets[-1])
        out = target.forward(batch, cache, taps=TAPS, logit_rows=rows)
        found += [out.hidden_TH, out.logits_NV, out.features_TF]
    return found


@pytest.mark.slow
# torch's own, of its compiler.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["qwen3", "gemma4"])
def test_compiled_layers_give_the_same_numbers(tiny_model, name):
    model = tiny_model(name)
    eager = outputs(Target.from_model(model))
    target = Target.from_model(model, compile=True)
    assert target.compiled
    for got, expected in zip(outputs(target), eager, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_a_compiler_that_fails_is_said_and_left(tiny_model, monkeypatch, caplog):
    def fails(function, **_):
        def compiled(*_args, **_kwargs):
            raise RuntimeError("no compiler here\nand more")

        return compiled

    model = tiny_model("qwen3")
    eager = outputs(Target.from_model(model))
    monkeypatch.setattr(torch, "compile", fails)
    with caplog.at_level(logging.WARNING, logger="dspark"):
        target = Target.from_model(model, compile=True)
    assert not target.compiled
    assert caplog.messages == ["Qwen3ForCausalLM runs without torch.compile: no compiler here."]
    for got, expected in zip(outputs(target), eager, strict=True):
        assert torch.equal(got, expected)


def test_a_compiler_that_computes_something_else_is_found_out(tiny_model, monkeypatch, caplog):
    monkeypatch.setattr(
        torch, "compile", lambda function, **_: lambda *args, **kw: 1.1 * function(*args, **kw)
    )
    with caplog.at_level(logging.WARNING, logger="dspark"):
        target = Target.from_model(tiny_model("qwen3"), compile=True)
    assert not target.compiled
    assert "differs from the same step run eagerly" in caplog.text


def test_batch_invariant_mode_is_refused(tiny_model):
    with pytest.raises(UsageError, match="exclude each other"):
        Target.from_model(tiny_model("qwen3"), compile=True, batch_invariant=True)
