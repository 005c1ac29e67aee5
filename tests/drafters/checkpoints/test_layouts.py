"""The other layouts: speculators', the DFlash authors', and the ways between them all."""

import json
import logging
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from dspark.drafters.checkpoints.checkpoint import borrow_tables, load_drafter, save_attached
from dspark.drafters.checkpoints.from_target import TargetTables
from dspark.errors import CheckpointError, CompatibilityError
from tests.helpers.checkpoints import save_published, save_speculators

TOKENS = torch.tensor([0, 2, 3, 7, 11, 20, 30, 36])


def read_config(directory):
    return json.loads((directory / "config.json").read_text())


def change(directory, **changes):
    config = read_config(directory)
    for name, value in changes.items():
        config.pop(name, None)
        if value is not ...:
            config[name] = value
    (directory / "config.json").write_text(json.dumps(config))


def tensors(directory):
    return load_file(directory / "model.safetensors")


def same_tensors(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_there_and_back_is_bit_identical(golden, tmp_path):
    there, back = tmp_path / "there", tmp_path / "back"
    save_speculators(load_drafter(golden / "draft"), there, dtype=None)
    written = save_published(load_drafter(there), back, dtype=None)
    assert same_tensors(tensors(golden / "draft"), tensors(there))
    assert same_tensors(tensors(golden / "draft"), tensors(back))
    assert read_config(back) == read_config(golden / "draft")
    assert written.tensors == len(tensors(back))
    assert written.bytes == sum(path.stat().st_size for path in back.iterdir())


def test_attached_and_back_is_bit_identical(golden, tmp_path):
    target = shutil.copytree(golden / "target", tmp_path / "target")
    drafter = load_drafter(golden / "draft")
    borrow_tables(drafter, TargetTables.read(target))
    save_attached(drafter, target, dtype=None)
    assert not {"embed_tokens.weight", "lm_head.weight"} & set(tensors(target / "dspark"))
    again = load_drafter(target)
    borrow_tables(again, TargetTables.read(target))
    save_published(again, tmp_path / "back", dtype=None)
    assert same_tensors(tensors(golden / "draft"), tensors(tmp_path / "back"))
    back, first = read_config(tmp_path / "back"), read_config(golden / "draft")
    assert back.items() >= first.items()
    assert set(back) - set(first) == {"target_model_name_or_path", "target_architectures"}


def test_speculators_config_says_what_the_format_says(golden, tmp_path):
    drafter = load_drafter(golden / "draft")
    borrow_tables(drafter, TargetTables.read(golden / "target"))
    save_speculators(drafter, tmp_path, dtype=None)
    config = read_config(tmp_path)
    assert "model_type" not in config
    assert config["architectures"] == ["DSparkSpeculator"]
    assert config["speculators_model_type"] == "dspark"
    assert config["aux_hidden_state_layer_ids"] == [2, 4, 5]  # published: 1, 3, 4
    assert (config["block_size"], config["sample_from_anchor"]) == (4, True)
    assert config["draft_vocab_size"] == 211
    assert config["speculators_config"] == {
        "algorithm": "dspark",
        "default_proposal_method": "greedy",
        "proposal_methods": [
            {
                "accept_tolerance": 0.0,
                "proposal_type": "greedy",
                "speculative_tokens": 4,
                "verifier_accept_k": 1,
            }
        ],
        "verifier": {
            "architectures": ["Qwen3ForCausalLM"],
            "name_or_path": str(golden / "target"),
        },
    }
    layers = config["transformer_layer_config"]
    assert (layers["model_type"], layers["num_hidden_layers"]) == ("qwen3", 2)
    assert layers["layer_types"] == ["full_attention"] * 2
    assert layers["rope_parameters"]["rope_theta"] == 10000.0
    assert "block_size" not in layers
    assert "markov_rank" not in layers


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn", None])
@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("from_anchor", [False, True])
@pytest.mark.parametrize("window", [None, 7])
def test_speculators_carry_every_layout(
    make_drafter, tiny_config, tmp_path, kind, reduced, from_anchor, window
):
    heads = {"markov_head_type": kind} if kind else {"markov_rank": 0, "confidence_head": False}
    backbone = tiny_config.backbone
    if window:
        backbone = replace(backbone, sliding_layers=(1,), sliding_window=window)
    drafter = make_drafter(
        **heads,
        backbone=backbone,
        sample_from_anchor=from_anchor,
        draft_vocab_size=8 if reduced else None,
        draft_tokens=TOKENS if reduced else None,
    )
    if kind == "rnn" and not from_anchor:
        with pytest.raises(CompatibilityError, match="rnn with sample_from_anchor false"):
            save_speculators(drafter, tmp_path)
        return
    save_speculators(drafter, tmp_path, dtype=None)
    config = read_config(tmp_path)
    headless = kind is None and not from_anchor
    assert config["speculators_model_type"] == ("dflash" if headless else "dspark")
    loaded = load_drafter(tmp_path)
    wanted = drafter.config
    if not kind:
        wanted = replace(wanted, confidence_head_with_markov=False)
    assert replace(loaded.config, extra={}) == wanted
    assert same_tensors(loaded.state_dict(), drafter.state_dict())
    assert torch.equal(loaded.own_head_VH, drafter.borrowed.head_VH)
    assert torch.equal(loaded.own_embedding_VH, drafter.borrowed.embedding_VH)
    assert loaded.block_size == (5 if from_anchor else 4)


def test_a_published_dflash_becomes_a_headless_dspark(make_drafter, tmp_path):
    save_speculators(make_drafter(markov_rank=0, confidence_head=False), tmp_path)
    config = read_config(tmp_path)
    assert (config["speculators_model_type"], config["markov_rank"]) == ("dspark", 0)
    assert config["enable_confidence_head"] is False
    assert config["confidence_head_with_markov"] is False


@pytest.mark.parametrize(
    ("kind", "tokens", "from_anchor"),
    [
        ("dspark", 5, True),
        ("dspark", 4, False),
        ("dspark", 2, True),
        ("dflash", 5, True),
        ("dflash", 4, False),
        ("dflash", 2, False),
    ],
)
def test_a_file_that_does_not_name_its_slots_tells_by_its_tokens(
    make_drafter, tmp_path, caplog, kind, tokens, from_anchor
):
    headless = {"markov_rank": 0, "confidence_head": False} if kind == "dflash" else {}
    save_speculators(make_drafter(**headless), tmp_path)
    methods = read_config(tmp_path)["speculators_config"]
    methods["proposal_methods"][0]["speculative_tokens"] = tokens
    changes = {"sample_from_anchor": ..., "speculators_config": methods}
    change(tmp_path, speculators_model_type=kind, **changes)
    with caplog.at_level(logging.WARNING):
        assert load_drafter(tmp_path).config.sample_from_anchor is from_anchor
    assert "no sample_from_anchor" in caplog.text
    assert str(from_anchor).lower() in caplog.text


def test_what_a_speculators_file_leaves_out_has_the_librarys_default(make_drafter, tmp_path):
    drafter = make_drafter()
    save_speculators(drafter, tmp_path, dtype=None)
    layers = read_config(tmp_path)["transformer_layer_config"]
    for name in ("rms_norm_eps", "max_position_embeddings", "layer_types"):
        layers.pop(name)
    changes = {"num_target_layers": ..., "max_anchors": ..., "speculators_config": ...}
    change(tmp_path, transformer_layer_config=layers, **changes)
    config = load_drafter(tmp_path).config
    assert config.max_position_embeddings == 32768
    assert config.backbone.rms_norm_eps == 1e-6
    assert (config.num_target_layers, config.target_layer_ids) == (5, (-1, 1, 4))
    stored = tensors(tmp_path)
    del stored["embed_tokens.weight"], stored["lm_head.weight"]
    save_file(stored, tmp_path / "model.safetensors")
    loaded = load_drafter(tmp_path)
    assert (loaded.own_embedding_VH, loaded.own_head_VH) == (None, None)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"speculators_model_type": "xpress"}, CompatibilityError, "speculators xpress.*not supp"),
        ({"transformer_layer_config": ...}, CheckpointError, "transformer_layer_config None"),
        ({"aux_hidden_state_layer_ids": ...}, CheckpointError, "lacks aux_hidden_state_layer_ids"),
        ({"aux_hidden_state_layer_ids": []}, CheckpointError, "no aux_hidden_state_layer_ids"),
        ({"aux_hidden_state_layer_ids": [2, 2, 4]}, CompatibilityError, r"\[1, 1, 3\].*increasing"),
        ({"sample_from_anchor": "yes"}, CheckpointError, "sample_from_anchor 'yes'"),
        ({"projector_type": "domino"}, CompatibilityError, "projector_type 'domino'"),
        ({"shift_label": True}, CompatibilityError, "shift_label True"),
        ({"target_hidden_size": 32}, CompatibilityError, "target_hidden_size 32"),
        ({"markov_rank": ...}, CheckpointError, "lacks markov_rank"),
        ({"draft_vocab_size": 8}, CheckpointError, "d2t"),
    ],
)
def test_bad_speculators_configs_are_named(make_drafter, tmp_path, changes, error, words):
    save_speculators(make_drafter(), tmp_path)
    change(tmp_path, **changes)
    with pytest.raises(error, match=words) as caught:
        load_drafter(tmp_path)
    assert "\n" not in str(caught.value)


