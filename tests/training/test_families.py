"""Any target may have a drafter with Qwen3's layers; Gemma4's may have one with its own."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dspark.drafters.config import GEMMA4_PARTS
from dspark.drafters.dspark import DSparkDrafter
from dspark.drafters.eagle3 import Eagle3Drafter
from dspark.engine.engine import Engine
from dspark.request import Request, SamplingParams
from dspark.targets.target import Target
from dspark.training.drafters.new_drafter import drafter_config, eagle3_config
from dspark.training.recipe import Eagle3Recipe
from dspark.training.settings import DSparkSettings

EAGLE3 = Eagle3Recipe(
    kind="drafter",
    target="unused",
    algorithm="eagle3",
    drafter={"target_layer_ids": (-1, 1), "ttt_length": 3},
    samples={"paths": ["unused"]},
    run={"output_dir": "unused", "steps": 1},
)
SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "eos_token_id": None,
}
SHAPES = SIZES | {"intermediate_size": 32}
GEMMA4 = SHAPES | {
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 4,
    "global_head_dim": 16,
    "hidden_size_per_layer_input": 0,
    "final_logit_softcapping": 4.0,
}
SHARED = GEMMA4 | {"attention_k_eq_v": True, "num_global_key_value_heads": 1}
TARGETS = {
    "llama": ("llama", SHAPES, (2, 8, 32)),
    "gemma2": ("gemma2", SHAPES | {"sliding_window": 4}, (2, 8, 32)),
    "gemma4": ("gemma4_text", GEMMA4, (2, 16, 32)),
    "gemma4 k_eq_v": ("gemma4_text", SHARED, (1, 16, 32)),
    "gpt2": ("gpt2", SIZES | {"n_positions": 64}, (2, 8, 96)),
}


def make_target(name):
    model_type, fields, _ = TARGETS[name]
    torch.manual_seed(4)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.3)
    return Target.from_model(model)


def settings():
    taps = {"num_layers": 2, "target_layer_ids": (-1, 1), "mask_token_id": 3}
    return DSparkSettings(block_size=4, markov_rank=4, **taps)


def decode(target, drafter):
    requests = [Request((5, 6, 7), SamplingParams(20)), Request((9, 1), SamplingParams(20))]
    outputs = Engine(target, drafter, max_requests=2, max_length=40).run(requests)
    return [output.token_ids for output in outputs]


def make_drafter(target, config):
    generator = torch.Generator().manual_seed(1)
    drafter = DSparkDrafter.from_target(target.parts(), config, generator=generator, init_std=0.2)
    return drafter.eval()


@pytest.mark.parametrize("name", TARGETS)
def test_a_drafter_with_qwen3_layers(name):
    target = make_target(name)
    config = drafter_config(target, settings())
    backbone = config.backbone
    shape = (backbone.num_kv_heads, backbone.head_dim, backbone.intermediate_size)
    assert shape == TARGETS[name][2]
    assert decode(target, make_drafter(target, config)) == decode(target, None)


@pytest.mark.parametrize("name", ["gemma4", "gemma4 k_eq_v"])
def test_a_drafter_with_gemma4_layers(name):
    target = make_target(name)
    config = drafter_config(target, settings())
    parts = dict(GEMMA4_PARTS, value_from_key="k_eq_v" in name, rotary_fraction=0.25)
    drafter = make_drafter(target, replace(config, backbone=replace(config.backbone, **parts)))
    assert drafter.borrowed.embedding_scale == pytest.approx(24**0.5)
    assert drafter.borrowed.softcap == 4.0
    assert decode(target, drafter) == decode(target, None)


@pytest.mark.parametrize("name", ["gemma4", "gemma4 k_eq_v"])
@pytest.mark.parametrize("known", [None, tuple(range(0, 61, 3))])
def test_an_eagle3_drafter_with_gemma4_layers(name, known):
    target = make_target(name)
    config = eagle3_config(target, EAGLE3)
    parts = dict(GEMMA4_PARTS, value_from_key="k_eq_v" in name, rotary_fraction=0.25)
    config = replace(
        config,
        backbone=replace(config.backbone, **parts),
        draft_vocab_size=known and len(known),
    )
    drafter = Eagle3Drafter.from_target(
        target.parts(),
        config,
        generator=torch.Generator().manual_seed(1),
        init_std=0.2,
        draft_tokens=known and torch.tensor(known),
    )
    assert decode(target, drafter.eval()) == decode(target, None)


def test_a_drafter_with_windows():
    target = make_target("llama")
    config = drafter_config(target, settings())
    windows = {"sliding_layers": (0,), "sliding_window": 3, "causal_windows": True}
    drafter = make_drafter(target, replace(config, backbone=replace(config.backbone, **windows)))
    assert decode(target, drafter) == decode(target, None)
