import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast

from dspark.attention.paged_cache import BlockTable
from dspark.attention.ragged_batch import RaggedBatch
from dspark.errors import CheckpointError, CompatibilityError, UsageError
from dspark.targets import loading
from dspark.targets.fast import packing
from dspark.targets.loading import resolve_device, resolve_dtype
from dspark.targets.target import Target


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture
def checkpoint(tiny_model, saved, tmp_path):
    """A fresh copy of a saved tiny model, in two shards."""
    if not (saved / "config.json").exists():
        tiny_model("qwen3").to(torch.bfloat16).save_pretrained(saved, max_shard_size="10KB")
    return shutil.copytree(saved, tmp_path / "model")


def load(path, **options):
    return Target.load(path, device="cpu", **options)


def test_loaded_model_equals_the_saved_one(tiny_model, checkpoint, capfd):
    target = load(checkpoint)
    assert (target.dtype, target.name) == (torch.float32, str(checkpoint))
    batch = RaggedBatch.fresh([[4, 5, 6]])
    model = tiny_model("qwen3")
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).float()
    own = Target.from_model(model)
    logits = [t.forward(batch, logit_rows="all").logits_NV for t in (target, own)]
    assert torch.allclose(*logits, atol=1e-5)
    assert load(checkpoint, dtype="bfloat16").dtype == torch.bfloat16
    assert load(str(checkpoint), dtype=torch.float32).dtype == torch.float32
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


def test_tokenizer_is_loaded_when_asked_for(checkpoint):
    assert load(checkpoint).tokenizer is None
    plain = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=plain).save_pretrained(checkpoint)
    target = load(checkpoint)
    assert target._tokenizer is None
    assert target.tokenizer.convert_tokens_to_ids("b") == 1
    (checkpoint / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer of .* cannot be read"):
        _ = load(checkpoint).tokenizer


def damage_no_config(path):
    (path / "config.json").unlink()


def damage_config_text(path):
    (path / "config.json").write_text('{"model_type": "qwen3"')


def damage_config_kind(path):
    (path / "config.json").write_text("[]")


def damage_no_weights(path):
    for file in path.glob("*.safetensors*"):
        file.unlink()


def damage_no_shard(path):
    sorted(path.glob("*.safetensors"))[1].unlink()


def damage_truncated(path):
    file = sorted(path.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-100])


def damage_empty_file(path):
    sorted(path.glob("*.safetensors"))[0].write_bytes(b"")


def damage_lost_key(path):
    for file in sorted(path.glob("*.safetensors")):
        weights = load_file(file)
        if weights.pop("model.layers.1.mlp.up_proj.weight", None) is not None:
            save_file(weights, file, metadata={"format": "pt"})


def damage_shape(path):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_no_config, r"has no config\.json"),
        (damage_config_text, r"config\.json is not valid JSON"),
        (damage_config_kind, r"config\.json holds no JSON object"),
        (damage_no_weights, r"has no weights"),
        (damage_no_shard, r"lacks 1 of \d+ weight files"),
        (damage_truncated, r"is truncated or damaged"),
        (damage_empty_file, r"is truncated or damaged"),
        (damage_lost_key, r"lacks 1 of the model's weights \(model\.layers\.1\.mlp\.up_proj"),
        (damage_shape, r"cannot be loaded"),
    ],
)
def test_damaged_checkpoints_are_refused(checkpoint, damage, message):
    damage(checkpoint)
    if damage is damage_no_weights:
        assert list(checkpoint.iterdir())
    with pytest.raises(CheckpointError, match=message) as caught:
        load(checkpoint)
    assert str(checkpoint) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_architecture_is_a_compatibility_error(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"model_type": "no_such"}))
    with pytest.raises(CompatibilityError, match="not known to transformers"):
        load(checkpoint)


def test_models_that_write_no_text_are_refused(checkpoint):
    config = AutoConfig.for_model("vit", hidden_size=16, num_attention_heads=2)
    config.save_pretrained(checkpoint)
    with pytest.raises(CompatibilityError, match="'vit' model"):
        load(checkpoint)


def test_missing_directory(tmp_path):
    for source in (tmp_path / "none", str(tmp_path / "none"), "./none", "a/b/c", ""):
        with pytest.raises(CheckpointError, match="is not a directory"):
            load(source)


