"""`mtp.*` in a target's checkpoint and by itself: numbers, shards, conversions, bad files."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from dspark.drafters.checkpoints.block_scales import dequantised, to_fp4, to_fp8
from dspark.drafters.checkpoints.checkpoint import (
    borrow_tables,
    examine,
    has_attached_drafter,
    load_drafter,
    save,
    save_attached,
)
from dspark.drafters.checkpoints.files import CONFIG, INDEX, WEIGHTS, read_weights
from dspark.drafters.checkpoints.from_target import TargetTables
from dspark.drafters.checkpoints.registry import is_drafter
from dspark.drafters.deepseek_v4 import DeepseekV4Drafter
from dspark.drafters.deepseek_v4_layers import is_fp32
from dspark.errors import CheckpointError, CompatibilityError
from tests.helpers.deepseek_v4 import STAGES, tiny_config, tiny_drafter, tiny_layers
from tests.helpers.targets import lent_parts

WIDTH, VOCAB = 32, 37
BLOCK = [16, 16]
FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def exponents(shape, seed=0):
    source = torch.Generator().manual_seed(seed)
    return torch.randint(120, 132, shape, generator=source, dtype=torch.uint8)


# Numbers


def test_four_bits_are_unpacked_low_half_first():
    """Number by number, by the published table and order."""
    source = torch.Generator().manual_seed(1)
    weight = torch.randint(-128, 128, (3, 32), generator=source, dtype=torch.int8)
    scale = exponents((3, 2))
    found = dequantised({"x.weight": weight, "x.scale": scale.view(torch.float8_e8m0fnu)}, "file")
    assert found.keys() == {"x.weight"}
    for row in range(3):
        for column in range(64):
            byte = int(weight[row, column // 2]) % 256
            code = byte >> 4 if column % 2 else byte & 15
            value = FP4[code % 8] * (-1 if code >= 8 else 1)
            value *= 2.0 ** (int(scale[row, column // 32]) - 127)
            assert float(found["x.weight"][row, column]) == value
    as_bytes = dequantised({"x.weight": weight, "x.scale": scale}, "file")
    assert torch.equal(as_bytes["x.weight"], found["x.weight"])


@pytest.mark.parametrize("kind", ["powers of two", "float32"])
def test_eight_bits_are_scaled_block_by_block(kind):
    """Blocks at the edges are smaller; float32 scales, as of Flash-Base, keep their digits."""
    source = torch.Generator().manual_seed(2)
    weight = torch.randn(20, 37, generator=source).to(torch.float8_e4m3fn)
    scale = exponents((2, 3)).view(torch.float8_e8m0fnu)
    if kind == "float32":
        scale = torch.rand(2, 3, generator=source)
    found = dequantised({"x.weight": weight, "x.scale": scale}, "file", (16, 16))["x.weight"]
    for row in range(20):
        for column in range(37):
            factor = float(scale[row // 16, column // 16].float())
            product = torch.tensor(float(weight[row, column].float())) * factor
            assert float(found[row, column]) == float(product)


def test_what_was_quantised_comes_back_to_the_bit():
    source = torch.Generator().manual_seed(3)
    eight = torch.randn(40, 50, generator=source).to(torch.float8_e4m3fn)
    state = {"x.weight": eight, "x.scale": exponents((3, 4)).view(torch.float8_e8m0fnu)}
    values = dequantised(state, "file", (16, 16))["x.weight"]
    assert values.dtype == torch.bfloat16
    weight, scale = to_fp8(values, (16, 16))
    again = dequantised({"x.weight": weight, "x.scale": scale}, "file", (16, 16))["x.weight"]
    assert torch.equal(again, values)
    four = torch.randint(-128, 128, (8, 64), generator=source, dtype=torch.int8)
    state = {"x.weight": four, "x.scale": exponents((8, 4)).view(torch.float8_e8m0fnu)}
    values = dequantised(state, "file")["x.weight"]
    weight, scale = to_fp4(values)
    assert torch.equal(
        dequantised({"x.weight": weight, "x.scale": scale}, "file")["x.weight"], values
    )


def test_other_numbers_are_rounded_to_the_nearest():
    values = torch.linspace(-5.9, 5.9, 64).view(2, 32)
    weight, scale = to_fp4(values)
    found = dequantised({"x.weight": weight, "x.scale": scale}, "file")["x.weight"].float()
    grid = torch.tensor([-x for x in FP4] + FP4)
    nearest = grid[(values.unsqueeze(-1) - grid).abs().argmin(-1)]
    assert torch.equal((found - values).abs(), (nearest - values).abs())
    assert torch.equal(dequantised(
        dict(zip(("x.weight", "x.scale"), to_fp8(torch.zeros(4, 4)), strict=True)), "file"
    )["x.weight"], torch.zeros(4, 4, dtype=torch.bfloat16))  # fmt: skip


@pytest.mark.parametrize(
    ("state", "error", "words"),
    [
        ({"x.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn)}, CheckpointError, "no x.scale"),
        ({"x.weight": torch.zeros(4, 16, dtype=torch.int8)}, CheckpointError, "no x.scale"),
        ({"x.weight": torch.zeros(4, 4), "x.scale": torch.ones(1, 1)}, CompatibilityError,
         "x.weight in float32"),
        ({"x.weight": torch.zeros(4, 4).to(torch.float8_e5m2), "x.scale": torch.ones(1, 1)},
         CompatibilityError, "x.weight in float8_e5m2 .*not known here"),
        ({"x.weight": torch.zeros(4, 16, dtype=torch.int8), "x.scale": torch.ones(4, 1)},
         CompatibilityError, "x.scale in float32"),
        ({"x.weight": torch.zeros(4, 16, dtype=torch.int8),
          "x.scale": torch.ones(4, 2, dtype=torch.uint8)}, CheckpointError, r"makes \[4, 1\]"),
        ({"x.scale": torch.ones(1, 1)}, CheckpointError, "no x.weight"),
        ({"x.weight_scale_2": torch.ones(1, 1, dtype=torch.int32)}, CompatibilityError, "int32"),
    ],
)  # fmt: skip
def test_numbers_that_cannot_be_known_are_refused(state, error, words):
    with pytest.raises(error, match=words):
        dequantised(state, "file")


# Checkpoints


@pytest.fixture
def parts(make_parts):
    return make_parts(VOCAB, WIDTH)


def inside(directory, drafter, parts, *, nested=False):
    """A target's directory, its shards 8- and 4-bit; the last holds the draft module alone."""
    extra = {
        "quantization_config": {"quant_method": "fp8", "weight_block_size": BLOCK},
        "eos_token_id": 1,
        "compress_ratios": [0, 4, 4, 128] + [0] * STAGES,
    }
    drafter.config.extra.update(extra)
    written = save(drafter, directory / "alone", "deepseek_v4", dtype=torch.bfloat16)
    tensors = load_file(written.directory / WEIGHTS)
    config = json.loads((written.directory / CONFIG).read_text())
    del config["n_mtp_layers"]
    config["architectures"] = ["DeepseekV4ForCausalLM"]
    if nested:
        config = {"model_type": config.pop("model_type"), "text_config": config,
                  "architectures": config.pop("architectures"), "vision_config": {}}  # fmt: skip
    (directory / CONFIG).write_text(json.dumps(config))
    shards = {
        "model-00001-of-00002.safetensors": {
            "embed.weight": parts.embedding_VH, "head.weight": parts.head_VH,
        },
        "model-00002-of-00002.safetensors": tensors,
    }  # fmt: skip
    index = {name: shard for shard, held in shards.items() for name in held}
    for shard, held in shards.items():
        save_file({name: x.contiguous() for name, x in held.items()}, directory / shard)
    (directory / INDEX).write_text(json.dumps({"weight_map": index}))
    shutil.rmtree(directory / "alone")
    return tensors


