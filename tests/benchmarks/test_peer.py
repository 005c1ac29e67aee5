"""llama.cpp runs our drafters as our engine does (DSPARK_LLAMA_CPP: folder of its programs)."""

import os
from pathlib import Path

import pytest

import dspark
from benchmarks.peer_drafters import compare, measure
from benchmarks.prompts import DOMAINS, domain_requests
from dspark.drafters.checkpoints.checkpoint import borrow_tables, load_drafter, save_gguf
from dspark.drafters.checkpoints.gguf_tokenizer import tokenizer_fields
from dspark.drafters.checkpoints.target_tables import TargetTables
from dspark.request import SamplingParams
from dspark.sources.names import BUNDLED, BUNDLED_DRAFTERS

pytest.importorskip("gguf")
pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(
        "DSPARK_LLAMA_CPP" not in os.environ, reason="DSPARK_LLAMA_CPP names no folder"
    ),
]


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    from tests.helpers.gguf_qwen3 import write_qwen3_target

    path = tmp_path_factory.mktemp("peer") / "target.gguf"
    write_qwen3_target(BUNDLED, path, "f16")
    return path


@pytest.mark.parametrize("weight_type", ["f16", "q8_0"])
@pytest.mark.parametrize("source", [BUNDLED, BUNDLED_DRAFTERS["bundled-dflash"]])
def test_as_many_drafts_are_kept_and_the_answers_are_plain_ones(
    target, data, tmp_path, source, weight_type
):
    drafter = load_drafter(source)
    borrow_tables(drafter, TargetTables.read(BUNDLED))
    path = tmp_path / "draft.gguf"
    fields = tokenizer_fields(target, drafter.config.vocab_size, offline=True)
    save_gguf(drafter, path, fields, weight_type=weight_type)
    model = dspark.load("bundled", path, dtype="float32", offline=True)
    params = SamplingParams(max_new_tokens=32, temperature=0.0)
    requests = [r for d in DOMAINS for r in domain_requests(model, data, d, 3, params)]
    folder = Path(os.environ["DSPARK_LLAMA_CPP"])
    pairs = measure(model, requests, folder=folder, target=target, draft=path, threads=1)
    said = compare(pairs, requests)
    assert said["same_prompt_tokens"] == said["same_text_as_plain"] == len(requests)
    assert said["ours"] > 1.5
    assert said["equal"], said
    if weight_type == "f16":  # llama.cpp rounds the inputs of products with Q8_0 to 8 bits
        assert said["same_rounds"] >= len(requests) - 1, said