def test_hub_names_offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match=r"no-such/model cannot be loaded \(offline\)"):
        load("no-such/model", offline=True, revision="main")


def test_text_part_of_a_composite_model(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
             "num_attention_heads": 2}  # fmt: skip
    text = sizes | {"vocab_size": 61, "num_key_value_heads": 1, "head_dim": 8}
    vision = sizes | {"image_size": 8, "patch_size": 4}
    config = AutoConfig.for_model(
        "gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4,
        image_token_index=60, boi_token_index=59, eoi_token_index=58,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    model.save_pretrained(tmp_path)
    ids = [4, 5, 6, 7]
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids])).logits[0]
    target = load(tmp_path)
    cache, table = target.new_cache(1), BlockTable((0,))
    got = [
        target.forward(RaggedBatch.build([(table, i, ids[i : i + 2])]), cache, logit_rows="all")
        for i in (0, 2)
    ]
    assert (torch.cat([out.logits_NV for out in got]) - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("device", ["nonsense", "cuda:77", "meta", "cpu:1"])
def test_devices_that_cannot_be_used(device):
    with pytest.raises(UsageError, match=f"device is '{device}'"):
        resolve_device(device)


def test_devices_and_dtypes():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type in {"cpu", "cuda", "mps"}
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert resolve_dtype("auto", cpu) == torch.float32
    assert resolve_dtype("auto", gpu) == "auto"
    assert resolve_dtype("float16", gpu) == torch.float16
    assert resolve_dtype(torch.bfloat16, cpu) == torch.bfloat16
    for wrong in ("int8", torch.int8):
        with pytest.raises(UsageError, match="dtype is"):
            resolve_dtype(wrong, cpu)


@pytest.fixture
def timed(monkeypatch):
    """`quicker_cpu_dtype` on a processor with instructions for bfloat16 and given seconds."""

    def run(short_seconds, outputs=1024, inputs=512):
        asked = []

        def seconds(packers, weight):
            asked.append((tuple(packer.kind for packer in packers), weight.dtype, weight.shape))
            return short_seconds if weight.dtype == torch.bfloat16 else 1.0

        monkeypatch.setattr(packing, "onednn_works", lambda dtype: True)
        monkeypatch.setattr(packing, "_fastest_seconds", seconds)
        packing.quicker_cpu_dtype.cache_clear()
        found = {packing.quicker_cpu_dtype(outputs, inputs) for _ in range(3)}
        packing.quicker_cpu_dtype.cache_clear()
        assert len(found) == 1
        return found.pop(), asked

    return run


def test_auto_takes_bfloat16_on_a_cpu_where_it_is_measured_faster(timed):
    dtype, asked = timed(0.8)
    assert dtype == torch.bfloat16
    assert [kinds for kinds, _, _ in asked] == [("onednn",), ("plain", "fp16", "onednn")]
    assert timed(0.9)[0] == torch.float32
    assert timed(0.5, 64, 64) == (torch.float32, [])
    assert timed(0.5, 2**15, 2**12)[1][0][2] == (2**12, 2**12)


def test_auto_measures_nothing_without_instructions_for_bfloat16(monkeypatch):
    monkeypatch.setattr(packing, "onednn_works", lambda dtype: False)
    monkeypatch.setattr(packing, "_fastest_seconds", None)
    packing.quicker_cpu_dtype.cache_clear()
    assert packing.quicker_cpu_dtype(1024, 512) == torch.float32
    packing.quicker_cpu_dtype.cache_clear()


@pytest.mark.parametrize("saved", [torch.bfloat16, torch.float32])
def test_only_a_bfloat16_checkpoint_is_run_in_bfloat16_on_a_cpu(
    tiny_model, tmp_path, monkeypatch, saved
):
    tiny_model("qwen3").to(saved).save_pretrained(tmp_path)
    monkeypatch.setattr(loading, "quicker_cpu_dtype", lambda outputs, inputs: torch.bfloat16)
    loaded = {
        "auto": Target.load(tmp_path, device="cpu"),
        "named": Target.load(tmp_path, device="cpu", dtype="float32"),
        "invariant": Target.load(tmp_path, device="cpu", batch_invariant=True),
    }
    dtypes = {name: target.parts().embedding_VH.dtype for name, target in loaded.items()}
    assert dtypes == {"auto": saved, "named": torch.float32, "invariant": torch.float32}
