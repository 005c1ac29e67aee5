"""llama.cpp's layout of drafters: written, read, refused; tests/benchmarks/test_peer.py runs it."""

import shutil

import pytest
import torch

from dspark.drafters.checkpoints.checkpoint import borrow_tables, load_drafter, save_gguf
from dspark.drafters.checkpoints.from_target import (
    TargetTables,
    refuse_other_tokens,
    tokenizer_fields,
)
from dspark.drafters.checkpoints.gguf_writer import spec_flags, to_gguf
from dspark.engine.loading import load
from dspark.errors import CheckpointError, CompatibilityError
from dspark.sources.gguf_file import Field, GgufFile, write_gguf
from dspark.targets.target import Target
from tests.helpers.checkpoints import save_published
from tests.helpers.drafters import tiny_backbone, tiny_dspark, tiny_eagle3
from tests.helpers.targets import tiny_qwen3

gguf = pytest.importorskip("gguf")

WIDTH, VOCAB, KNOWN = 64, 37, (0, 2, 3, 7, 11, 20, 30, 36)
NO_HEADS = {"markov_rank": 0, "confidence_head": False, "confidence_head_with_markov": False}
KINDS = {
    "dspark": {},
    "plain confidence": {"confidence_head_with_markov": False},
    "no confidence": {"confidence_head": False, "confidence_head_with_markov": False},
    "dflash from the anchor": NO_HEADS,
    "dflash": NO_HEADS | {"sample_from_anchor": False},
    "reduced": {"known": KNOWN},
    "1 + n": {"sample_from_anchor": False},
}
TOKENIZER = {
    "tokenizer.ggml.model": Field.of("gpt2"),
    "tokenizer.ggml.tokens": Field.of([f"t{i}" for i in range(VOCAB)]),
    "tokenizer.ggml.token_type": Field.of([1] * VOCAB),
}


@pytest.fixture(scope="module")
def target():
    return Target.from_model(
        tiny_qwen3(seed=0, vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=6)
    )


def dspark(target, **changes):
    backbone = changes.pop("backbone", {})
    shape = {"num_layers": 2, "num_heads": 8, "intermediate_size": 96, "head_dim": 8} | backbone
    drafter = tiny_dspark(
        target, taps=(0, 2, 4), backbone=tiny_backbone(WIDTH, 3, **shape), std=0.3, **changes
    )
    return drafter.to(torch.bfloat16).eval()


def eagle3(target, taps=(0, 2, 4), query_key_norms=False, **changes):
    backbone = tiny_backbone(WIDTH, len(taps), query_key_norms=query_key_norms, **changes)
    return tiny_eagle3(target, taps=taps, backbone=backbone, std=0.3).to(torch.bfloat16).eval()


def written(drafter, path, weight_type="bf16"):
    save_gguf(drafter, path, TOKENIZER, weight_type=weight_type)
    return load_drafter(path)


@pytest.mark.parametrize("kind", [*KINDS, "eagle3", "eagle3 with the residual's norm"])
def test_there_and_back_changes_nothing(target, tmp_path, kind):
    if kind in KINDS:
        drafter = dspark(target, **KINDS[kind])
    else:
        drafter = eagle3(target, norm_before_residual="residual" in kind)
    back = written(drafter, tmp_path / "out.gguf")
    before, after = drafter.state_dict(), back.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        mine = after[name]
        if name == "confidence_head.proj.weight" and kind == "plain confidence":
            assert mine[:, tensor.shape[1] :].eq(0).all()
            mine = mine[:, : tensor.shape[1]]
        assert mine.dtype == tensor.dtype
        assert torch.equal(mine, tensor), name
    same = ("backbone", "vocab_size", "target_layer_ids", "num_target_layers", "draft_vocab_size")
    for name in (*same, "max_position_embeddings"):
        assert getattr(back.config, name) == getattr(drafter.config, name)
    assert back.block_size == drafter.block_size
    if kind in KINDS:
        ours = (drafter.config.mask_token_id, drafter.config.sample_from_anchor)
        assert (back.config.mask_token_id, back.config.sample_from_anchor) == ours
    assert (back.own_embedding_VH is None, back.own_head_VH is None) == (True, kind != "reduced")


