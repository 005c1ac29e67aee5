"""Drafters and a checkpoint layout that another package brings, by entry points alone."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from dspark.cli.main import main
from dspark.drafters.checkpoints.checkpoint import load_drafter, save, save_attached
from dspark.drafters.checkpoints.registry import kinds, layouts, make_drafter
from dspark.drafters.ngram import NgramDrafter
from dspark.engine.loading import load_draft
from dspark.engine.model import Model
from dspark.errors import CheckpointError, CompatibilityError, DSparkWarning
from dspark.request import Request, SamplingParams
from dspark.targets.target import Target
from tests.helpers import outside
from tests.helpers.checkpoints import save_published
from tests.helpers.drafters import tiny_dspark
from tests.helpers.targets import tiny_qwen3

ENTRY_POINTS = """\
[dspark.drafters]
repeat = tests.helpers.outside:REPEAT
other = tests.helpers.outside:OTHER
ngram = tests.helpers.outside:REPEAT

[dspark.checkpoints]
flat = tests.helpers.outside:FLAT
"""


def install(monkeypatch, folder, entry_points):
    """What pip leaves of a package: its metadata, in a folder on the path."""
    info = folder / "outside-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entry_points)
    monkeypatch.syspath_prepend(folder)


@pytest.fixture
def installed(monkeypatch, tmp_path):
    install(monkeypatch, tmp_path / "site", ENTRY_POINTS)


@pytest.fixture(scope="module")
def target():
    return Target.from_model(tiny_qwen3(seed=0, vocab_size=37, num_hidden_layers=6))


def run(model, ids):
    request = Request(ids, SamplingParams(max_new_tokens=16, ignore_eos=True))
    [output] = model.engine([request], schedule="fixed" if model.drafter else None).run([request])
    return output


def test_a_drafter_without_weights_is_used_by_name(installed, target):
    model = load_draft(target, "repeat")
    assert isinstance(model.drafter, outside.RepeatDrafter)
    plain, ours = run(Model(target), (5, 6, 7)), run(model, (5, 6, 7))
    assert ours.token_ids == plain.token_ids
    assert ours.stats.drafted > 0


def test_a_built_in_name_is_not_taken(installed):
    assert isinstance(make_drafter("ngram"), NgramDrafter)


def test_a_drafter_with_weights_is_attached_and_read(installed, target, tmp_path):
    drafter = tiny_dspark(target, taps=(0, 2, 4), kind=outside.OtherDrafter)
    drafter.config = outside.OtherConfig(**vars(drafter.config))
    save_attached(drafter, tmp_path, dtype=None)
    back = load_drafter(tmp_path / "dspark")
    assert type(back) is outside.OtherDrafter
    assert replace(back.config, extra={}) == drafter.config
    assert all(torch.equal(x, back.state_dict()[n]) for n, x in drafter.state_dict().items())


def test_a_layout_is_written_and_read(installed, target, tmp_path):
    drafter = tiny_dspark(target, taps=(0, 2, 4))
    save(drafter, tmp_path, "flat", dtype=None)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["FlatModel"]
    path = tmp_path / "model.safetensors"
    save_file({f"drafter.{name}": x for name, x in load_file(path).items()}, path)
    back = load_drafter(tmp_path)
    assert replace(back.config, extra={}) == drafter.config
    assert all(torch.equal(x, back.state_dict()[n]) for n, x in drafter.state_dict().items())
    assert torch.equal(back.own_head_VH, drafter.borrowed.head_VH)


def test_convert_writes_it(installed, target, tmp_path, capsys):
    save_published(tiny_dspark(target, taps=(0, 2, 4)), tmp_path / "published", dtype=None)
    words = ["convert", str(tmp_path / "published"), str(tmp_path / "flat"), "--to"]
    assert main([*words, "flat"]) == 0
    assert load_drafter(tmp_path / "flat").config == load_drafter(tmp_path / "published").config
    assert main([*words, "flatter"]) == 2
    assert "deepspec" in capsys.readouterr().err


def test_without_the_package_its_files_are_refused(monkeypatch, target, tmp_path):
    with monkeypatch.context() as patch:
        install(patch, tmp_path / "site", ENTRY_POINTS)
        save(tiny_dspark(target, taps=(0, 2, 4)), tmp_path / "flat", "flat", dtype=None)
    assert "flat" not in layouts()
    with pytest.raises(CompatibilityError, match="FlatModel, which is no drafter"):
        load_drafter(tmp_path / "flat")
    with pytest.raises(CheckpointError, match="repeat does not exist"):
        load_draft(target, "repeat")


def test_a_broken_package_is_left_out_with_a_warning(monkeypatch, tmp_path):
    broken = "[dspark.drafters]\nlost = nowhere.at_all:KIND\nwrong = json:dumps\n"
    install(monkeypatch, tmp_path, broken)
    with pytest.warns(DSparkWarning) as said:
        found = kinds()
    assert {"dspark", "deepseek_v4", "eagle3", "ngram"} == set(found)
    assert ["lost" in str(w.message) for w in said] == [True, False]
    assert all("is left out" in str(w.message) for w in said)
