"""What speculators 0.9 writes is read and computed as by its own forward, and the other way round.

The files are that library's (tests/golden/speculators/make.py). Written files are read by the
library itself where DSPARK_SPECULATORS names its Python.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dspark.drafters.checkpoints.checkpoint import (
    borrow_tables,
    load_drafter,
    save_attached,
    save_gguf,
    save_published,
    save_speculators,
)
from dspark.drafters.checkpoints.registry import read_config
from dspark.drafters.checkpoints.target_tables import TargetTables
from dspark.errors import CompatibilityError

GOLDEN = Path(__file__).parents[2] / "golden" / "speculators"
BLOCKS = ("dspark", "dspark_gated", "dspark_rnn", "dspark_llama", "dflash", "dflash_anchor")
CHAINS = ("eagle3", "eagle3_llama", "peagle")


def save_gguf_of(drafter, path):
    save_gguf(drafter, path, {})


def bound(folder):
    drafter = load_drafter(folder)
    borrow_tables(drafter, TargetTables.read(GOLDEN / "target"))
    return drafter


@pytest.fixture(params=["as_read", "as_written"])
def drafter_of(request, tmp_path):
    """The drafter of a golden file, or of what is written of it."""

    def make(name):
        drafter = bound(GOLDEN / name)
        if request.param == "as_read":
            return drafter
        save_speculators(drafter, tmp_path, dtype=None)
        return bound(tmp_path)

    return make


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_those_of_the_library(name, drafter_of, draft):
    drafter, wanted = drafter_of(name), load_file(GOLDEN / name / "forward.safetensors")
    tokens, unused = wanted["tokens"].tolist(), drafter.config.unused_slots
    for n, anchor in enumerate(wanted["anchors"].tolist()):
        draw, proposal = draft(
            drafter,
            [wanted["features"][:anchor]],
            [tokens[anchor]],
            tokens=[tokens[:anchor]],
            forced=tokens[anchor + 1 : anchor + 1 + drafter.block_size],
        )
        logits = torch.cat(draw.logits)
        torch.testing.assert_close(logits, wanted["logits"][n, unused:], atol=1e-5, rtol=1e-5)
        if "confidence_logits" in wanted:
            found = proposal.confidence_logits_RK[0]
            theirs = wanted["confidence_logits"][n, unused:]
            torch.testing.assert_close(found, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CHAINS)
def test_chains_are_those_of_the_library(name, drafter_of, draft):
    drafter, wanted = drafter_of(name), load_file(GOLDEN / name / "forward.safetensors")
    tokens, passes = wanted["tokens"].tolist(), drafter.block_size
    assert passes == len(wanted["logits"]) == 3
    # P-EAGLE's forward draws which rows of its later depths it computes.
    there = wanted.get("there", torch.ones(passes, len(tokens) - 1)).bool().all(0)
    whole = [place + 1 for place in there[: len(tokens) - 1 - passes].nonzero().flatten().tolist()]
    assert len(whole) > 8
    for anchor in (whole[0], whole[5], whole[-1]):
        draw, _ = draft(
            drafter,
            [wanted["features"][:anchor]],
            [tokens[anchor]],
            tokens=[tokens[:anchor]],
            forced=tokens[anchor + 1 : anchor + 1 + passes],
        )
        theirs = wanted["logits"][:, anchor - 1]
        torch.testing.assert_close(torch.cat(draw.logits), theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", BLOCKS)
def test_control_a_block_of_another_layout_differs(name, draft):
    drafter, wanted = bound(GOLDEN / name), load_file(GOLDEN / name / "forward.safetensors")
    anchor, tokens = int(wanted["anchors"][0]), wanted["tokens"].tolist()
    draw, _ = draft(drafter, [wanted["features"][:anchor]], [tokens[anchor] ^ 1])
    first = wanted["logits"][0, drafter.config.unused_slots]
    assert (draw.logits[0][0] - first).abs().max() > 1e-2


def test_p_eagle_of_more_layers_is_refused():
    data = json.loads((GOLDEN / "peagle" / "config.json").read_text())
    data["transformer_layer_config"]["num_hidden_layers"] = 4
    with pytest.raises(CompatibilityError, match="num_hidden_layers is 4"):
        read_config(data, "config.json")


@pytest.mark.parametrize("save", [save_published, save_gguf_of])
def test_p_eagle_has_no_place_in_other_engines_files(save, tmp_path):
    with pytest.raises(CompatibilityError, match="all drafts in one pass"):
        save(bound(GOLDEN / "peagle"), tmp_path / "out.gguf")


def test_p_eagle_travels_attached(tmp_path, draft):
    shutil.copytree(GOLDEN / "target", tmp_path / "target")
    drafter = bound(GOLDEN / "peagle")
    save_attached(drafter, tmp_path / "target", dtype=None)
    back = load_drafter(tmp_path / "target")
    borrow_tables(back, TargetTables.read(GOLDEN / "target"))
    wanted = load_file(GOLDEN / "peagle" / "forward.safetensors")
    tokens, given = wanted["tokens"].tolist(), wanted["features"][:6]
    one, other = (draft(d, [given], [tokens[6]], tokens=[tokens[:6]])[0] for d in (drafter, back))
    assert back.config.mask_token_id == 47
    assert all(torch.equal(a, b) for a, b in zip(one.logits, other.logits, strict=True))


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """How far the library's forward of each written file is from the golden one, by tensor."""
    folder = tmp_path_factory.mktemp("written")
    for name in (*BLOCKS, *CHAINS):
        save_speculators(bound(GOLDEN / name), folder / name, dtype=None)
    script = Path(__file__).with_name("read_by_speculators.py")
    done = subprocess.run(
        [os.environ["DSPARK_SPECULATORS"], script, GOLDEN, folder, *BLOCKS, *CHAINS],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.peer
@pytest.mark.skipif("DSPARK_SPECULATORS" not in os.environ, reason="DSPARK_SPECULATORS names none")
@pytest.mark.parametrize("name", [*BLOCKS, *CHAINS])
def test_the_library_reads_what_is_written_and_computes_the_same(name, library):
    assert "logits" in library[name]
    assert max(library[name].values()) <= 1e-5