@pytest.mark.parametrize(("weight_type", "error"), [("f16", 1e-3), ("q8_0", 1e-2), ("bf16", 0)])
def test_matrices_are_stored_in_the_type_and_vectors_in_float32(
    target, tmp_path, weight_type, error
):
    drafter = dspark(target)
    path = tmp_path / "out.gguf"
    back = written(drafter, path, weight_type)
    reader = gguf.GGUFReader(path)
    types = {t.name: t.tensor_type.name for t in reader.tensors}
    assert types["fc.weight"] == types["blk.0.attn_q.weight"] == weight_type.upper()
    # The tables of the Markov head have 4 numbers a row, which no block of 32 holds.
    assert types["markov_w2.weight"] == {"q8_0": "F16"}.get(weight_type, weight_type.upper())
    assert {types[n] for n in types if "norm" in n or "conf" in n} == {"F32"}
    for name, tensor in drafter.state_dict().items():
        gap = (back.state_dict()[name].float() - tensor.float()).abs().max()
        assert gap <= error * tensor.float().abs().max(), name


def test_names_and_keys_are_those_that_llama_cpp_reads(target, tmp_path):
    path = tmp_path / "out.gguf"
    written(dspark(target, known=KNOWN), path)
    file = GgufFile.open(path)
    assert file.architecture == "dflash"
    layer = [
        "attn_norm",
        "attn_q",
        "attn_k",
        "attn_v",
        "attn_output",
        "attn_q_norm",
        "attn_k_norm",
        "ffn_norm",
        "ffn_gate",
        "ffn_up",
        "ffn_down",
    ]
    top = ["fc", "enc.output_norm", "output_norm", "output", "markov_w1", "markov_w2", "conf_proj"]
    names = {f"{n}.weight" for n in top} | {f"blk.{i}.{n}.weight" for i in (0, 1) for n in layer}
    assert set(file.tensors) == names | {"conf_proj.bias", "d2t"}
    assert file.tensor("d2t").tolist() == list(KNOWN)
    assert file.tensors["markov_w1.weight"].shape == (VOCAB, 4)
    assert file.tensors["markov_w2.weight"].shape == (len(KNOWN), 4)
    told = {k.removeprefix("dflash."): f.value for k, f in file.fields.items() if "dflash." in k}
    assert told.pop("attention.layer_norm_rms_epsilon") == pytest.approx(1e-6)
    assert told == {
        "vocab_size": VOCAB,
        "context_length": 40960,
        "embedding_length": WIDTH,
        "block_count": 2,
        "feed_forward_length": 96,
        "attention.head_count": 8,
        "attention.head_count_kv": 2,
        "attention.key_length": 8,
        "attention.value_length": 8,
        "rope.freq_base": 1e6,
        "rope.dimension_count": 8,
        "target_layers": [1, 3, 5],
        "block_size": 4,
        "sample_from_anchor": True,
        "has_confidence_head": True,
    }
    assert file.get("tokenizer.ggml.mask_token_id") == 3
    chain = eagle3(target)
    written(chain, path)
    file = GgufFile.open(path)
    assert file.architecture == "eagle3"
    # Its rotation pairs neighbours where ours pairs a head's halves.
    half = chain.config.backbone.head_dim // 2
    for kind in "qk":
        ours = chain.state_dict()[f"layers.0.self_attn.{kind}_proj.weight"]
        theirs = file.tensor(f"blk.0.attn_{kind}.weight")
        for head in range(0, len(ours), 2 * half):
            assert torch.equal(theirs[head : head + 2 * half : 2], ours[head : head + half])
            wanted = ours[head + half : head + 2 * half]
            assert torch.equal(theirs[head + 1 : head + 2 * half : 2], wanted)
    assert "blk.0.attn_norm_2.weight" in file.tensors
    assert file.get("eagle3.target_hidden_size") == WIDTH


def test_tables_of_its_own_are_written_both(target, tmp_path):
    drafter = dspark(target)
    drafter.own_embedding_VH = torch.randn(VOCAB, WIDTH)
    back = written(drafter, tmp_path / "out.gguf")
    assert torch.equal(back.own_embedding_VH, drafter.own_embedding_VH.bfloat16())
    assert torch.equal(back.own_head_VH, target.parts().head_VH.bfloat16())


