import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file


def tensors(directory):
    return load_file(directory / "model.safetensors")


def config(directory):
    return json.loads((directory / "config.json").read_text())


def same_tensors(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_there_and_back_changes_nothing(dspark, pair, tmp_path):
    first = dspark("convert", pair.drafter, tmp_path / "a", "--to", "speculators", "--json")
    assert first.status == 0
    stored = tensors(tmp_path / "a")
    size = sum(path.stat().st_size for path in (tmp_path / "a").iterdir())
    assert first.json == {"format": "speculators", "tensors": len(stored), "bytes": size}
    again = dspark("convert", tmp_path / "a", tmp_path / "b", "--to", "deepspec")
    assert again.status == 0
    assert f"{len(stored)} tensors" in again.out
    assert same_tensors(tensors(pair.drafter), tensors(tmp_path / "b"))
    assert config(pair.drafter) == config(tmp_path / "b")


def test_attached_leaves_out_what_the_target_has(dspark, pair, tmp_path):
    target = shutil.copytree(pair.target, tmp_path / "target")
    result = dspark("convert", pair.drafter, target, "--to", "attached", "--json")
    assert result.json["format"] == "attached"
    attached = tensors(target / "dspark")
    left_out = set(tensors(pair.drafter)) - set(attached)
    assert left_out == {"embed_tokens.weight", "lm_head.weight"}
    assert same_tensors(attached, tensors(pair.attached / "dspark"))
    words = ("--max-new-tokens", 8, "--prompt", "a table", "--schedule", "fixed", "--json")
    one = dspark("generate", target, *words).json
    two = dspark("generate", pair.target, "--draft", pair.drafter, *words).json
    assert one["outputs"] == two["outputs"]
    assert one["accepted"] == two["accepted"]


def test_an_attached_drafter_takes_the_tables_of_its_target(dspark, pair, tmp_path):
    words = ("convert", pair.attached, tmp_path / "out", "--to", "deepspec")
    assert dspark(*words).status == 0
    assert same_tensors(tensors(pair.drafter), tensors(tmp_path / "out"))


def test_a_target_lends_what_the_source_lacks(dspark, pair, tmp_path):
    words = ("convert", pair.attached / "dspark", tmp_path / "out", "--to", "deepspec")
    refused = dspark(*words)
    assert refused.status == 2
    assert "--target" in refused.err
    assert not (tmp_path / "out").exists()
    assert dspark(*words, "--target", pair.target).status == 0
    assert same_tensors(tensors(pair.drafter), tensors(tmp_path / "out"))
    assert config(tmp_path / "out")["target_model_name_or_path"] == str(pair.target)


def test_the_dtype_may_be_changed(dspark, pair, tmp_path):
    words = ("convert", pair.drafter, tmp_path, "--to", "deepspec", "--dtype", "bfloat16")
    assert dspark(*words).status == 0
    assert {tensor.dtype for tensor in tensors(tmp_path).values()} == {torch.bfloat16}
    assert config(tmp_path)["dtype"] == "bfloat16"


def test_a_target_that_does_not_fit_is_status_1(dspark, pair, wide_pair, tmp_path):
    words = ("convert", pair.drafter, tmp_path / "out", "--to", "deepspec")
    result = dspark(*words, "--target", wide_pair.target)
    assert result.status == 1
    assert "hidden_size" in result.err
    assert result.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_a_layout_cannot_carry_is_status_1(dspark, pair, tmp_path):
    source = shutil.copytree(pair.drafter, tmp_path / "source")
    changed = config(source) | {"sample_from_anchor": False}
    (source / "config.json").write_text(json.dumps(changed))
    result = dspark("convert", source, tmp_path / "out", "--to", "deepspec")
    assert result.status == 1
    assert "sample_from_anchor false" in result.err


@pytest.mark.parametrize("length", [0, 100])
def test_a_damaged_source_leaves_the_destination_alone(dspark, pair, tmp_path, length):
    source = shutil.copytree(pair.drafter, tmp_path / "source")
    destination = shutil.copytree(pair.drafter, tmp_path / "destination")
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:length])
    result = dspark("convert", source, destination, "--to", "speculators")
    assert result.status == 1
    assert "damaged or cut short" in result.err
    assert same_tensors(tensors(pair.drafter), tensors(destination))
    assert config(pair.drafter) == config(destination)


def test_a_destination_that_is_no_target_is_status_1(dspark, pair, tmp_path):
    result = dspark("convert", pair.drafter, tmp_path, "--to", "attached")
    assert result.status == 1
    assert "has no config.json; give a target's directory" in result.err
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 4}')
    result = dspark("convert", pair.drafter, tmp_path, "--to", "attached")
    assert "embed_tokens.weight" in result.err