def test_layers_of_another_kind_are_named(make_drafter, tmp_path):
    save_speculators(make_drafter(), tmp_path)
    layers = read_config(tmp_path)["transformer_layer_config"] | {"model_type": "mistral"}
    change(tmp_path, transformer_layer_config=layers)
    with pytest.raises(CompatibilityError, match=r"transformer_layer_config .*'mistral'"):
        load_drafter(tmp_path)


@pytest.fixture
def dflash(make_drafter, tmp_path):
    """A checkpoint as the DFlash authors write it, and the drafter that it holds."""
    drafter = make_drafter(markov_rank=0, confidence_head=False, sample_from_anchor=False)
    save_attached(drafter, tmp_path, dtype=None)
    directory = tmp_path / "dspark"
    own = {"mask_token_id": 36, "target_layer_ids": [-1, 1, 4]}
    dropped = (
        "sample_from_anchor", "mask_token_id", "target_layer_ids", "markov_rank", "num_anchors",
        "enable_confidence_head", "rope_parameters",
    )  # fmt: skip
    changes = {"architectures": ["DFlashDraftModel"], "rope_theta": 1000000}
    change(directory, **dict.fromkeys(dropped, ...))
    change(directory, **changes, dflash_config=own, auto_map={"AutoModel": "dflash.Model"})
    return directory, drafter


