"""What cannot run as a ragged target is refused by name, whatever way it differs."""

import dataclasses

import pytest
import torch

from dspark.attention.paged_cache import CacheShape
from dspark.errors import CompatibilityError, NumericsError
from dspark.targets import families
from dspark.targets.families import Family
from dspark.targets.target import Target
from tests.helpers.state_models import FALCON, HYBRID, new_model


def test_layers_that_share_keys_share_a_cache_layer(tiny_model):
    target = Target.from_model(tiny_model("gemma4 shared"))
    layout = target._layout
    assert layout.cache_layers == (0, 1, 0, 1)
    assert layout.writers == (True, True, False, False)
    assert layout.shapes == (CacheShape(2, 8, 8), CacheShape(2, 16, 16))


def test_shapes_may_differ_between_layers(tiny_model):
    shapes = Target.from_model(tiny_model("gemma4 k_eq_v")).new_cache(1).shapes
    assert shapes == (CacheShape(2, 8, 8), CacheShape(1, 16, 16)) * 2


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("recurrent_gemma", HYBRID | {
            "lru_width": 16, "attention_window_size": 8, "block_types": ["recurrent", "attention"],
        }),
        ("rwkv", {"attention_hidden_size": 16, "intermediate_size": 16}),
        ("bloom", {"n_head": 2}),
        ("stablelm", HYBRID),
    ],
)  # fmt: skip
def test_other_architectures_are_refused_by_name(model_type, options):
    model = new_model(model_type, **options)
    name = type(model).__name__
    with pytest.raises(CompatibilityError, match=f"^{name} is not supported") as caught:
        Target.from_model(model)
    assert "\n" not in str(caught.value)


def test_recurrent_state_beside_attention_shows_in_the_logits(monkeypatch):
    declared = Family(norm="final_layernorm")
    monkeypatch.setitem(families.FAMILIES, "falcon_h1", declared)
    monkeypatch.setattr(families, "_ATTENTION_TYPES", frozenset({"hybrid"}))
    model = new_model("falcon_h1", **FALCON)
    with pytest.raises(CompatibilityError, match=r"FalconH1ForCausalLM .* fed in pieces"):
        Target.from_model(model)


def test_undeclared_embedding_scale_is_refused(tiny_model, monkeypatch):
    plain = dataclasses.replace(families.FAMILIES["gemma3_text"], scaled_embedding=False)
    monkeypatch.setitem(families.FAMILIES, "gemma3_text", plain)
    with pytest.raises(CompatibilityError, match="embeddings are scaled"):
        Target.from_model(tiny_model("gemma3"))


def test_undeclared_logit_scale_is_refused():
    model = new_model("cohere", intermediate_size=16, num_attention_heads=2, logit_scale=0.25)
    with pytest.raises(CompatibilityError, match=r"CohereForCausalLM .* soft-capped as declared"):
        Target.from_model(model)


def test_window_that_the_attention_does_not_pass_is_refused(tiny_model):
    model = tiny_model("qwen3 windows")
    model.model.layers[2].self_attn.sliding_window = None
    with pytest.raises(CompatibilityError, match="layer 2 is declared 'sliding_attention'"):
        Target.from_model(model)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotation_that_depends_on_the_batch_is_refused(tiny_model, kind):
    model = tiny_model("llama")
    model.config.rope_parameters["rope_type"] = kind
    with pytest.raises(CompatibilityError, match=f"LlamaForCausalLM .* {kind} depends"):
        Target.from_model(model)


def test_attention_that_drops_an_option_is_refused(tiny_model, monkeypatch):
    model = tiny_model("gpt_oss")
    forward = type(model.model.layers[0].self_attn).forward

    def with_option(self, *args, **kwargs):
        return forward(self, *args, position_bias=torch.ones(1), **kwargs)

    monkeypatch.setattr(type(model.model.layers[0].self_attn), "forward", with_option)
    with pytest.raises(CompatibilityError, match="its attention uses position_bias"):
        Target.from_model(model)


def test_weights_that_are_not_finite_are_refused(tiny_model):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(NumericsError, match="LlamaForCausalLM computes logits that are not finite"):
        Target.from_model(model)


def test_a_taken_over_model_says_whose_it_is(tiny_model):
    model = tiny_model("llama")
    Target.from_model(model)
    with pytest.raises(CompatibilityError, match=r"call Target\.forward"):
        model(torch.tensor([[1, 2]]))
