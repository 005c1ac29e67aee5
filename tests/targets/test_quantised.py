"""Quantised targets run as they are; those whose tokens share a scale are refused."""

import pytest
import torch
from torch import nn

from dspark.attention.ragged_batch import RaggedBatch
from dspark.errors import CompatibilityError
from dspark.targets.loading import is_quantised
from dspark.targets.target import Target

IDS = [(7 + 13 * i) % 61 for i in range(20)]


class EightBits(nn.Module):
    """A linear layer with weights of 8 bits, and, unless `bits` is None, rounded inputs.

    `whole` gives all rows of the input one scale, else each has its own.
    """

    def __init__(self, inner, *, rounded=True, whole=False):
        super().__init__()
        scale_O1 = inner.weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale_O1", scale_O1)
        self.register_buffer("weight_OI", (inner.weight / scale_O1).round().to(torch.int8))
        self.rounded, self.whole = rounded, whole

    def forward(self, x):
        weight_OI = self.weight_OI.to(x.dtype) * self.scale_O1
        if self.rounded:
            scale = (x.abs().amax() if self.whole else x.abs().amax(-1, keepdim=True)) / 127
            x = (x / scale).round() * scale
        return nn.functional.linear(x, weight_OI)


def quantised(tiny_model, dtype=torch.float32, **options):
    model = tiny_model("qwen3").to(dtype)
    model.config.quantization_config = {"quant_method": "made up"}
    for module in list(model.model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, EightBits(child, **options))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rounded", [False, True], ids=["weights", "weights and inputs"])
@pytest.mark.parametrize("invariant", [False, True], ids=["default", "invariant"])
def test_a_quantised_model_runs_as_it_is(tiny_model, dtype, rounded, invariant):
    model = quantised(tiny_model, dtype, rounded=rounded)
    with torch.no_grad():
        expected = model(torch.tensor([IDS])).logits[0].float()
    target = Target.from_model(model, batch_invariant=invariant)
    assert isinstance(target._anatomy.layers[0].mlp.up_proj, EightBits)
    got = target.forward(RaggedBatch.fresh([IDS]), logit_rows="all").logits_NV.float()
    assert (got - expected).norm() / expected.norm() < (0.1 if rounded else 0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_scale_for_all_tokens_is_refused(tiny_model, dtype):
    with pytest.raises(CompatibilityError, match=r"Qwen3ForCausalLM .* share one scale"):
        Target.from_model(quantised(tiny_model, dtype, whole=True))


def test_which_configurations_are_quantised(tiny_model):
    assert not is_quantised(tiny_model("qwen3").config)
    assert is_quantised(quantised(tiny_model).config)