@pytest.fixture(scope="module", params=["V4", "V4.1"])
def kept(request, tmp_path_factory):
    source, carried = torch.Generator().manual_seed(4), request.param == "V4.1"
    parts = lent_parts(*(torch.randn(VOCAB, WIDTH, generator=source) for _ in range(2)))
    layers = tiny_layers(WIDTH, carried_mix=carried)
    drafter = tiny_drafter(parts, tiny_config(VOCAB, layers, extra={}))
    directory = tmp_path_factory.mktemp("target")
    return directory, drafter, inside(directory, drafter, parts, nested=carried)


@pytest.fixture
def target(kept, tmp_path):
    directory, drafter, tensors = kept
    shutil.copytree(directory, tmp_path / "target")
    return tmp_path / "target", drafter, tensors


def test_a_target_with_a_draft_module_is_no_drafter_but_holds_one(target):
    directory, _, _ = target
    assert not is_drafter(json.loads((directory / CONFIG).read_text()))
    assert has_attached_drafter(directory)


def test_the_module_is_read_without_the_other_shards(target):
    """Every number as the file says; the target's shards are not even there."""
    directory, drafter, tensors = target
    (directory / "model-00001-of-00002.safetensors").unlink()
    found = load_drafter(directory)
    assert type(found) is DeepseekV4Drafter
    assert found.config.backbone == drafter.config.backbone
    assert found.taps == drafter.taps
    for name in ("block_size", "mask_token_id", "markov_rank", "num_target_layers", "vocab_size"):
        assert getattr(found.config, name) == getattr(drafter.config, name)
    wholes = dequantised(tensors, "file", (16, 16))
    experts = found.state_dict()["layers.1.mlp.experts.gate_up_proj"][4]
    pair = [wholes[f"mtp.1.ffn.experts.4.w{which}.weight"] for which in "13"]
    assert torch.equal(experts, torch.cat(pair))
    down = found.state_dict()["layers.2.mlp.experts.down_proj"][5]
    assert torch.equal(down, wholes["mtp.2.ffn.experts.5.w2.weight"])
    assert torch.equal(found.fc.weight, wholes["mtp.0.main_proj.weight"])
    own = drafter.state_dict()
    for name, tensor in found.state_dict().items():
        assert tensor.dtype == (torch.float32 if is_fp32(name) else torch.bfloat16), name
        # Half a step of e2m1 at its top, of numbers from 5 on, and of e4m3.
        near = 1 / 5 if ".experts." in name else 1 / 16
        gap = (tensor.float() - own[name]).abs().max()
        most = 0.0 if is_fp32(name) else near + 1 / 256  # rounded to bfloat16 before
        assert gap <= most * own[name].abs().max(), name


