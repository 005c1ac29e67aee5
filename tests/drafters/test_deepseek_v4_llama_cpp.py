"""The draft module in llama.cpp, from the file that its own converter makes of ours.

DSPARK_LLAMA_CPP names the directory of its programs, `build/bin` of a built source tree. The
converter packs matrices in 4 and 8 bits and llama.cpp rounds what they are multiplied with, so the
file is unpacked to float32 before it is run; embedding and head are put in, as no target is there.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from dspark.attention.packed import BlockLayout
from dspark.data.templates import train_tokenizer
from dspark.drafters.checkpoints.checkpoint import load_drafter, save
from dspark.drafters.checkpoints.deepseek_v4 import from_json
from tests.helpers.deepseek_v4 import DRAFT_FIELDS, SHAPE, TEXTS, VOCAB, tiny_drafter
from tests.helpers.targets import lent_parts

gguf = pytest.importorskip("gguf")
PROGRAMS = os.environ.get("DSPARK_LLAMA_CPP", "")
TREE = Path(PROGRAMS).parents[1] if PROGRAMS else Path()
SOURCE = Path(__file__).with_name("llama_cpp_block.cpp")
pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(not PROGRAMS, reason="DSPARK_LLAMA_CPP names no programs"),
]
WIDTH, WINDOW, ANCHOR, SLOTS = 256, 24, 7, 5
SIZES = {  # rows in blocks of 32 and 128 numbers
    "hidden_size": WIDTH, "moe_intermediate_size": 256, "q_lora_rank": 256, "o_lora_rank": 128,
    "o_groups": 2, "head_dim": 64, "num_attention_heads": 4, "sliding_window": WINDOW,
}  # fmt: skip
# Its check of tokenizers knows those of published models only.
CONVERT = """
import sys
sys.path[:0] = [sys.argv[1] + "/gguf-py", sys.argv[1]]
import conversion.base
conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "smollm"
import convert_hf_to_gguf
sys.argv = ["", sys.argv[2], "--target-model-dir", sys.argv[3], "--outfile", sys.argv[4]]
convert_hf_to_gguf.main()
"""


@pytest.fixture(scope="module")
def parts():
    source = torch.Generator().manual_seed(0)
    return lent_parts(*(torch.randn(VOCAB, WIDTH, generator=source) for _ in range(2)))


@pytest.fixture(scope="module")
def files(tmp_path_factory, parts):
    """Our file, quantised as published, and what the converter makes of it."""
    root = tmp_path_factory.mktemp("files")
    config = AutoConfig.for_model("deepseek_v4", **(SHAPE | SIZES))
    data = json.loads(config.to_json_string(use_diff=False)) | DRAFT_FIELDS
    data |= {
        "architectures": ["DeepseekV4ForCausalLM"], "num_hash_layers": 0, "rope_theta": 10000.0,
        "compress_ratios": [0] * 7, "qk_rope_head_dim": config.qk_rope_head_dim,
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    }  # fmt: skip
    (root / "target").mkdir()
    (root / "target" / "config.json").write_text(json.dumps(data))
    train_tokenizer(TEXTS, VOCAB).save_pretrained(root / "target")
    save(tiny_drafter(parts, from_json(data, "target")), root / "mtp", "deepseek_v4")
    names = (TREE, root / "mtp", root / "target", root / "out.gguf")
    subprocess.run([sys.executable, "-c", CONVERT, *map(str, names)], check=True)
    return root


def wholes(state):
    """Our matrices under the converter's names."""
    found = {}
    for i in range(3):
        mine, theirs = f"layers.{i}.", f"blk.{i}."
        gate, up = state[mine + "mlp.experts.gate_up_proj"].chunk(2, 1)
        found[theirs + "ffn_gate_exps.weight"], found[theirs + "ffn_up_exps.weight"] = gate, up
        found[theirs + "ffn_down_exps.weight"] = state[mine + "mlp.experts.down_proj"]
        for their, own in (("q_a", "q_a"), ("q_b", "q_b"), ("kv", "kv"), ("output_a", "o_a"),
                           ("output_b", "o_b")):  # fmt: skip
            found[f"{theirs}attn_{their}.weight"] = state[f"{mine}self_attn.{own}_proj.weight"]
        for part in ("gate", "up", "down"):
            own = f"{mine}mlp.shared_experts.{part}_proj.weight"
            found[f"{theirs}ffn_{part}_shexp.weight"] = state[own]
    return found | {"fc.weight": state["fc.weight"]}


