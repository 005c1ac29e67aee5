"""Eagle3's checkpoints: published, Gemma4's, the EAGLE authors' own, and speculators'."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from dspark.drafters.checkpoints.checkpoint import load_drafter, save_attached
from dspark.drafters.checkpoints.published import eagle3_from_json, eagle3_to_json
from dspark.drafters.checkpoints.registry import read_config
from dspark.errors import CheckpointError, CompatibilityError
from tests.helpers.checkpoints import save_published, save_speculators

KNOWN = torch.tensor([0, 2, 3, 7, 11, 20, 30, 36])
FULL = "full_attention"


@pytest.fixture
def golden_eagle3(golden):
    return golden.parent / "eagle3" / "draft"


def test_state_dict_is_the_published_one(golden_eagle3):
    published = json.loads((golden_eagle3.parent / "keys.json").read_text())
    trained = {name: tuple(k["shape"]) for name, k in published.items() if k["trainable"]}
    drafter = load_drafter(golden_eagle3)
    assert {name: tuple(x.shape) for name, x in drafter.state_dict().items()} == trained
    assert not drafter.training


def test_published_config_survives_a_round_trip(golden_eagle3):
    data = json.loads((golden_eagle3 / "config.json").read_text())
    assert eagle3_to_json(eagle3_from_json(data, "config.json"), "float32") == data


def test_checkpoints_survive_round_trips(golden_eagle3, golden_parts, tmp_path):
    drafter = load_drafter(golden_eagle3)
    drafter.bind(golden_parts)
    save_published(drafter, tmp_path / "published", dtype=None)
    files = [d / "model.safetensors" for d in (golden_eagle3, tmp_path / "published")]
    before, after = map(load_file, files)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    save_attached(drafter, tmp_path, dtype=None)
    attached = load_drafter(tmp_path)
    assert (attached.own_embedding_VH, attached.own_head_VH) == (None, None)
    assert attached.config == drafter.config
    assert all(torch.equal(after[name], x) for name, x in attached.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"architectures": ["Qwen3ForCausalLM"]}, CompatibilityError, "Qwen3Eagle3Model"),
        ({"draft_vocab_size": 212}, CompatibilityError, "draft_vocab_size is 212"),
        ({"architectures": ["Gemma4Eagle3Model"]}, CheckpointError, "rope_parameters None"),
        ({"target_layer_ids": "all"}, CheckpointError, "target_layer_ids 'all'"),
        ({"layer_types": ["sliding_attention"], "sliding_window": 8}, CompatibilityError, "window"),
        ({"ttt_length": None}, CheckpointError, "lacks ttt_length"),
        ({"step_loss_decay": "x"}, CheckpointError, "step_loss_decay 'x'"),
    ],
)
def test_configs_that_cannot_be_used_are_refused(golden_eagle3, changes, error, words):
    data = json.loads((golden_eagle3 / "config.json").read_text()) | changes
    with pytest.raises(error, match=words):
        read_config(data, "config.json")


def test_the_older_architecture_name_is_read(golden_eagle3):
    data = json.loads((golden_eagle3 / "config.json").read_text())
    renamed = data | {"architectures": ["Eagle3DraftModel"], "draft_vocab_size": 211}
    assert read_config(renamed, "config.json") == read_config(data, "config.json")


def test_speculators_and_back_is_bit_identical(golden_eagle3, tmp_path):
    save_speculators(load_drafter(golden_eagle3), tmp_path / "there", dtype=None)
    save_published(load_drafter(tmp_path / "there"), tmp_path / "back", dtype=None)
    folders = (golden_eagle3, tmp_path / "there", tmp_path / "back")
    before, there, back = (load_file(d / "model.safetensors") for d in folders)
    assert before.keys() == there.keys() == back.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, there[name])
        assert torch.equal(tensor, back[name])
    published, config, again = (json.loads((d / "config.json").read_text()) for d in folders)
    assert again == published
    assert config["eagle_aux_hidden_state_layer_ids"] == [
        i + 1 for i in published["target_layer_ids"]
    ]
    [method] = config["speculators_config"]["proposal_methods"]
    assert method["speculative_tokens"] == published["ttt_length"]
    assert config["transformer_layer_config"]["hidden_size"] == published["hidden_size"]
    assert "ttt_length" not in config["transformer_layer_config"]


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"norm_before_residual": "yes"}, CheckpointError, "norm_before_residual 'yes'"),
        ({"norm_before_fc": True}, CompatibilityError, "norm_before_fc True"),
        ({"fc_norm": True}, CompatibilityError, "fc_norm True"),
        ({"draft_vocab_size": 212}, CompatibilityError, "draft_vocab_size is 212"),
        ({"target_hidden_size": 99}, CompatibilityError, "target_hidden_size 99"),
        ({"eagle_aux_hidden_state_layer_ids": None}, CheckpointError, "eagle_aux_hidden_state"),
        ({"speculators_config": {}}, CheckpointError, "speculative_tokens"),
        ({"transformer_layer_config": {"model_type": "gemma"}}, CompatibilityError, "'gemma'"),
        ({"transformer_layer_config": None}, CheckpointError, "transformer_layer_config None"),
    ],
)
def test_speculators_files_that_cannot_be_used_are_refused(
    golden_eagle3, tmp_path, changes, error, words
):
    save_speculators(load_drafter(golden_eagle3), tmp_path, dtype=None)
    data = json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(error, match=words):
        read_config(data | changes, "config.json")


def test_what_speculators_leave_out_is_the_least(golden_eagle3, tmp_path):
    save_speculators(load_drafter(golden_eagle3), tmp_path, dtype=None)
    data = json.loads((tmp_path / "config.json").read_text())
    for name in ("num_target_layers", "step_loss_decay", "norm_output"):
        del data[name]
    config = read_config(data, "config.json").config
    assert config.num_target_layers == max(config.target_layer_ids) + 1


# Gemma4's


def drafts_of(drafter, draft):
    generator = torch.Generator().manual_seed(9)
    features = [torch.randn(7, 48, generator=generator)]
    draw, _ = draft(drafter, features, [5], tokens=[[1, 2, 3, 4, 5, 6, 7]])
    return torch.stack(draw.logits)


def assert_same_drafts(loaded, drafter, draft):
    """Up to rounding: files are mapped into memory, and MKL sums in another order where a table
    does not begin at a multiple of 16 bytes. An error goes by the largest logit, not its own.
    """
    got, expected = drafts_of(loaded, draft), drafts_of(drafter, draft)
    atol = 4e-6 * float(expected.abs().max())
    torch.testing.assert_close(got, expected, atol=atol, rtol=1.3e-6)


@pytest.mark.parametrize("kind", ["gemma4", "gemma4 k_eq_v"])
def test_gemma4_files_are_read_and_written_back(
    make_eagle3_layer, make_parts, draft, tmp_path, kind
):
    drafter = make_eagle3_layer(kind)
    save_published(drafter, tmp_path, dtype=None)
    path = tmp_path / "config.json"
    data = json.loads(path.read_text())
    assert data["architectures"] == ["Gemma4Eagle3Model"]
    assert data["model_type"] == "gemma4_text"
    shared, names = "k_eq_v" in kind, load_file(tmp_path / "model.safetensors").keys()
    assert ("layers.0.self_attn.v_proj.weight" in names) is not shared
    assert "layers.0.layer_scalar" in names
    data |= {  # as the published stack has them from its target, and of no meaning here
        "model_type": "gemma4_unified_text",
        "head_dim": 4,
        "num_key_value_heads": 2,
        "sliding_window": 512,
        "rope_parameters": data["rope_parameters"] | {"sliding_attention": {"rope_theta": 1e4}},
    }
    path.write_text(json.dumps(data))
    loaded = load_drafter(tmp_path)
    loaded.bind(make_parts(embedding_scale=4.0, logit_softcap=1.5))
    assert loaded.config.backbone == drafter.config.backbone
    assert_same_drafts(loaded, drafter, draft)
    save_published(loaded, tmp_path / "again", dtype=None)
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == data
    with pytest.raises(CompatibilityError, match="Gemma4's layers"):
        save_speculators(loaded, tmp_path / "there")


# The EAGLE authors' own


@pytest.fixture(params=["whole", "reduced"])
def legacy(request, make_eagle3_layer, tmp_path):
    """A checkpoint in their manner, and the drafter that it holds."""
    changes = {}
    if request.param == "reduced":
        changes = {"draft_vocab_size": 8, "draft_tokens": KNOWN}
    drafter = make_eagle3_layer("llama", ttt_length=7, num_target_layers=5, **changes)
    backbone = drafter.config.backbone
    config = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "attention_bias": True,
        "bos_token_id": 1,
        "draft_vocab_size": changes.get("draft_vocab_size", 37),
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 2, 5]},
        "head_dim": backbone.head_dim,
        "hidden_act": "silu",
        "hidden_size": 16,
        "intermediate_size": 24,
        "max_position_embeddings": 2048,
        "model_type": "llama",
        "num_attention_heads": 4,
        "num_hidden_layers": 1,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "vocab_size": 37,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    state = drafter.state_dict() | {"lm_head.weight": drafter.borrowed.head_VH}
    names = {name: name.replace("layers.0.", "midlayer.") for name in state}
    save_file(
        {names[n]: x.clone().contiguous() for n, x in state.items()}, tmp_path / "model.safetensors"
    )
    return tmp_path, drafter


def change(directory, **changes):
    data = json.loads((directory / "config.json").read_text()) | changes
    data = {name: value for name, value in data.items() if value is not ...}
    (directory / "config.json").write_text(json.dumps(data))


def test_legacy_files_are_read(legacy, make_parts, draft):
    directory, drafter = legacy
    loaded = load_drafter(directory)
    assert replace(loaded.config, extra={}, max_position_embeddings=40960) == drafter.config
    loaded.bind(make_parts())
    assert_same_drafts(loaded, drafter, draft)
    change(directory, eagle_config=..., eagle_aux_hidden_state_layer_ids=[0, 2, 5])
    assert load_drafter(directory).taps == (-1, 1, 4)
    change(directory, eagle_aux_hidden_state_layer_ids=..., target_layer_ids=[-1, 1, 4])
    change(directory, num_target_layers=9, ttt_length=3)
    change(directory, eagle_config={"norm_before_residual": True})
    assert load_drafter(directory).config.backbone.norm_before_residual
    config = load_drafter(directory).config
    assert (config.target_layer_ids, config.num_target_layers) == ((-1, 1, 4), 9)
    assert config.ttt_length == 3


def test_legacy_shapes_follow_from_others(make_eagle3_layer, legacy):
    directory, _ = legacy
    data = json.loads((directory / "config.json").read_text())
    del data["head_dim"], data["num_key_value_heads"]
    config = read_config(data, "config.json").config
    assert (config.backbone.head_dim, config.backbone.num_kv_heads) == (4, 4)


def test_legacy_drafters_travel_attached_and_as_speculators(legacy, make_parts, draft, tmp_path):
    directory, drafter = legacy
    loaded = load_drafter(directory)
    loaded.bind(make_parts())
    with pytest.raises(CompatibilityError, match="Llama's layer, for which the published layout"):
        save_published(loaded, tmp_path / "published")
    (tmp_path / "target").mkdir()
    save_attached(loaded, tmp_path / "target", dtype=None)
    save_speculators(loaded, tmp_path / "there", dtype=None)
    nested = json.loads((tmp_path / "there" / "config.json").read_text())
    assert nested["transformer_layer_config"]["model_type"] == "llama"
    for place in ("target", "there"):
        again = load_drafter(tmp_path / place)
        again.bind(make_parts())
        assert replace(again.config, extra={}) == replace(loaded.config, extra={})
        assert_same_drafts(again, drafter, draft)


@pytest.mark.parametrize("kind", ["qwen3 normed", "llama normed"])
def test_a_residual_after_the_norm_travels_too(
    make_eagle3_layer, make_parts, draft, tmp_path, kind
):
    drafter = make_eagle3_layer(kind)
    with pytest.raises(CompatibilityError, match="norm_before_residual true"):
        save_published(drafter, tmp_path / "published")
    save_speculators(drafter, tmp_path / "there", dtype=None)
    assert json.loads((tmp_path / "there" / "config.json").read_text())["norm_before_residual"]
    save_attached(drafter, tmp_path, dtype=None)
    for place in (tmp_path, tmp_path / "there"):
        loaded = load_drafter(place)
        loaded.bind(make_parts())
        assert loaded.config.backbone == drafter.config.backbone
        assert_same_drafts(loaded, drafter, draft)


def test_a_reduced_vocabulary_has_no_place_in_the_published_layout(make_eagle3_layer, tmp_path):
    drafter = make_eagle3_layer("qwen3", draft_vocab_size=8, draft_tokens=KNOWN)
    with pytest.raises(CompatibilityError, match="has draft_vocab_size 8, for which"):
        save_published(drafter, tmp_path)
    save_speculators(drafter, tmp_path, dtype=None)
    loaded = load_drafter(tmp_path)
    assert loaded.config == replace(drafter.config, extra=loaded.config.extra)
    assert torch.equal(loaded.d2t, drafter.d2t)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        (
            {"eagle_config": {"eagle_aux_hidden_state_layer_ids": []}},
            CompatibilityError,
            r"target_layer_ids is \[\]",
        ),
        ({"eagle_config": {}}, CheckpointError, "not say which layers.*add target_layer_ids"),
        ({"eagle_config": {"norm_output": True}}, CompatibilityError, "norm_output True"),
        ({"sliding_window": 512}, CompatibilityError, "sliding_window 512"),
        ({"model_type": "deepseek"}, CompatibilityError, "'deepseek'"),
        ({"rope_theta": ...}, CheckpointError, "rope_theta None"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, CompatibilityError, "llama3"),
        ({"num_hidden_layers": 2}, CheckpointError, "lacks the tensors layers.1"),
    ],
)
def test_legacy_files_that_cannot_be_used_are_refused(legacy, changes, error, words):
    directory, _ = legacy
    change(directory, **changes)
    with pytest.raises(error, match=words):
        load_drafter(directory)


@pytest.mark.parametrize("part", [{"query_key_norms": False}, {"norm_before_residual": True}])
def test_a_dspark_drafter_cannot_have_eagle3s_layers(make_drafter, tiny_config, part):
    backbone = replace(tiny_config.backbone, **part)
    with pytest.raises(CompatibilityError, match="which are for Eagle3"):
        make_drafter(backbone=backbone)
