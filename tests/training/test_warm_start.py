"""Draft layers that start as the target's last ones."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dspark.drafters.dspark import DSparkDrafter
from dspark.drafters.layers import RMSNorm
from dspark.errors import CompatibilityError
from dspark.targets.target import Target
from dspark.training.drafters.new_drafter import drafter_config
from dspark.training.drafters.warm_start import start_from_last_layers
from dspark.training.settings import DSparkSettings

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def make_target(model_type="llama"):
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SIZES)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return Target.from_model(model)


def make_drafter(target, **changes):
    settings = {"num_layers": 2, "target_layer_ids": (0, 2), "mask_token_id": 3, "markov_rank": 4}
    config = drafter_config(target, DSparkSettings(**(settings | changes)))
    generator = torch.Generator().manual_seed(1)
    return DSparkDrafter.from_target(target.parts(), config, generator=generator)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text"])
def test_draft_layers_are_the_targets_last_ones(model_type):
    target = make_target(model_type)
    drafter = make_drafter(target)
    start_from_last_layers(drafter, target)
    for layer, source in zip(drafter.layers, list(target.layers)[-2:], strict=True):
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"):
            wanted = source.get_parameter(f"{name}.weight")
            assert torch.equal(layer.get_parameter(f"{name}.weight"), wanted)
        x_NH = torch.randn(5, 32)
        before_mlp = "post_attention_layernorm"
        if model_type == "gemma3_text":
            before_mlp = "pre_feedforward_layernorm"
        for mine, theirs in (("input_layernorm",) * 2, ("post_attention_layernorm", before_mlp)):
            weight = layer.get_parameter(f"{mine}.weight")
            normed = torch.nn.functional.rms_norm(x_NH, (32,), weight, 1e-6)
            torch.testing.assert_close(
                normed, source.get_submodule(theirs)(x_NH), atol=1e-4, rtol=0
            )
    context_TH = torch.randn(3, 64)
    projected = torch.nn.functional.linear(context_TH, drafter.fc.weight)
    assert torch.equal(projected, context_TH[:, 32:])


def test_missing_head_norms_keep_the_size_of_queries():
    target = make_target("llama")
    drafter = make_drafter(target)
    start_from_last_layers(drafter, target)
    x_NH = torch.randn(4000, 32)
    for layer in drafter.layers:
        normed = torch.nn.functional.rms_norm(x_NH, (32,), layer.input_layernorm.weight, 1e-6)
        for projection, norm in (("q_proj", "q_norm"), ("k_proj", "k_norm")):
            rows = layer.self_attn.get_submodule(projection)(normed).detach()
            head_norm: RMSNorm = layer.self_attn.get_submodule(norm)
            size = float(rows.square().mean().sqrt())
            assert float(head_norm.weight.detach()[0]) == pytest.approx(size, rel=0.1)


def test_layers_that_cannot_be_copied_are_refused():
    target = make_target("llama")
    with pytest.raises(CompatibilityError, match="has 5 layers, but the target only 4"):
        start_from_last_layers(make_drafter(target, num_layers=5), target)
    with pytest.raises(CompatibilityError, match=r"no mlp.gate_proj.weight of the drafter's shape"):
        start_from_last_layers(make_drafter(target, intermediate_size=24), target)
