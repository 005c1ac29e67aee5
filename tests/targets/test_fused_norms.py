"""Norms are fused only where no bit changes."""

from __future__ import annotations

import copy

import pytest
import torch

from dspark.targets.fast.install import fuse_norms


def logits(model):
    with torch.no_grad():
        return model(torch.arange(1, 12)[None]).logits


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe", "llama", "mistral", "gemma3", "gemma4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_no_bit_of_the_logits_changes(tiny_model, name, dtype):
    if (name, dtype) == ("qwen3_moe", torch.float64):
        pytest.skip("torch has no grouped product of doubles")
    model = tiny_model(name).to(dtype)
    fused = copy.deepcopy(model)
    replaced = fuse_norms(fused)
    assert torch.equal(logits(fused), logits(model))
    if name in ("qwen3", "llama", "mistral"):
        assert (replaced > 0) == (dtype == torch.float32)


def test_a_norm_that_computes_something_else_is_left_alone(tiny_model):
    model = tiny_model("llama")

    class OddRMSNorm(type(model.model.norm)):
        def forward(self, hidden_states):
            return super().forward(hidden_states) * 1.0001

    model.model.norm.__class__ = OddRMSNorm
    before = logits(model)
    fuse_norms(model)
    assert "forward" not in vars(model.model.norm)
    assert torch.equal(logits(model), before)