def test_stages_and_kinds_of_numbers_are_the_published_ones(target):
    """Per stage 8 matrices in 8 bits, 3 of each expert in 4; the rest as the published list."""
    _, drafter, tensors = target
    kinds = {}
    for name, tensor in tensors.items():
        if not name.endswith(".scale"):
            kinds.setdefault(tensor.dtype, []).append(name)
    assert len(kinds[torch.float8_e4m3fn]) == 8 * STAGES + 1
    assert len(kinds[torch.int8]) == 3 * 6 * STAGES
    carried = drafter.config.backbone.carried_mix
    # 5 norms and gate a stage, main_norm, norm, two Markov tables, confidence.
    assert len(kinds[torch.bfloat16]) == 5 * STAGES + 5
    # Two connections of 3, sinks, gate.bias; hc_head.
    assert len(kinds[torch.float32]) == 8 * STAGES + (0 if carried else 3)
    scales = {name for name in tensors if name.endswith(".scale")}
    assert len(scales) == len(kinds[torch.float8_e4m3fn]) + len(kinds[torch.int8])
    assert {tensors[name].dtype for name in scales} == {torch.float8_e8m0fnu}


@pytest.mark.parametrize("layout", ["deepspec", "attached"])
def test_to_a_standalone_drafter_and_back_to_the_bit(target, tmp_path, layout):
    directory, _, tensors = target
    drafter = load_drafter(directory)
    borrow_tables(drafter, TargetTables.read(directory))
    between = tmp_path / "between"
    if layout == "attached":
        save_attached(drafter, directory, dtype=None)
        between = directory / "dspark"
    else:
        save(drafter, between, layout, dtype=None)
    alone = load_drafter(between)
    for name, tensor in alone.state_dict().items():
        assert torch.equal(tensor, drafter.state_dict()[name]), name
        assert tensor.dtype == drafter.state_dict()[name].dtype
    borrow_tables(alone, TargetTables.read(directory))
    save(alone, tmp_path / "back", "deepseek_v4", dtype=None)
    found = load_file(tmp_path / "back" / WEIGHTS)
    assert found.keys() == tensors.keys()
    values = dequantised(found, "back", (16, 16))
    for name, tensor in dequantised(tensors, "file", (16, 16)).items():
        assert torch.equal(values[name], tensor), name
    assert load_drafter(tmp_path / "back").config.backbone == drafter.config.backbone