def test_flags_draft_as_it_was_trained(target):
    assert spec_flags(dspark(target)) == "--spec-type draft-dspark --spec-draft-n-max 4"
    anchor = dspark(target, **NO_HEADS)
    assert spec_flags(anchor) == "--spec-type draft-dspark --spec-draft-n-max 4"
    without = dspark(target, **NO_HEADS, sample_from_anchor=False)
    assert spec_flags(without) == "--spec-type draft-dflash --spec-draft-n-max 3"
    assert spec_flags(eagle3(target)) == "--spec-type draft-eagle3 --spec-draft-n-max 4"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"markov_head_type": "gated"}, "a gated Markov head"),
        ({"markov_head_type": "rnn"}, "a rnn Markov head"),
        (NO_HEADS | {"confidence_head": True}, "a confidence head without a Markov head"),
        ({"mask_token_id": None}, "a learned mask embedding"),
        ({"block_size": 513}, "block_size 513"),
        ({"backbone": {"attention_bias": True}}, "attention_bias"),
        ({"backbone": {"sliding_layers": (0,), "sliding_window": 5}}, "sliding_window 5"),
        ({"num_target_layers": 5}, "last layer (4)"),
        ({"extra": {"target_architectures": ["Gemma3ForCausalLM"]}}, "Gemma3ForCausalLM"),
    ],
)
def test_what_llama_cpp_cannot_run_is_refused_by_name(target, tmp_path, changes, words):
    path = tmp_path / "out.gguf"
    with pytest.raises(CompatibilityError) as caught:
        written(dspark(target, **changes), path)
    assert words in str(caught.value)
    assert not path.exists()


@pytest.mark.parametrize(
    ("drafter", "words"),
    [
        ({"query_key_norms": True}, "Qwen3's layer"),
        ({"taps": (1, 3)}, "2 captured layers"),
    ],
)
def test_eagle3_needs_llamas_layer_and_three_taps(target, tmp_path, drafter, words):
    with pytest.raises(CompatibilityError, match=words):
        written(eagle3(target, **drafter), tmp_path / "out.gguf")


def changed(path, drafter, fields=None, tensors=None):
    architecture, own, state = to_gguf(drafter, {"num_target_layers": 6})
    own = {**TOKENIZER, **own, **(fields or {})}
    own = {key: field for key, field in own.items() if field is not None}
    write_gguf(path, architecture, own, state | (tensors or {}), "bf16")
    return path


@pytest.mark.parametrize(
    ("fields", "tensors", "error", "words"),
    [
        ({"tokenizer.ggml.mask_token_id": None}, {}, CheckpointError, "mask_token_id"),
        ({"dflash.block_size": None}, {}, CheckpointError, "lacks dflash.block_size"),
        ({"dflash.attention.sliding_window": Field.of(8)}, {}, CompatibilityError, "window"),
        ({"dflash.attention.causal": Field.of(True)}, {}, CompatibilityError, "causal"),
        ({"dflash.rope.dimension_count": Field.of(4)}, {}, CompatibilityError, "turns 4 of 8"),
        ({"dspark.config": Field.of("[")}, {}, CheckpointError, "no JSON"),
        ({}, {"blk.0.attn_sinks.weight": torch.zeros(8)}, CompatibilityError, "attn_sinks"),
        ({}, {"d2t": torch.tensor([0, VOCAB])}, CheckpointError, "beyond its vocabulary"),
        ({}, {"fc.weight": torch.zeros(4, 4)}, CheckpointError, "wrong shape"),
    ],
)
def test_a_file_that_is_not_understood_is_refused(target, tmp_path, fields, tensors, error, words):
    path = changed(tmp_path / "out.gguf", dspark(target), fields, tensors)
    with pytest.raises(error, match=words):
        load_drafter(path)


def test_a_file_of_another_writer_needs_no_key_of_ours(target, tmp_path):
    drafter = dspark(target)
    fields = {"dspark.config": None, "dflash.vocab_size": None}
    back = load_drafter(changed(tmp_path / "out.gguf", drafter, fields))
    assert back.config.num_target_layers == 5  # the fewest that its captured layers allow
    assert back.config.vocab_size == VOCAB
    assert all(torch.equal(x, back.state_dict()[n]) for n, x in drafter.state_dict().items())


def test_an_eagle3_file_from_before_rows_were_paired_is_refused_and_written_over(target, tmp_path):
    drafter, path = eagle3(target), tmp_path / "out.gguf"
    load_drafter(changed(path, drafter))
    changed(path, drafter, {"dspark.format_version": None})
    with pytest.raises(CompatibilityError, match=r"an earlier version of dspark.*: dspark convert"):
        load_drafter(path)
    assert written(drafter, path).config.backbone == drafter.config.backbone
    # Other writers' files have neither key; a DFlash file has no paired rows.
    load_drafter(changed(path, drafter, {"dspark.format_version": None, "dspark.config": None}))
    load_drafter(changed(path, dspark(target), {"dspark.format_version": None}))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_a_file_cut_short_is_one_sentence(target, tmp_path, share):
    path = tmp_path / "out.gguf"
    written(dspark(target), path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CheckpointError, match=r"is no GGUF file|cut short"):
        load_drafter(path)


