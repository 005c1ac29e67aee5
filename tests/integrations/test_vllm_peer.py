"""The real vLLM drafts by the plug-in (DSPARK_VLLM: its Python, this package installed there)."""

import copy
import itertools
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.peer_vllm import ask_vllm, compare
from dspark.drafters.checkpoints.checkpoint import load_drafter, save
from dspark.drafters.dspark import DSparkDrafter
from dspark.engine.model import Model
from dspark.request import Request, SamplingParams
from dspark.sources.names import BUNDLED, BUNDLED_DRAFTERS
from dspark.targets.target import Target
from tests.helpers.drafters import tiny_backbone, tiny_dspark
from tests.helpers.laws import chi_squared
from tests.helpers.targets import tiny_qwen3

pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif("DSPARK_VLLM" not in os.environ, reason="DSPARK_VLLM names no Python"),
]
QUESTIONS = (
    "Tom has 7 apples and buys {}. How many has he?",
    "Which command lists {} files?",
    "I want a table for {} people, please.",
)


def with_head(kind):
    """The bundled drafter with a sequential head of another kind that still knows much of it."""
    if kind == "dflash":
        return load_drafter(BUNDLED_DRAFTERS["bundled-dflash"]).to(torch.float32).eval()
    drafter = load_drafter(BUNDLED / "dspark")
    config = drafter.config
    fields = {f: getattr(config, f) for f in config.__dataclass_fields__}
    made = DSparkDrafter(type(config)(**(fields | {"markov_head_type": kind})))
    state = drafter.state_dict()
    torch.manual_seed(0)
    for name, own in made.state_dict().items():
        state.setdefault(name, torch.randn_like(own) * 0.05)
    if kind == "rnn":
        rank = config.markov_rank
        weight = state["markov_head.joint_proj.weight"]
        weight[2 * rank :, rank : 2 * rank] += 2 * torch.eye(rank)  # output: tanh of 2 e
    made.load_state_dict(state)
    return made.to(torch.float32).eval()


@pytest.fixture(scope="module")
def target():
    return Target.load(BUNDLED, dtype=torch.float32)


@pytest.fixture(scope="module")
def ask(target):
    """50 greedy prompts."""
    texts = [q.format(i) for i in range(2, 20) for q in QUESTIONS][:50]
    encode = Model(target).encode
    prompts = [list(encode([{"role": "user", "content": text}])) for text in texts]
    return {"prompts": prompts, "max_tokens": 24, "temperature": 0.0}


@pytest.fixture(scope="module")
def plain(ask):
    """vLLM's answers without a drafter."""
    [answers] = ask_vllm(os.environ["DSPARK_VLLM"], BUNDLED, [ask], max_model_len=512)
    return answers


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn", "dflash"])
def test_vllm_keeps_our_drafts_and_answers_plainly(kind, tmp_path, target, ask, plain):
    drafter = with_head(kind)
    save(drafter, tmp_path / "draft", "attached", dtype=None)
    drafter.bind(target.parts())
    model, params = Model(target, drafter), SamplingParams(max_new_tokens=24, temperature=0.0)
    requests = [Request(tuple(ids), params) for ids in ask["prompts"]]
    ours = [model.engine([r], schedule="fixed").run([r])[0] for r in requests]
    # From the second time on the prompt's first pages are in vLLM's cache.
    long = [token for ids in ask["prompts"][:16] for token in ids]
    again = ask | {"prompts": [long] * 3, "one_by_one": True}
    one_by_one, together, cached = ask_vllm(
        os.environ["DSPARK_VLLM"],
        BUNDLED,
        [ask | {"one_by_one": True}, ask, again],
        speculative={
            "method": "dspark",
            "model": str(tmp_path / "draft"),
            "num_speculative_tokens": 7,
        },
        max_model_len=512,
    )
    said = compare(ours, one_by_one, plain)
    print(kind, said)
    assert said["same_as_plain"] == said["prompts"] == 50
    assert [t["token_ids"] for t in together] == [p["token_ids"] for p in plain]
    assert said["ours"] > 1.5
    assert said["equal"]
    # A prefix that comes from the cache brings its draft context.
    assert len(long) > 256
    assert cached[0]["accepted"] > 0
    assert cached[0] == cached[1] == cached[2]


def test_samples_follow_the_targets_law(tmp_path):
    vocab, length, samples = 8, 3, 4000
    shape = {"vocab_size": vocab, "hidden_size": 64, "num_attention_heads": 2, "head_dim": 64}
    shape |= {"num_key_value_heads": 1, "initializer_range": 0.08}
    network = tiny_qwen3(
        seed=5, rope_parameters={"rope_type": "default", "rope_theta": 1e4}, **shape
    )
    network.save_pretrained(tmp_path / "target")
    target = Target.from_model(copy.deepcopy(network))
    backbone = tiny_backbone(64, 2, rope_theta=1e4)
    drafter = tiny_dspark(target, taps=(0, 1), backbone=backbone, std=0.3)
    save(drafter, tmp_path / "draft", "attached", dtype=None)
    prompt = [1, 5, 2, 7]
    probs = {}
    with torch.no_grad():
        for tokens in itertools.product(range(vocab), repeat=length):
            law = network(torch.tensor([[*prompt, *tokens]])).logits[0, 3:-1].softmax(-1)
            probs[tokens] = float(np.prod([law[i, t] for i, t in enumerate(tokens)]))
    law = np.array(list(probs.values()))
    ask = {"prompts": [prompt], "max_tokens": length, "temperature": 1.0, "n": samples}
    spec = {"method": "dspark", "model": str(tmp_path / "draft"), "num_speculative_tokens": 4}
    spec |= {"draft_sample_method": "probabilistic"}
    [[said]] = ask_vllm(
        os.environ["DSPARK_VLLM"],
        tmp_path / "target",
        [ask | {"ignore_eos": True}],
        speculative=spec,
        max_model_len=64,
        max_num_seqs=256,
    )
    places = {tokens: i for i, tokens in enumerate(probs)}
    counts = np.zeros(len(law))
    for ids in said["token_ids"]:
        counts[places[tuple(ids)]] += 1
    statistic, limit = chi_squared(counts, law)
    assert statistic < limit
    # A flatter law is told apart.
    flat = law**0.6 / (law**0.6).sum()
    assert chi_squared(counts, flat)[0] > limit


def test_vllms_own_manager_takes_calibrated_confidences_and_our_budget():
    script = Path(__file__).with_name("vllm_verification.py")
    done = subprocess.run(
        [os.environ["DSPARK_VLLM"], str(script)], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["chosen", "calibrated", "same", "margin"]