def test_a_target_saved_without_its_module_is_one_without(target):
    """As transformers saves it: the configuration still has the module's fields."""
    directory, _, _ = target
    index = json.loads((directory / INDEX).read_text())["weight_map"]
    left = {name: shard for name, shard in index.items() if not name.startswith("mtp.")}
    (directory / INDEX).write_text(json.dumps({"weight_map": left}))
    assert not has_attached_drafter(directory)
    with pytest.raises(CheckpointError, match=r"hold no mtp\.\*"):
        load_drafter(directory)


def test_it_is_examined_by_its_headers_alone(target):
    directory, drafter, tensors = target
    found, files = examine(directory)
    assert found.config.backbone == drafter.config.backbone
    assert {name: (x.shape, x.dtype) for name, x in files.items()} == {
        name: (x.shape, x.dtype) for name, x in tensors.items()
    }
    assert all(x.is_meta for x in (*files.values(), *found.state_dict().values()))


def change(directory, edit, shard="model-00002-of-00002.safetensors"):
    tensors = load_file(directory / shard)
    edit(tensors)
    save_file(tensors, directory / shard)
    index = json.loads((directory / INDEX).read_text())["weight_map"]
    index = {n: s for n, s in index.items() if s != shard} | dict.fromkeys(tensors, shard)
    (directory / INDEX).write_text(json.dumps({"weight_map": index}))


@pytest.mark.parametrize(
    ("edit", "error", "words"),
    [
        (lambda t: t.pop("mtp.0.attn.wq_a.scale"), CheckpointError, "no mtp.0.attn.wq_a.scale"),
        (lambda t: t.pop("mtp.1.ffn.experts.3.w2.weight") is None or
         t.pop("mtp.1.ffn.experts.3.w2.scale"), CheckpointError, r"lacks ffn.experts.3.w2"),
        (lambda t: t.pop("mtp.2.norm.weight"), CheckpointError, "lacks the tensors norm.weight"),
        (lambda t: t.update({"mtp.1.enorm.weight": torch.zeros(4)}), CheckpointError,
         "does not explain: mtp.1.enorm.weight"),
        (lambda t: t.update({"mtp.1.attn.wkv.weight": torch.zeros(16, WIDTH).to(torch.float16)
         .to(torch.float8_e5m2)}), CompatibilityError, "wkv.weight in float8_e5m2"),
    ],
)  # fmt: skip
def test_faults_inside_a_file_are_named(target, edit, error, words):
    directory, _, _ = target
    change(directory, edit)
    for read in (load_drafter, examine):
        with pytest.raises(error, match=words):
            read(directory)


