"""What speculators 0.9 writes is read and computed as by its own forward, and the other way round.

The files are that library's (tests/golden/speculators/make.py). Written files are read by the
library itself where DSPARK_SPECULATORS names its Python.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dspark.drafters.checkpoints.checkpoint import (
    borrow_tables,
    load_drafter,
    save_speculators,
)
from dspark.drafters.checkpoints.registry import read_config
from dspark.drafters.checkpoints.target_tables import TargetTables
from dspark.errors import CompatibilityError

GOLDEN = Path(__file__).parents[2] / "golden" / "speculators"
BLOCKS = ("dspark", "dspark_gated", "dspark_rnn", "dspark_llama", "dflash", "dflash_anchor")
CHAINS = ("eagle3", "eagle3_llama")


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
    for anchor in (1, 6, len(tokens) - 1 - passes):
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


def test_p_eagle_is_refused_by_name():
    data = json.loads((GOLDEN / "peagle" / "config.json").read_text())
    with pytest.raises(CompatibilityError, match="peagle"):
        read_config(data, "config.json")


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
