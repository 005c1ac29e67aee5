"""Configurations of drafters in the wild: read, or refused by name and reason."""

import pytest

from dspark.drafters.checkpoints.registry import read_config
from dspark.errors import CheckpointError, CompatibilityError

LAYERS = {
    "model_type": "qwen3", "hidden_size": 2048, "num_hidden_layers": 5, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 64, "intermediate_size": 6144, "hidden_act": "silu",
    "rms_norm_eps": 1e-5, "vocab_size": 128000, "rope_theta": 1e7,
    "max_position_embeddings": 128000, "layer_types": ["full_attention"] * 5, "block_size": 9,
    "markov_rank": 256, "markov_head_type": "vanilla", "enable_confidence_head": True,
}  # fmt: skip
NESTED = {"mask_token_id": 125017, "target_layer_ids": [2, 9, 17, 21, 27], "num_target_layers": 30}


def liquid(nested=(), **changes):
    """A file as Liquid writes them, but with rotary pairs as ours."""
    own = {"architectures": ["Lfm2DSparkDraftModel"], "dflash_config": NESTED | dict(nested)}
    return LAYERS | own | changes


def read(data):
    return read_config(data, "config.json").config


def test_nested_fields_are_lifted():
    config = read(liquid())
    assert (config.mask_token_id, config.num_target_layers) == (125017, 30)
    assert config.target_layer_ids == (2, 9, 17, 21, 27)
    assert (config.markov_rank, config.block_size, config.sample_from_anchor) == (256, 9, True)
    assert "dflash_config" not in config.extra


def test_nested_fields_go_before_those_at_the_top():
    config = read(liquid({"sample_from_anchor": False}, block_size=9, sample_from_anchor=True))
    assert not config.sample_from_anchor
    assert config.num_drafts == 8


def test_without_the_targets_layers_the_fewest_are_taken():
    nested = {key: value for key, value in NESTED.items() if key != "num_target_layers"}
    assert read(liquid() | {"dflash_config": nested}).num_target_layers == 28


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_is_neox_style": False}, "rope_is_neox_style False"),
        ({"nested": {"attention_sink_bias": True}}, "attention sinks"),
        ({"attention_sink_bias": True}, "attention sinks"),
        ({"nested": {"causal": True}}, "causal True"),
        ({"dflash_query_causal": True}, "dflash_query_causal True"),
        ({"nested": {"use_swa": True, "swa_window_size": 1024}}, "use_swa True"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e7, "factor": 32.0}}, "yarn"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "llama3"),
        ({"nested": {"selector_rank": 256}}, "a path selector"),
        ({"nested": {"conv_kernel_size": 2}}, "convolutions"),
    ],
)
def test_parts_that_are_not_built_are_refused_by_name(changes, words):
    with pytest.raises(CompatibilityError, match=words) as raised:
        read(liquid(**changes))
    assert str(raised.value).startswith("config.json has ")


def test_a_published_file_with_sinks_is_refused():
    data = LAYERS | NESTED | {"architectures": ["Qwen3DSparkModel"], "attention_sink_bias": True}
    with pytest.raises(CompatibilityError, match="attention sinks"):
        read(data)
    assert read(data | {"attention_sink_bias": False}).num_target_layers == 30


@pytest.mark.parametrize(
    ("architecture", "words"),
    [
        ("DFlash2DraftModel", "path selector and convolutions"),
        ("K3DSparkModel", "MLA"),
        ("BailingHybridDSparkModel", "BailingHybridDSparkModel"),
    ],
)
def test_architectures_that_are_not_built_are_refused_by_name(architecture, words):
    with pytest.raises(CompatibilityError, match=words) as raised:
        read(LAYERS | {"architectures": [architecture]})
    assert "Qwen3DSparkModel" in str(raised.value)


@pytest.mark.parametrize("kind", ["dflash2", "xpress"])
def test_other_kinds_of_speculators_are_refused_with_a_reason(kind):
    data = {"speculators_model_type": kind, "transformer_layer_config": LAYERS}
    with pytest.raises(CompatibilityError, match=f"speculators {kind}, which is not supported: it"):
        read(data)


def test_a_nest_that_is_no_object_is_an_error():
    with pytest.raises(CheckpointError, match="dflash_config"):
        read(liquid() | {"dflash_config": 7})