def test_a_shard_that_is_missing_cut_or_another_is_named(target):
    directory, _, _ = target
    shard = directory / "model-00002-of-00002.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match=r"00002-of-00002.*damaged or cut short"):
        load_drafter(directory)
    shard.write_bytes(whole[:50])
    with pytest.raises(CheckpointError, match=r"00002-of-00002.*damaged or cut short"):
        examine(directory)
    shutil.copy(directory / "model-00001-of-00002.safetensors", shard)
    with pytest.raises(CheckpointError, match=r"though .* says that it is there"):
        load_drafter(directory)
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"00002-of-00002.safetensors is missing"):
        load_drafter(directory)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"scoring_func": "softmax"}, CompatibilityError, "scoring_func 'softmax'"),
        ({"n_shared_experts": 2}, CompatibilityError, "n_shared_experts 2"),
        ({"q_lora_rank": ...}, CheckpointError, "lacks q_lora_rank"),
        ({"dspark_target_layer_ids": [3, 1]}, CompatibilityError, "strictly increasing"),
        ({"quantization_config": {"quant_method": "awq"}}, CompatibilityError, "'awq'"),
        ({"quantization_config": {"weight_block_size": [128]}}, CompatibilityError, r"\[128\]"),
        ({"quantization_config": "fp8"}, CheckpointError, "must be an object"),
        ({"n_mtp_layers": 4}, CheckpointError, "lacks the tensors layers.3"),
        ({"hc_mult": 2}, CheckpointError, "wrong shape"),
    ],
)
def test_configurations_that_cannot_be_are_refused(target, changes, error, words):
    directory, _, _ = target
    data = json.loads((directory / CONFIG).read_text())
    fields = data.get("text_config", data)
    for name, value in changes.items():
        fields.pop(name, None)
        if value is not ...:
            fields[name] = value
    (directory / CONFIG).write_text(json.dumps(data))
    with pytest.raises(error, match=words):
        load_drafter(directory)


def test_of_a_hubs_target_only_the_modules_shards_are_fetched(target, monkeypatch):
    directory, _, _ = target
    asked = []

    def fetch(_name, **options):
        asked.append(options["allow_patterns"])
        return str(directory)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    monkeypatch.setattr("dspark.sources.cache.why_unreachable", lambda: None)
    assert has_attached_drafter("owner/target")
    load_drafter("owner/target")
    assert asked[-1] == [CONFIG, INDEX, "model-00002-of-00002.safetensors"]
    assert not any(pattern.startswith("*") for patterns in asked for pattern in patterns)


def test_unquantised_targets_get_plain_numbers(tmp_path, parts):
    drafter = tiny_drafter(parts, tiny_config(VOCAB, tiny_layers(WIDTH)))
    save(drafter, tmp_path, "deepseek_v4", dtype=None)
    tensors = read_weights(tmp_path)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    for name, tensor in load_drafter(tmp_path).state_dict().items():
        assert torch.equal(tensor, drafter.state_dict()[name])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"markov_head_type": "gated"}, "a gated Markov head"),
        ({"sample_from_anchor": False}, "sample_from_anchor false"),
        ({"mask_token_id": None}, "a learned mask embedding"),
    ],
)
def test_what_the_fields_have_no_place_for_is_refused_there_and_kept_elsewhere(
    tmp_path, parts, changes, words
):
    drafter = tiny_drafter(parts, tiny_config(VOCAB, tiny_layers(WIDTH), **changes))
    with pytest.raises(CompatibilityError, match=words):
        save(drafter, tmp_path / "inside", "deepseek_v4")
    (tmp_path / "target").mkdir()
    save_attached(drafter, tmp_path / "target", dtype=None)
    found = load_drafter(tmp_path / "target")
    for name, value in changes.items():
        assert getattr(found.config, name) == value
    assert found.state_dict().keys() == drafter.state_dict().keys()


def test_tables_of_its_own_have_no_place_beside_the_target(target, tmp_path):
    directory, _, _ = target
    drafter = load_drafter(directory)
    borrow_tables(drafter, TargetTables.read(directory))
    save(drafter, tmp_path / "alone", "deepspec")
    with pytest.raises(CompatibilityError, match="--target"):
        save(load_drafter(tmp_path / "alone"), tmp_path / "back", "deepseek_v4")
