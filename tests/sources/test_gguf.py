import logging
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType

import dspark
from dspark.attention.ragged_batch import RaggedBatch
from dspark.data.features.manifest import target_fingerprint
from dspark.drafters.checkpoints.checkpoint import has_attached_drafter, save_attached
from dspark.drafters.checkpoints.from_target import TargetTables
from dspark.errors import CheckpointError, CompatibilityError
from dspark.sources import gguf as sources_gguf
from dspark.sources.cache import cache_directory
from dspark.sources.gguf import converted, gguf_file
from dspark.sources.gguf_file import GgufFile
from dspark.targets.layerless import load_without_layers
from dspark.targets.target import Target
from tests.helpers.drafters import tiny_backbone, tiny_dspark
from tests.helpers.entries import make_entry
from tests.helpers.gguf import LAYERS, tiny_llama_with_tokenizer, write_gguf

ROWS = [[4, 5, 6, 17, 250, 33, 34], [7, 8]]


def logits(target):
    return target.forward(RaggedBatch.fresh(ROWS), logit_rows="all").logits_NV


def test_a_float32_gguf_is_the_safetensors_model_to_the_bit(twins):
    for source in (twins.gguf, str(twins.gguf), twins.gguf.parent):
        target = Target.load(source, device="cpu")
        assert target.name == str(source)
        assert torch.equal(logits(target), logits(Target.load(twins.directory, device="cpu")))
    assert target.eos_token_ids == {2}
    assert target.tokenizer.chat_template == twins.tokenizer.chat_template
    assert target.config.max_position_embeddings == 160
    text = "<|im_start|>user\nhow many? 12<|im_end|>\n"
    assert target.tokenizer(text)["input_ids"] == twins.tokenizer(text)["input_ids"]
    assert target.tokenizer.convert_tokens_to_ids("<|im_end|>") == target.tokenizer.eos_token_id


def test_quantised_weights_are_those_that_the_blocks_say(twins, tmp_path):
    from gguf.quants import dequantize, quantize

    kind = GGMLQuantizationType.Q8_0
    path = write_gguf(tmp_path / "q.gguf", twins.model, twins.tokenizer, kind=kind)
    target = Target.load(path, device="cpu", dtype="float32")
    embedding = twins.model.model.embed_tokens.weight.detach().numpy()
    expected = torch.from_numpy(dequantize(quantize(embedding, kind), kind))
    assert torch.equal(target.parts().embedding_VH, expected)
    assert not torch.equal(expected, torch.from_numpy(embedding))
    halved = Target.load(path, device="cpu", dtype="bfloat16")
    assert torch.equal(halved.parts().embedding_VH, expected.to(torch.bfloat16))
    usual = Target.load(path, device="cpu")  # computed in either dtype, read in bfloat16
    assert torch.equal(usual.parts().embedding_VH.bfloat16(), expected.bfloat16())
    assert torch.equal(usual.parts().embedding_VH.float(), expected.bfloat16().float())
    assert converted(path).name.endswith("-bfloat16")
    assert converted(twins.gguf).name.endswith("-float32")


def test_it_is_converted_once_and_this_is_said(twins, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "dspark.sources")
    first = converted(twins.gguf, torch.float32)
    monkeypatch.setattr(sources_gguf, "_convert", None)
    assert converted(twins.gguf, torch.float32) == first
    assert [r.getMessage().split()[0] for r in caplog.records] == ["Converting"]
    assert first.parent == cache_directory("gguf")
    os.utime(twins.gguf, ns=(0, 0))  # another file, for all that is known
    with pytest.raises(TypeError):
        converted(twins.gguf, torch.float32)


def test_a_copy_needs_no_extra_and_a_conversion_does(twins, monkeypatch):
    converted(twins.gguf, torch.float32)
    find = sources_gguf.importlib.util.find_spec
    monkeypatch.setattr(
        sources_gguf.importlib.util, "find_spec", lambda n: None if n == "gguf" else find(n)
    )
    assert Target.load(twins.gguf, device="cpu").num_layers == LAYERS
    with pytest.raises(CompatibilityError, match=r"needs gguf; .*pip install 'dspark\[gguf\]'"):
        Target.load(twins.gguf, device="cpu", dtype="bfloat16")


def test_wherever_a_directory_does(twins):
    layerless = load_without_layers(twins.gguf, device="cpu")
    whole = Target.load(twins.directory, device="cpu")
    assert torch.equal(layerless.parts().embedding_VH, whole.parts().embedding_VH)
    assert layerless.tokenizer.eos_token_id == 2
    tables = TargetTables.read(twins.gguf)
    assert (tables.num_layers, tables.architectures) == (LAYERS, ("LlamaForCausalLM",))
    assert torch.equal(tables.embedding_VH, whole.parts().embedding_VH)
    assert tables.name == str(twins.gguf)
    assert target_fingerprint(twins.gguf) == target_fingerprint(twins.gguf.parent)
    assert target_fingerprint(twins.gguf) != target_fingerprint(twins.directory)


def test_a_drafter_is_attached_beside_it(twins):
    target = Target.load(twins.gguf, device="cpu")
    assert not has_attached_drafter(twins.gguf)
    shape = {"intermediate_size": 32, "num_heads": 2, "num_kv_heads": 1}
    backbone = tiny_backbone(target.hidden_size, 2, **shape)
    drafter = tiny_dspark(target, taps=(0, 1), backbone=backbone, max_position_embeddings=160)
    save_attached(drafter, twins.gguf, dtype=None)
    assert (twins.gguf.parent / "dspark" / "config.json").is_file()
    for source in (twins.gguf, twins.gguf.parent):
        model = dspark.load(source, device="cpu")
        assert model.drafter is not None
        assert model.generate("how many", max_new_tokens=4).token_ids
    assert dspark.load(twins.gguf, "none", device="cpu").drafter is None