def test_the_dflash_authors_dialect_is_read(dflash, make_parts, draft):
    directory, drafter = dflash
    loaded = load_drafter(directory)
    assert loaded.block_size == 4
    expected = replace(drafter.config, confidence_head_with_markov=False, extra={})
    assert replace(loaded.config, extra={}) == expected
    loaded.bind(make_parts())
    features = torch.randn(6, 48, generator=torch.Generator().manual_seed(1))
    one, two = draft(drafter, [features], [3])[0], draft(loaded, [features], [3])[0]
    assert torch.equal(torch.stack(one.logits), torch.stack(two.logits))


def test_a_block_size_inside_the_dialect_rules(dflash):
    directory, _ = dflash
    own = read_config(directory)["dflash_config"]
    change(directory, block_size=..., dflash_config=own | {"block_size": 9})
    assert load_drafter(directory).block_size == 8


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"dflash_config": ...}, CheckpointError, "dflash_config None"),
        ({"dflash_config": {"mask_token_id": 3}}, CheckpointError, "lacks target_layer_ids"),
        ({"dflash_config": {"projector_type": "dspark"}}, CompatibilityError, "projector_type"),
        ({"dflash_config": {"attention_mode": "mla"}}, CompatibilityError, "attention_mode 'mla'"),
        ({"layer_types": ["sliding_attention"] * 2}, CompatibilityError, "sliding_attention"),
    ],
)
def test_bad_dflash_configs_are_named(dflash, changes, error, words):
    directory, _ = dflash
    change(directory, **changes)
    with pytest.raises(error, match=words):
        load_drafter(directory)


def test_windows_have_no_place_in_the_published_layout(make_drafter, tiny_config, tmp_path):
    backbone = replace(tiny_config.backbone, sliding_layers=(0,), sliding_window=7)
    drafter = make_drafter(backbone=backbone)
    with pytest.raises(CompatibilityError, match="sliding_window 7"):
        save_published(drafter, tmp_path)
    both = make_drafter(backbone=backbone, sample_from_anchor=False)
    with pytest.raises(CompatibilityError, match="sample_from_anchor false and sliding_window 7"):
        save_published(both, tmp_path)
    save_attached(drafter, tmp_path)
    assert load_drafter(tmp_path).config.backbone == backbone
    assert not (tmp_path / "config.json").exists()


def test_layers_of_no_family_are_refused_everywhere(make_drafter, tiny_config, tmp_path):
    drafter = make_drafter(backbone=replace(tiny_config.backbone, value_norm=True))
    for save in (save_published, save_speculators, save_attached):
        with pytest.raises(CompatibilityError, match="neither Qwen3's nor Gemma4's"):
            save(drafter, tmp_path)


def test_a_learned_mask_has_no_place_in_speculators(make_drafter, tmp_path):
    with pytest.raises(CompatibilityError, match="mask_embedding"):
        save_speculators(make_drafter(mask_token_id=None), tmp_path)


def test_a_targets_tables_are_found_by_name(tmp_path):
    embedding, vision = torch.randn(37, 16), torch.randn(5, 4)
    stored = {"model.language_model.embed_tokens.weight": embedding}
    stored["model.vision_tower.embed_tokens.weight"] = vision
    save_file(stored, tmp_path / "model.safetensors")
    config = {"architectures": ["G"], "text_config": {"num_hidden_layers": 6}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tables = TargetTables.read(tmp_path)
    assert (tables.num_layers, tables.vocab_size, tables.hidden_size) == (6, 37, 16)
    assert torch.equal(tables.embedding_VH, embedding)
    assert tables.head_VH is tables.embedding_VH  # tied
    assert tables.as_dtype(torch.bfloat16).head_VH.dtype == torch.bfloat16
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(CheckpointError, match=r"lm_head.*tie_word_embeddings is false"):
        TargetTables.read(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="num_hidden_layers None"):
        TargetTables.read(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"wte.weight": embedding}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="no tensor that ends in embed_tokens"):
        TargetTables.read(tmp_path)