def test_its_converter_reads_the_numbers_that_we_read(files):
    """Experts to the bit; 8-bit matrices, which it packs anew, within half a step of 1 / 127."""
    state = load_drafter(files / "mtp").float().state_dict()
    mine, kinds = wholes(state), {}
    for tensor in gguf.GGUFReader(files / "out.gguf").tensors:
        if tensor.name in mine:
            own = mine[tensor.name].numpy()
            read = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(own.shape)
            gap = np.abs(read - own).max() / np.abs(own).max()
            kinds.setdefault(tensor.tensor_type.name, []).append(float(gap))
    assert max(kinds.pop("MXFP4")) == 0
    assert max(kinds.pop("Q8_0")) <= 0.5 / 127 + 1e-4
    assert not kinds


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("program") / "block"
    folders = [f"-I{TREE / name}" for name in ("", "include", "common", "ggml/include", "vendor")]
    libraries = [f"-l{name}" for name in ("llama-common", "llama", "ggml", "ggml-base", "ggml-cpu")]
    subprocess.run(
        ["g++", "-std=c++17", *folders, str(SOURCE), f"-L{PROGRAMS}", *libraries,
         f"-Wl,-rpath,{PROGRAMS}", "-o", str(path)],
        check=True,
    )  # fmt: skip
    return path


def unpacked(files, parts):
    """The converter's file in float32, with an embedding and a head."""
    mine = wholes(load_drafter(files / "mtp").float().state_dict())
    reader = gguf.GGUFReader(files / "out.gguf")
    writer = gguf.GGUFWriter(files / "float.gguf", "dflash")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            kind, many = field.types[0], field.types[0] == gguf.GGUFValueType.ARRAY
            value, sub = field.contents(), field.types[-1] if many else None
            writer.add_key_value(name, value, kind, sub_type=sub)
    for tensor in reader.tensors:
        read = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if tensor.name in mine:
            read = mine[tensor.name].numpy().reshape(read.shape)
        writer.add_tensor(tensor.name, np.ascontiguousarray(read))
    writer.add_tensor("token_embd.weight", parts.embedding_VH.numpy())
    writer.add_tensor("output.weight", parts.head_VH.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return files / "float.gguf"


@torch.no_grad()
def drafted(drafter, features, rows):
    """Logits [K, V] of a block, each slot's with the bias of the likeliest token before."""
    hidden = drafter(
        features, torch.arange(rows), torch.tensor([ANCHOR]), rows + torch.arange(SLOTS)[None],
        BlockLayout(torch.tensor([0]), torch.tensor([rows]), SLOTS),
    )  # fmt: skip
    found, previous = [], torch.tensor([ANCHOR])
    for slot, base_V in enumerate(drafter.base_logits(drafter.head_states(hidden))[0]):
        feature, _ = drafter.markov_head.step(previous, hidden[:, slot], None)
        found.append(base_V + drafter.markov_head.bias(feature)[0])
        previous = found[-1].argmax()[None]
    return torch.stack(found)


def test_its_logits_are_ours_within_the_window(files, parts, program, tmp_path):
    """Behind it they differ: its window moves on with the slots, the reference's does not."""
    drafter = load_drafter(files / "mtp").float()
    drafter.bind(parts)
    model = unpacked(files, parts)
    for rows in (3, WINDOW - SLOTS, WINDOW + 4):
        source = torch.Generator().manual_seed(rows)
        features = torch.randn(rows, drafter.fc.in_features, generator=source)
        features.numpy().tofile(tmp_path / "features")
        words = [program, model, tmp_path / "features", rows, features.shape[1], ANCHOR,
                 drafter.config.mask_token_id, SLOTS, tmp_path / "out"]  # fmt: skip
        subprocess.run([str(word) for word in words], check=True, capture_output=True)
        theirs = torch.from_numpy(np.fromfile(tmp_path / "out", np.float32)).view(SLOTS, -1)
        ours = drafted(drafter, features, rows)
        gap = (theirs - ours).abs().max() / ours.abs().max()
        if rows + SLOTS <= WINDOW:
            assert gap < 1e-5
            assert torch.equal(theirs.argmax(-1), ours.argmax(-1))
        else:
            assert gap > 1e-3
