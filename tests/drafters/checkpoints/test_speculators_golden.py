"""What speculators 0.9 writes is read and computed as by its own forward, and the other way round.

The files are that library's (tests/golden/speculators/make.py). Written files are read by the
library itself where DSPARK_SPECULATORS names its Python.
"""

import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import scaled_dot_product_attention

from dspark.drafters.checkpoints.checkpoint import (
    borrow_tables,
    load_drafter,
    save,
    save_attached,
    save_gguf,
)
from dspark.drafters.checkpoints.from_target import TargetTables
from dspark.drafters.checkpoints.registry import SGLANG, read_config
from dspark.drafters.eagle3 import Eagle3Weights
from dspark.drafters.layers import rotary
from dspark.errors import CompatibilityError
from tests.helpers.checkpoints import save_published, save_speculators

GOLDEN = Path(__file__).parents[2] / "golden" / "speculators"
BLOCKS = ("dspark", "dspark_gated", "dspark_rnn", "dspark_llama", "dflash", "dflash_anchor")
CHAINS = ("eagle3", "eagle3_llama", "eagle3_deep", "peagle", "peagle_deep", "mtp")


def save_gguf_of(drafter, path):
    save_gguf(drafter, path, {})


def save_sglang(drafter, path):
    save(drafter, path, SGLANG)


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
    # mtp's forward runs its later passes over the whole context anew, which no engine does.
    logits = wanted.get("chains", wanted["logits"])
    assert passes == len(logits) == 3
    # P-EAGLE's forward draws which rows of its later depths it computes.
    there = wanted.get("there", torch.ones(passes, len(tokens) - 1)).bool().all(0)
    there = there[: len(tokens) - 1 - passes]
    whole = [place + 1 for place in there.nonzero().flatten().tolist()]
    assert len(whole) > 8
    for anchor in (whole[0], whole[5], whole[-1]):
        draw, _ = draft(
            drafter,
            [wanted["features"][:anchor]],
            [tokens[anchor]],
            tokens=[tokens[:anchor]],
            forced=tokens[anchor + 1 : anchor + 1 + passes],
        )
        theirs = logits[:, anchor - 1]
        torch.testing.assert_close(torch.cat(draw.logits), theirs, atol=1e-5, rtol=1e-5)


def test_passes_of_mtp_over_a_whole_context_are_those_of_the_librarys_forward(drafter_of):
    drafter, wanted = drafter_of("mtp"), load_file(GOLDEN / "mtp" / "forward.safetensors")
    weights, count = Eagle3Weights.of(drafter), wanted["logits"].shape[1]
    config = drafter.config.backbone
    rotary_rows = rotary(torch.arange(count), config, torch.float32)

    def mix(_, query, key, value):
        rows = (x.transpose(0, 1) for x in (query, key, value))
        mixed = scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=True)
        return mixed.transpose(0, 1)

    hidden, differs = wanted["features"][:count], []
    with torch.no_grad():
        for step, theirs in enumerate(wanted["logits"]):
            embedded = drafter.borrowed.embed(wanted["tokens"][step + 1 : step + 1 + count])
            hidden = weights.step(embedded, hidden, rotary_rows, mix)
            found = drafter.base_logits(weights.final(hidden))
            torch.testing.assert_close(found, theirs, atol=1e-5, rtol=1e-5)
            differs.append(float((theirs - wanted["chains"][step]).abs().max()))
    # Beyond the first draft they are not what engines draft from their caches.
    assert differs[0] <= 1e-5
    assert min(differs[1:]) > 1e-2


@pytest.mark.parametrize("name", BLOCKS)
def test_control_a_block_of_another_layout_differs(name, draft):
    drafter, wanted = bound(GOLDEN / name), load_file(GOLDEN / name / "forward.safetensors")
    anchor, tokens = int(wanted["anchors"][0]), wanted["tokens"].tolist()
    draw, _ = draft(drafter, [wanted["features"][:anchor]], [tokens[anchor] ^ 1])
    first = wanted["logits"][0, drafter.config.unused_slots]
    assert (draw.logits[0][0] - first).abs().max() > 1e-2


@pytest.mark.parametrize("save", [save_published, save_sglang, save_gguf_of])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("peagle", "all drafts in one pass"),
        ("mtp", "the layer of MTP modules"),
        ("eagle3_deep", "3 layers"),
    ],
)
def test_their_own_kinds_have_no_place_in_other_engines_files(name, words, save, tmp_path):
    with pytest.raises(CompatibilityError, match=words):
        save(bound(GOLDEN / name), tmp_path / "out.gguf")


@pytest.mark.parametrize("name", ["peagle", "mtp", "eagle3_deep"])
def test_their_own_kinds_travel_attached(name, tmp_path, draft):
    shutil.copytree(GOLDEN / "target", tmp_path / "target")
    drafter = bound(GOLDEN / name)
    save_attached(drafter, tmp_path / "target", dtype=None)
    back = load_drafter(tmp_path / "target")
    borrow_tables(back, TargetTables.read(GOLDEN / "target"))
    wanted = load_file(GOLDEN / name / "forward.safetensors")
    tokens, given = wanted["tokens"].tolist(), wanted["features"][:6]
    one, other = (draft(d, [given], [tokens[6]], tokens=[tokens[:6]])[0] for d in (drafter, back))
    assert replace(back.config, extra={}) == replace(drafter.config, extra={})
    assert all(torch.equal(a, b) for a, b in zip(one.logits, other.logits, strict=True))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "qwen3_5_text"}, "model_type 'qwen3_5_text', but only qwen3"),
        ({"layer_types": ["sliding_attention"] * 4, "sliding_window": 8}, "sliding_window of 8"),
    ],
)
def test_an_mtp_of_other_layers_is_refused(changes, words):
    data = json.loads((GOLDEN / "mtp" / "config.json").read_text())
    data["transformer_layer_config"] |= changes
    with pytest.raises(CompatibilityError, match=words):
        read_config(data, "config.json")


def test_what_the_librarys_mtp_takes_from_its_target_has_no_place_in_its_file(tmp_path):
    drafter = bound(GOLDEN / "mtp")
    drafter.own_head_VH = drafter.borrowed.head_VH + 1
    with pytest.raises(CompatibilityError, match="an embedding or head of its own"):
        save_speculators(drafter, tmp_path)
    drafter.own_head_VH = None
    drafter.config = replace(drafter.config, target_layer_ids=(2,))
    with pytest.raises(CompatibilityError, match=r"target_layer_ids \[2\]"):
        save_speculators(drafter, tmp_path)


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