def test_which_file_a_directory_means(twins):
    folder = twins.gguf.parent
    assert gguf_file(folder) == twins.gguf
    assert gguf_file(twins.directory) is None
    (folder / "other.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"2 GGUF files \(other\.gguf, tiny\.gguf\); name"):
        gguf_file(folder)
    (folder / "model.safetensors").write_bytes(b"")  # an ordinary checkpoint with GGUFs beside it
    assert gguf_file(folder) is None
    with pytest.raises(CheckpointError, match=r"absent\.gguf does not exist"):
        Target.load(folder / "absent.gguf", device="cpu")


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize(
    ("size", "sentence"),
    [
        (0, "is no GGUF file"),
        (3, "is no GGUF file"),
        (20, "cut short in its header"),
        (400, "cut short in its header"),
        (-1000, r"is cut short \([\d,]+ of [\d,]+ bytes\); fetch it again"),
    ],
)
def test_a_file_cut_short(twins, size, sentence):
    cut(twins.gguf, size)
    with pytest.raises(CheckpointError, match=sentence):
        Target.load(twins.gguf, device="cpu")
    assert not list(cache_directory("gguf").glob("*"))


def test_every_cut_of_the_header_is_noticed(twins):
    whole = twins.gguf.read_bytes()
    end = GgufFile.open(twins.gguf).data_start
    for size in range(4, end - 64, 97):
        twins.gguf.write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            GgufFile.open(twins.gguf)


def test_what_the_loader_lacks_is_named(twins, tmp_path):
    strange = tmp_path / "strange.gguf"
    write_gguf(strange, twins.model, twins.tokenizer, architecture="rwkv7")
    with pytest.raises(CompatibilityError, match=r"architecture 'rwkv7', which transformers 5"):
        Target.load(strange, device="cpu")
    scaled = tmp_path / "scaled.gguf"
    factors = {"rope_freqs.weight": np.ones(4, np.float32)}
    write_gguf(scaled, twins.model, twins.tokenizer, extra_tensors=factors)
    with pytest.raises(CompatibilityError, match="scales its rotary positions"):
        Target.load(scaled, device="cpu")
    text = tmp_path / "text.gguf"
    text.write_text("not a model")
    with pytest.raises(CheckpointError, match="is no GGUF file"):
        Target.load(text, device="cpu")


def test_another_file_than_expected(twins):
    with pytest.raises(CheckpointError, match="is not the file it should be"):
        converted(twins.gguf, torch.float32, sha256="0" * 64)


def test_a_full_disk(twins, monkeypatch):
    monkeypatch.setattr(
        sources_gguf.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10})
    )
    with pytest.raises(CheckpointError, match=r"GB free, but the converted model takes"):
        Target.load(twins.gguf, device="cpu")
    assert not [p for p in cache_directory("gguf").iterdir() if p.is_dir()]


KILLED = """
import sys, time
from pathlib import Path
from dspark.sources.cache import new_entry
with new_entry(Path(sys.argv[1])) as fresh:
    (fresh / "half").write_text("half")
    print("begun", flush=True)
    time.sleep(60)
"""


def test_an_entry_survives_a_kill(twins):
    place = cache_directory("gguf") / "entry"
    command = [sys.executable, "-c", KILLED, str(place)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as run:
        assert run.stdout.read(5) == b"begun"
        run.send_signal(signal.SIGKILL)
    assert not place.exists()
    from dspark.sources.cache import new_entry

    with new_entry(place) as fresh:
        assert list(fresh.iterdir()) == []
        (fresh / "whole").write_text("whole")
    assert [p.name for p in place.iterdir()] == ["whole"]
    with new_entry(place) as fresh:
        assert fresh is None


def test_two_processes_make_one_entry(tmp_path):
    context = multiprocessing.get_context("spawn")
    started, turns = context.Event(), context.Queue()
    workers = [
        context.Process(target=make_entry, args=(str(tmp_path / "entry"), started, turns))
        for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    started.set()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    assert turns.get(timeout=10) == 1
    assert turns.empty()


@pytest.mark.real
def test_smollm2_gguf_is_the_model_that_transformers_reads():
    source = os.environ.get("DSPARK_REAL_GGUF")
    if source is None:
        pytest.skip("DSPARK_REAL_GGUF names no GGUF of SmolLM2-135M-Instruct")
    target = Target.load(source, device="cpu", dtype="float32")
    ids = target.tokenizer("<|im_start|>user\nHi<|im_end|>\n")["input_ids"]
    assert ids == [1, 4093, 198, 26843, 2, 198]
    assert target.eos_token_ids == {2}


def test_weights_of_other_shapes_than_the_header_says_are_refused(twins, tmp_path):
    model, _ = tiny_llama_with_tokenizer()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight = torch.nn.Parameter(torch.zeros(32, 48))
    path = write_gguf(tmp_path / "odd.gguf", model, twins.tokenizer)
    with pytest.raises(CompatibilityError, match=r"which transformers .* cannot load"):
        Target.load(path, device="cpu")