def test_a_gguf_file_by_the_name_of_a_shipped_pair(dspark, tmp_path):
    pytest.importorskip("gguf")
    path = tmp_path / "bundled.gguf"
    result = dspark("convert", "bundled", path, "--to", "gguf", "--json")
    assert result.json["bytes"] == path.stat().st_size > 1_000_000


def test_a_gguf_file_drafts_like_its_source(dspark, pair, tmp_path):
    pytest.importorskip("gguf")
    path = tmp_path / "out.gguf"
    words = ("convert", pair.drafter, path, "--to", "gguf", "--target", pair.target)
    result = dspark(*words, "--type", "f16", "--json")
    assert result.json["bytes"] == path.stat().st_size
    assert result.json["llama_cpp"] == f"-md {path} --spec-type draft-dspark --spec-draft-n-max 4"
    words = ("--max-new-tokens", 8, "--prompt", "a table", "--json")
    one = dspark("generate", pair.target, "--draft", path, *words).json
    two = dspark("generate", pair.target, "--draft", pair.drafter, *words).json
    assert one["outputs"] == two["outputs"]
    words = ("convert", path, tmp_path / "back", "--to", "attached", "--target", pair.target)
    assert dspark(*words[:-2]).status == 1  # `back` is no target's directory


def test_a_gguf_file_goes_to_no_target_of_other_tokens(dspark, pair, wide_pair, tmp_path):
    pytest.importorskip("gguf")
    path, out = tmp_path / "draft.gguf", tmp_path / "out.gguf"
    words = ("convert", pair.drafter, path, "--to", "gguf", "--target", pair.target)
    assert dspark(*words).status == 0
    other = shutil.copytree(pair.target, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    one, two = list(vocab)[-2:]
    vocab[one], vocab[two] = vocab[two], vocab[one]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    for target, sentence in ((other, "another tokenizer"), (wide_pair.target, "hidden_size")):
        result = dspark("convert", path, out, "--to", "gguf", "--target", target)
        assert result.status == 1
        assert sentence in result.err
        assert result.err.count("\n") == 1
        assert not out.exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("out.gguf", "--to", "gguf"), "--target"),
        (("out", "--to", "gguf", "--target", "bundled"), "must end in .gguf"),
        (("out.gguf", "--to", "gguf", "--target", "bundled", "--dtype", "float16"), "--type"),
        (("out", "--to", "deepspec", "--type", "f16"), "for --to gguf only"),
    ],
)
def test_options_without_effect_are_usage_errors(dspark, pair, tmp_path, words, sentence):
    result = dspark("convert", pair.drafter, tmp_path / words[0], *words[1:])
    assert result.status == 2
    assert sentence in result.err
    assert result.err.count("\n") == 1
    assert not (tmp_path / words[0]).exists()


def test_sglang_gets_a_dspark_drafter_as_published_and_its_arguments(dspark, pair, tmp_path):
    result = dspark("convert", pair.drafter, tmp_path / "out", "--to", "sglang", "--json")
    assert result.status == 0
    assert result.json["format"] == "sglang"
    assert f"--speculative-draft-model-path {tmp_path / 'out'}" in result.json["sglang"]
    assert "--speculative-algorithm DSPARK" in result.json["sglang"]
    assert config(tmp_path / "out") == config(pair.drafter)
    assert same_tensors(tensors(pair.drafter), tensors(tmp_path / "out"))


@pytest.mark.parametrize("shifts", [False, True])
def test_sglang_gets_temperatures_of_a_calibration_without_shifts(dspark, pair, tmp_path, shifts):
    from dspark.drafters.checkpoints.checkpoint import load_drafter
    from dspark.scheduling.calibration import Rounds
    from dspark.scheduling.calibration_file import Calibration, calibrate

    source = shutil.copytree(pair.drafter, tmp_path / "drafter")
    drafts = load_drafter(source).block_size
    logits = [[1.0 - 0.01 * (n % 7)] * drafts for n in range(120)]
    kept = [n % (drafts + 1) for n in range(120)]
    rounds = Rounds.of(logits, kept, [drafts] * 120)
    entry = calibrate(rounds, "token", "sampled", shifts=shifts)
    Calibration((entry,)).save(source / "calibration.json")
    result = dspark("convert", source, tmp_path / "out", "--to", "sglang")
    assert result.status == 0
    file = tmp_path / "out" / "sts_temperatures.json"
    assert file.is_file() is not shifts
    assert (str(file) in result.out) is not shifts
    assert ("--temperatures-only" in " ".join(result.out.split())) is shifts
