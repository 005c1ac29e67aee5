"""llama.cpp runs our drafters as our engine does (DSPARK_LLAMA_CPP: folder of its programs)."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dspark
from benchmarks.peer_drafters import compare, measure
from benchmarks.prompts import DOMAINS, domain_requests
from dspark.drafters.checkpoints.checkpoint import borrow_tables, load_drafter, save_gguf
from dspark.drafters.checkpoints.from_target import TargetTables, tokenizer_fields
from dspark.drafters.eagle3 import Eagle3Drafter
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


def llama_eagle3():
    """The bundled Eagle3 with Llama's layer and three captured layers, which drafts worse."""
    source, kept = load_drafter(BUNDLED_DRAFTERS["bundled-eagle3"]).float(), [1, 3, 4]
    config, state = source.config, source.state_dict()
    backbone = replace(config.backbone, query_key_norms=False, num_taps=len(kept))
    width, name = backbone.hidden_size, "layers.0.self_attn.{}_{}.weight"
    taps = config.target_layer_ids
    state["fc.weight"] = state["fc.weight"].unflatten(1, (len(taps), width))[:, kept].flatten(1)
    norms = [state[f"layers.0.{n}.weight"] for n in ("input_layernorm", "hidden_norm")]
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4096, 2 * width, generator=generator) * torch.cat(norms)
    for kind in "qk":
        # The norm of each head's queries and keys becomes a factor, of their typical size.
        weight, gains = state[name.format(kind, "proj")], state.pop(name.format(kind, "norm"))
        heads = (inputs @ weight.T).unflatten(1, (-1, backbone.head_dim))
        sizes = heads.square().mean(-1).sqrt().mean(0)
        state[name.format(kind, "proj")] = weight * (gains / sizes[:, None]).flatten()[:, None]
    made = Eagle3Drafter(
        replace(config, backbone=backbone, target_layer_ids=tuple(taps[i] for i in kept))
    )
    made.load_state_dict(state)
    return made.bfloat16().eval()


@pytest.mark.parametrize("weight_type", ["f16", "q8_0"])
@pytest.mark.parametrize("source", [BUNDLED, BUNDLED_DRAFTERS["bundled-dflash"], "eagle3"])
def test_as_many_drafts_are_kept_and_the_answers_are_plain_ones(
    target, data, tmp_path, source, weight_type
):
    drafter = llama_eagle3() if source == "eagle3" else load_drafter(source)
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
    assert said["ours"] > (1.2 if source == "eagle3" else 1.5)
    assert said["equal"], said
    if weight_type == "f16":  # llama.cpp rounds the inputs of products with Q8_0 to 8 bits
        assert said["same_rounds"] >= len(requests) - 1, said
