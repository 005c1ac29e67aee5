"""transformers' own generate with our drafters."""

import copy

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import dspark
from dspark.drafters.checkpoints.checkpoint import load_drafter, save_attached
from dspark.errors import CompatibilityError, UsageError
from dspark.hf import Speculation
from dspark.sources.names import BUNDLED, BUNDLED_DRAFTERS
from dspark.targets.target import Target
from tests.helpers.drafters import tiny_backbone, tiny_dspark, tiny_eagle3
from tests.helpers.laws import chi_squared
from tests.helpers.targets import tiny_qwen3

HEADS = ("vanilla", "gated", "rnn")
BLOCKS = ("reduced", "dflash", "1 + n", "windows")
CHAINS = ("eagle3", "llama", "deep", "p-eagle", "mtp", "projected")
NO_HEADS = {"markov_rank": 0, "confidence_head": False, "confidence_head_with_markov": False}
PROMPTS = ([3, 1, 4, 1, 5], [9], list(range(2, 40)))


@pytest.fixture(scope="module")
def model():
    return tiny_qwen3(seed=4)


def drafter_for(model, kind="vanilla", **changes):
    target = Target.from_model(copy.deepcopy(model))
    width = target.hidden_size
    if kind in CHAINS:
        last = target.num_layers - 1
        options = {
            "eagle3": {"taps": (0, 1)},
            "llama": {"taps": (0, 1), "backbone": tiny_backbone(width, 2, query_key_norms=False)},
            "deep": {"taps": (0, 1), "backbone": tiny_backbone(width, 2, num_layers=2)},
            "p-eagle": {"taps": (0, 1), "mask_token_id": 3},
            "mtp": {"taps": (last,), "ttt_length": 1},
            "projected": {
                "taps": (last,),
                "backbone": tiny_backbone(width, 1, input_projection=True),
            },
        }[kind]
        return tiny_eagle3(target, std=0.4, **options)
    if kind in BLOCKS:
        windows = tiny_backbone(width, 2, sliding_layers=(0,), sliding_window=6)
        changes |= {
            "reduced": {"known": range(0, 64, 3)},
            "dflash": NO_HEADS,
            "1 + n": NO_HEADS | {"sample_from_anchor": False},
            "windows": {"backbone": windows},
        }[kind]
        kind = "vanilla"
    return tiny_dspark(target, taps=(-1, 1), std=0.4, markov_head_type=kind, **changes)


def answer(model, prompt, **options):
    ids = torch.tensor([prompt])
    return model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)


@pytest.mark.parametrize("kind", [*HEADS, "eagle3", "reduced"])
def test_greedy_answers_are_plain_ones(model, kind):
    drafter = drafter_for(model, kind)
    speculation = Speculation(model, drafter)
    for prompt in PROMPTS:
        options = {"max_new_tokens": 16, "do_sample": False, "repetition_penalty": 1.3}
        plain = answer(model, prompt, **options)
        found = answer(model, prompt, custom_generate=speculation, **options)
        assert found.tolist() == plain.tolist()
        stats = speculation.stats
        assert stats.drafted > 0
        assert stats.rounds + stats.accepted == 16 - 1


@pytest.mark.parametrize("kind", [*HEADS, *BLOCKS, *CHAINS])
def test_drafts_are_those_of_the_engine(model, tmp_path, kind):
    model.save_pretrained(tmp_path)
    save_attached(drafter_for(model, kind), tmp_path, dtype=None)
    ours = dspark.load(tmp_path, dtype="float32")
    speculation = Speculation(model, tmp_path / "dspark")
    for prompt in PROMPTS:
        request = dspark.Request(
            tuple(prompt), dspark.SamplingParams(max_new_tokens=12, temperature=0.0)
        )
        [wanted] = ours.engine([request], schedule="fixed").run([request])
        found = answer(
            model, prompt, custom_generate=speculation, max_new_tokens=12, do_sample=False
        )
        assert found[0, len(prompt) :].tolist() == list(wanted.token_ids)
        assert speculation.stats.rounds == wanted.stats.rounds
        assert speculation.stats.accepted == wanted.stats.accepted


@pytest.mark.parametrize("name", ["bundled", *BUNDLED_DRAFTERS])
def test_a_drafter_that_ships_keeps_as_many_drafts_as_in_the_engine(bundled, name):
    ours = dspark.load("bundled", name, dtype="float32", offline=True)
    source = BUNDLED / "dspark" if name == "bundled" else BUNDLED_DRAFTERS[name]
    prompt = ours.encode([{"role": "user", "content": "Tom has 7 apples and buys 5. How many?"}])
    params = dspark.SamplingParams(max_new_tokens=24, temperature=0.0)
    request = dspark.Request(tuple(prompt), params)
    [wanted] = ours.engine([request], schedule="fixed").run([request])
    speculation = Speculation(bundled, load_drafter(source).float())
    found = answer(
        bundled, list(prompt), custom_generate=speculation, max_new_tokens=24, do_sample=False
    )
    assert found[0, len(prompt) :].tolist() == list(wanted.token_ids)
    assert speculation.stats.rounds == wanted.stats.rounds
    assert speculation.stats.accepted == wanted.stats.accepted > 3


@pytest.fixture(scope="module")
def bundled():
    return AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32).eval()


def test_samples_follow_the_plain_law():
    model = tiny_qwen3(seed=5, vocab_size=5, initializer_range=0.4)
    drafter = drafter_for(model)
    speculation, prompt, samples = Speculation(model, drafter), [1, 4, 2], 300
    with torch.no_grad():
        first_V = model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
        second_VV = torch.stack(
            [model(torch.tensor([[*prompt, t]])).logits[0, -1].softmax(-1) for t in range(5)]
        )
    law = (first_V[:, None] * second_VV).flatten().double().numpy()
    law /= law.sum()
    torch.manual_seed(0)
    counts = np.zeros(25)
    for _ in range(samples):
        ids = answer(
            model, prompt, custom_generate=speculation, max_new_tokens=3, do_sample=True, top_k=0
        )
        counts[5 * int(ids[0, 3]) + int(ids[0, 4])] += 1

    found, limit = chi_squared(counts, law)
    assert found < limit
    assert chi_squared(counts, law**0.2 / (law**0.2).sum())[0] > limit


def test_what_cannot_be_is_refused(model):
    drafter = drafter_for(model)
    speculation = Speculation(model, drafter)
    with pytest.raises(UsageError, match="one at a time"):
        model.generate(
            torch.ones(2, 3, dtype=torch.long), custom_generate=speculation, max_new_tokens=4
        )
    ids = torch.tensor([[0, 1, 2]])
    mask = torch.tensor([[0, 1, 1]])
    with pytest.raises(UsageError, match="padded"):
        model.generate(ids, attention_mask=mask, custom_generate=speculation, max_new_tokens=4)
    with pytest.raises(UsageError, match="num_drafts is 5"):
        Speculation(model, drafter, num_drafts=5)
    narrow = tiny_qwen3(seed=1, vocab_size=32)
    with pytest.raises(CompatibilityError, match="vocab_size is 64"):
        Speculation(narrow, drafter)
    assert "_get_candidate_generator" not in vars(model)
