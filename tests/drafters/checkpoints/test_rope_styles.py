"""`rope_theta` in the old and the new place of config.json, for every reader; never a default."""

import json

import pytest

from dspark.drafters.checkpoints.checkpoint import load_drafter, save_attached
from dspark.errors import CheckpointError
from tests.helpers.checkpoints import save_published, save_speculators

THETA = 54321.0
STYLES = {
    "new": {"rope_parameters": {"rope_type": "default", "rope_theta": THETA}},
    "old": {"rope_theta": THETA},
    "old, whole number": {"rope_theta": int(THETA)},
    "old, rope_scaling null": {"rope_theta": THETA, "rope_scaling": None},
    "old, rope_scaling default": {"rope_theta": THETA, "rope_scaling": {"type": "default"}},
    "both": {"rope_parameters": {"rope_theta": THETA}, "rope_theta": 10000.0},
    "new without theta": {"rope_parameters": {"rope_type": "default"}, "rope_theta": THETA},
}
PLAIN = ("dspark", "dflash", "eagle3", "legacy", "speculators dspark", "speculators eagle3")


@pytest.fixture
def write(make_drafter, make_eagle3, make_eagle3_layer, tmp_path):
    """Write a drafter as a reader wants it, with its rope fields replaced; its directory."""

    def plain(reader):
        directory = tmp_path / "dspark"
        if reader.endswith("dspark"):
            drafter = make_drafter()
        elif reader == "dflash":
            drafter = make_drafter(markov_rank=0, confidence_head=False, sample_from_anchor=False)
        else:
            drafter = make_eagle3_layer("llama") if reader == "legacy" else make_eagle3()
        if reader.startswith("speculators"):
            save_speculators(drafter, directory)
        else:
            save_attached(drafter, tmp_path)
        return directory

    def gemma4(reader):
        save_published(make_eagle3_layer("gemma4"), tmp_path)
        return tmp_path

    def run(reader, rope):
        directory = (gemma4 if reader == "gemma4" else plain)(reader)
        path = directory / "config.json"
        data = json.loads(path.read_text())
        if reader == "dflash":
            data["architectures"] = ["DFlashDraftModel"]
            data["dflash_config"] = {"target_layer_ids": data.pop("target_layer_ids")}
        layers = data.get("transformer_layer_config", data)
        del layers["rope_parameters"]
        layers |= rope
        path.write_text(json.dumps(data))
        return directory

    return run


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("reader", PLAIN)
def test_every_reader_finds_theta_in_every_style(write, reader, style):
    assert load_drafter(write(reader, STYLES[style])).config.backbone.rope_theta == THETA


@pytest.mark.parametrize("rope", [{}, {"rope_theta": None}, {"rope_parameters": {}}])
@pytest.mark.parametrize("reader", PLAIN)
def test_no_reader_takes_a_default(write, reader, rope):
    with pytest.raises(CheckpointError, match="rope_theta None"):
        load_drafter(write(reader, rope))


def test_gemma4_has_a_theta_for_each_kind_of_layer(write):
    ropes = {
        "full_attention": {"rope_type": "default", "rope_theta": THETA},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }
    directory = write("gemma4", {"rope_parameters": ropes})
    assert load_drafter(directory).config.backbone.rope_theta == THETA


@pytest.mark.parametrize("rope", [{"rope_theta": THETA}, STYLES["new"]])
def test_gemma4_has_no_older_style(write, rope):
    """One theta for all layers would not say whose it is."""
    with pytest.raises(CheckpointError, match="rope_parameters None for full_attention"):
        load_drafter(write("gemma4", rope))