def test_another_model_is_neither_read_nor_written_over(target, tmp_path):
    path = tmp_path / "out.gguf"
    write_gguf(path, "llama", TOKENIZER, {"token_embd.weight": torch.zeros(VOCAB, 32)}, "f16")
    with pytest.raises(CompatibilityError, match="a model of architecture llama, which is no draf"):
        load_drafter(path)
    with pytest.raises(CheckpointError, match="no drafter, which would be lost"):
        save_gguf(dspark(target), path, TOKENIZER)


# With files of a target


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    from dspark.data.templates import train_tokenizer

    root = tmp_path_factory.mktemp("gguf")
    tokenizer = train_tokenizer(["how many apples are left", "a table for two"] * 4, 300)
    model = tiny_qwen3(
        seed=1,
        vocab_size=302,
        hidden_size=WIDTH,
        num_hidden_layers=6,
        tie_word_embeddings=True,
        eos_token_id=2,
    )
    model.save_pretrained(root / "target")
    tokenizer.save_pretrained(root / "target")
    save_published(dspark(Target.from_model(model)), root / "drafter", dtype=None)
    return root


def test_a_directorys_tokenizer_is_told_in_full(files):
    fields = {k: f.value for k, f in tokenizer_fields(files / "target", 302, offline=True).items()}
    vocab = Target.load(files / "target", offline=True).tokenizer.get_vocab()
    tokens = fields["tokenizer.ggml.tokens"]
    assert all(tokens[id_] == text for text, id_ in vocab.items())
    known = len(vocab)
    assert tokens[known:] == [f"[PAD{i}]" for i in range(known, 302)]
    assert fields["tokenizer.ggml.token_type"] == [3] * 4 + [1] * (known - 4) + [5] * (302 - known)
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "smollm")
    assert fields["tokenizer.ggml.eos_token_id"] == 2
    assert fields["tokenizer.ggml.padding_token_id"] == 0


def test_tokenizers_that_do_not_fit_are_one_sentence(files, tmp_path):
    with pytest.raises(CompatibilityError, match="vocab_size is 200"):
        tokenizer_fields(files / "target", 200, offline=True)
    other = shutil.copytree(files / "target", tmp_path / "other")
    path = other / "tokenizer.json"
    path.write_text(path.read_text().replace(r"\\d", r"\\s"))
    with pytest.raises(CompatibilityError, match="name the target's GGUF file"):
        tokenizer_fields(other, 302, offline=True)
    path.unlink()
    with pytest.raises(CompatibilityError, match=r"has no tokenizer\.json"):
        tokenizer_fields(other, 302, offline=True)


def test_a_gguf_target_lends_tables_layers_and_tokenizer(files, tmp_path):
    from tests.helpers.gguf_qwen3 import write_qwen3_target

    path = tmp_path / "target.gguf"
    write_qwen3_target(files / "target", path, "f16")
    plain, tables = TargetTables.read(files / "target"), TargetTables.read(path)
    assert tables.num_layers == plain.num_layers == 6
    torch.testing.assert_close(tables.head_VH.float(), plain.head_VH, rtol=1e-3, atol=1e-3)
    drafter = load_drafter(files / "drafter")
    drafter.own_embedding_VH = drafter.own_head_VH = None
    borrow_tables(drafter, tables)
    save_gguf(drafter, tmp_path / "out.gguf", tokenizer_fields(path, 302, offline=True))
    fields = GgufFile.open(tmp_path / "out.gguf").fields
    for key, field in tokenizer_fields(files / "target", 302, offline=True).items():
        assert fields[key] == field


def test_a_drafter_of_another_tokenizer_is_refused(files, tmp_path):
    path = tmp_path / "out.gguf"
    drafter = load_drafter(files / "drafter")
    borrow_tables(drafter, TargetTables.read(files / "target"))
    fields = tokenizer_fields(files / "target", 302, offline=True)
    save_gguf(drafter, path, fields)
    vocab = load(files / "target", path, offline=True).target.tokenizer.get_vocab()
    refuse_other_tokens(path, vocab)
    tokens = list(fields["tokenizer.ggml.tokens"].value)
    tokens[270], tokens[271] = tokens[271], tokens[270]
    save_gguf(drafter, path, {**fields, "tokenizer.ggml.tokens": Field.of(tokens)})
    with pytest.raises(CompatibilityError, match="another tokenizer than the target's: token 270"):
        load(files / "target", path, offline=True)
