import json
import pickle
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from dspark.drafters.checkpoints import files
from dspark.drafters.checkpoints.checkpoint import has_attached_drafter, load_drafter, save_attached
from dspark.errors import CheckpointError, CompatibilityError
from tests.helpers.checkpoints import save_published, save_speculators


@pytest.fixture
def copy(golden, tmp_path):
    """A writable copy of the golden checkpoint."""
    return shutil.copytree(golden / "draft", tmp_path / "draft")


def change_config(directory, **changes):
    path = directory / "config.json"
    data = json.loads(path.read_text())
    for name, value in changes.items():
        data.pop(name, None)
        if value is not ...:
            data[name] = value
    path.write_text(json.dumps(data))


def change_weights(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def test_published_round_trip_is_bit_identical(golden, golden_drafter, tmp_path):
    save_published(golden_drafter, tmp_path / "again", dtype=None)
    first = load_file(golden / "draft" / "model.safetensors")
    second = load_file(tmp_path / "again" / "model.safetensors")
    assert set(first) == set(second)
    assert all(torch.equal(first[name], second[name]) for name in first)
    config = json.loads((golden / "draft" / "config.json").read_text())
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == config
    assert {p.name for p in (tmp_path / "again").iterdir()} == {"config.json", "model.safetensors"}


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn", None])
def test_bf16_round_trip_through_both_layouts(make_drafter, make_parts, tmp_path, kind):
    heads = {"markov_head_type": kind} if kind else {"markov_rank": 0, "confidence_head": False}
    drafter = make_drafter(**heads).bfloat16()
    save_published(drafter, tmp_path / "published")
    (tmp_path / "target").mkdir()
    save_attached(drafter, tmp_path / "target")
    published, attached = load_drafter(tmp_path / "published"), load_drafter(tmp_path / "target")
    tables = set(load_file(tmp_path / "published" / "model.safetensors")) - set(
        load_file(tmp_path / "target" / "dspark" / "model.safetensors")
    )
    assert tables == {"embed_tokens.weight", "lm_head.weight"}
    for loaded in (published, attached):
        loaded.bind(make_parts())
        assert (loaded.own_embedding_VH, loaded.own_head_VH) == (None, None)
        assert replace(loaded.config, extra={}) == (
            drafter.config if kind else replace(drafter.config, confidence_head_with_markov=False)
        )
        assert loaded.state_dict().keys() == drafter.state_dict().keys()
        for name, tensor in drafter.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name


def test_published_config_says_what_the_format_says(make_drafter, tmp_path):
    save_published(make_drafter(markov_rank=0, confidence_head=False), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["Qwen3DSparkModel"]
    assert config["model_type"] == "qwen3"
    assert config["dtype"] == "bfloat16"
    assert config["rope_parameters"] == {"rope_theta": 1e6, "rope_type": "default"}
    assert config["tie_word_embeddings"] is False
    assert config["num_anchors"] == 512
    assert config["layer_types"] == ["full_attention"] * 2
    absent = {"rope_theta", "torch_dtype", "markov_head_type", "confidence_head_with_markov"}
    assert not absent & set(config)


def test_learned_mask_travels_attached_only(make_drafter, tmp_path):
    drafter = make_drafter(mask_token_id=None)
    save_attached(drafter, tmp_path, dtype=None)
    loaded = load_drafter(tmp_path)
    assert torch.equal(loaded.mask_embedding.weight, drafter.mask_embedding.weight)
    with pytest.raises(CompatibilityError, match="mask_embedding"):
        save_published(drafter, tmp_path / "published")
    change_weights(tmp_path / "dspark", lambda t: t.pop("mask_embedding.weight"))
    with pytest.raises(CheckpointError, match="no mask_token_id"):
        load_drafter(tmp_path)


def test_saving_over_a_checkpoint_leaves_no_half_file(make_drafter, tmp_path, monkeypatch):
    save_published(make_drafter(seed=1), tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full_disk(state, path, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(files, "save_file", full_disk)
    with pytest.raises(CheckpointError, match=r"cannot be written \(no space left\)"):
        save_published(make_drafter(seed=2), tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def interrupt_config(monkeypatch):
    def write_text(path, text, **options):
        if path.name.startswith(".config.json"):
            path.write_bytes(b"{")
            raise KeyboardInterrupt
        return len(text)

    monkeypatch.setattr(files.Path, "write_text", write_text)


def interrupt_sync(monkeypatch):
    def fsync(_):
        raise OSError("the disk has gone")

    monkeypatch.setattr(files.os, "fsync", fsync)


@pytest.mark.parametrize("interrupt", [interrupt_config, interrupt_sync])
@pytest.mark.parametrize("save", [save_published, save_speculators, save_attached])
def test_an_interrupted_write_leaves_the_old_checkpoint_whole(
    make_drafter, tmp_path, monkeypatch, interrupt, save
):
    save(make_drafter(seed=1), tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with monkeypatch.context() as patch:
        interrupt(patch)
        with pytest.raises((KeyboardInterrupt, CheckpointError)):
            save(make_drafter(seed=2), tmp_path)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert torch.equal(load_drafter(tmp_path).fc.weight, make_drafter(seed=1).fc.weight.bfloat16())


@pytest.mark.parametrize("save", [save_published, save_speculators])
def test_another_model_is_not_written_over(golden, make_drafter, tmp_path, save):
    target = shutil.copytree(golden / "target", tmp_path / "target")
    before = {p.name: p.read_bytes() for p in target.iterdir()}
    with pytest.raises(CheckpointError, match="target holds a model that is no drafter"):
        save(make_drafter(), target)
    assert {p.name: p.read_bytes() for p in target.iterdir()} == before


def test_attaching_needs_the_target(make_drafter, tmp_path):
    with pytest.raises(CheckpointError, match="absent"):
        save_attached(make_drafter(), tmp_path / "absent")


def test_old_style_config_and_shards_are_read(copy, golden_drafter):
    change_config(copy, rope_parameters=..., rope_theta=10000.0, dtype=..., torch_dtype="float32")
    change_config(copy, num_anchors=..., rope_scaling=None, architectures=["DSparkDraftModel"])
    tensors = load_file(copy / "model.safetensors")
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, own in parts.items():
        save_file({name: tensors[name] for name in own}, copy / file)
    (copy / "model.safetensors").unlink()
    index = {"weight_map": {name: file for file, own in parts.items() for name in own}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    loaded = load_drafter(str(copy))
    assert loaded.config.backbone.rope_theta == 10000.0
    for name, tensor in golden_drafter.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    (copy / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"b\.safetensors is missing"):
        load_drafter(copy)


def test_tables_may_be_missing_and_mixed_dtypes_widen(copy, golden_parts):
    def change(tensors):
        del tensors["lm_head.weight"], tensors["embed_tokens.weight"]
        tensors["fc.weight"] = tensors["fc.weight"].bfloat16()

    change_weights(copy, change)
    loaded = load_drafter(copy)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    loaded.bind(golden_parts)
    assert loaded.borrowed.head_VH is golden_parts.head_VH


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"architectures": ["Qwen3EagleModel"]}, CompatibilityError, "Qwen3EagleModel.*not supp"),
        ({"architectures": ["Gemma4DSparkModel"]}, CheckpointError, "rope_parameters None"),
        ({"architectures": ["Qwen3ForCausalLM"]}, CompatibilityError, "Qwen3ForCausalLM.*no draf"),
        ({"speculators_model_type": "xpress"}, CompatibilityError, "speculators xpress.*not s"),
        ({"speculators_model_type": "dspark"}, CheckpointError, "transformer_layer_config None"),
        ({"architectures": ...}, CheckpointError, "names no architecture"),
        ({"rope_parameters": ...}, CheckpointError, "rope_theta None"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, CompatibilityError, "yarn"),
        ({"rope_parameters": [1]}, CheckpointError, "rope_parameters"),
        ({"layer_types": ["sliding_attention"] * 2}, CheckpointError, "lacks sliding_window"),
        ({"layer_types": ["full_attention"]}, CompatibilityError, "one for each of the 2 layers"),
        ({"layer_types": ["linear_attention"] * 2}, CompatibilityError, "linear_attention"),
        ({"layer_types": ..., "use_sliding_window": True}, CompatibilityError, "no layer_types"),
        ({"draft_vocab_size": 212}, CompatibilityError, "draft_vocab_size is 212"),
        ({"draft_vocab_size": 100}, CheckpointError, "lacks.*d2t, t2d"),
        ({"hidden_act": "gelu"}, CompatibilityError, "gelu"),
        ({"mask_token_id": 211}, CheckpointError, "mask_token_id 211.*0 to 210"),
        ({"target_layer_ids": [1, 3, 6]}, CompatibilityError, r"\[1, 3, 6\].*to 5"),
        ({"target_layer_ids": "1,3"}, CheckpointError, "list of integers"),
        ({"block_size": 0}, CheckpointError, "block_size 0"),
        ({"block_size": True}, CheckpointError, "block_size True"),
        ({"rms_norm_eps": "small"}, CheckpointError, "rms_norm_eps 'small'"),
        ({"rms_norm_eps": float("nan")}, CheckpointError, "rms_norm_eps nan"),
        ({"num_attention_heads": 3}, CompatibilityError, "num_attention_heads is 3.*multiple"),
        ({"enable_confidence_head": 1}, CheckpointError, "enable_confidence_head 1"),
        ({"markov_rank": ...}, CheckpointError, "lacks markov_rank"),
        ({"markov_head_type": "lstm"}, CompatibilityError, "'lstm'"),
        ({"hidden_size": 65}, CheckpointError, "wrong shape: .*instead of"),
        ({"num_hidden_layers": 3, "layer_types": ...}, CheckpointError, r"lacks.*layers\.2"),
        ({"markov_rank": 0, "confidence_head_with_markov": False}, CheckpointError, "markov_w1"),
    ],
)  # fmt: skip
def test_bad_configs_are_named(copy, changes, error, words):
    change_config(copy, **changes)
    with pytest.raises(error, match=words) as caught:
        load_drafter(copy)
    assert str(caught.value).count("\n") == 0


def remove(name):
    return lambda tensors: tensors.pop(name)


def put(name, tensor):
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (remove("fc.weight"), "lacks the tensors fc.weight"),
        (put("layers.7.extra", torch.zeros(1)), "does not explain: layers.7.extra"),
        (put("norm.weight", torch.zeros(63)), r"norm.weight \[63\] instead of \[64\]"),
        (put("lm_head.weight", torch.zeros(5, 64)), r"lm_head.weight \[5, 64\]"),
        (put("norm.weight", torch.zeros(64, dtype=torch.int8)), "no floats: norm.weight"),
    ],
)
def test_bad_tensors_are_named(copy, change, words):
    change_weights(copy, change)
    with pytest.raises(CheckpointError, match=words):
        load_drafter(copy)


@pytest.mark.parametrize("length", [0, 4, 1000, 400_000])
def test_truncated_weights_are_refused(copy, length):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged or cut short"):
        load_drafter(copy)


def test_missing_files_are_named(copy, tmp_path):
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        load_drafter(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="is a file"):
        load_drafter(copy / "config.json")
    (copy / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        load_drafter(copy)
    (copy / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_drafter(copy)


def test_unreadable_config_is_named(copy):
    for text, words in (("{", "not readable JSON"), ("[]", "holds list")):
        (copy / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=words):
            load_drafter(copy)


def test_pickles_are_refused_unopened(copy):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("the pickle was opened",))

    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match=r"pickled weights \(pytorch_model\.bin\)"):
        load_drafter(copy)


def test_hub_ids_are_fetched_and_their_failures_told(golden, tmp_path, monkeypatch):
    asked = []

    def fetch(name, **options):
        asked.append((name, options["revision"], options["local_files_only"]))
        if name == "owner/absent":
            raise OSError("no such repository\nmore")
        return str(golden / "draft")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    monkeypatch.setattr("dspark.sources.cache.why_unreachable", lambda: None)
    assert load_drafter("owner/draft", revision="v1", offline=True).block_size == 4
    assert asked == [("owner/draft", "v1", True)] * 2
    assert not has_attached_drafter("owner/draft")
    with pytest.raises(CheckpointError, match="cannot be fetched"):
        has_attached_drafter("owner/absent")
    with pytest.raises(CheckpointError, match=r"cannot be fetched.*no such repository") as caught:
        load_drafter("owner/absent")
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match=r"revision v2 .*not in the local hub cache"):
        load_drafter("owner/absent", revision="v2", offline=True)
    with pytest.raises(CheckpointError, match="does not exist"):
        load_drafter("./some/where/else")
