"""Temperature 0: whatever is drafted, verified or batched, the tokens are the target's own."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
import torch

from dspark.drafters.checkpoints.checkpoint import load_drafter
from dspark.engine.engine import Engine
from dspark.engine.speculation.schedule import Schedule
from dspark.request import VERIFIERS, Request, SamplingParams, Stats
from dspark.targets.target import Target

GOLDEN = Path(__file__).parents[1] / "golden"
NEW_TOKENS = 16


@pytest.fixture(scope="module", params=[torch.float32, torch.float64], ids=["fp32", "fp64"])
def precise(request, tiny):
    return tiny.make_target(dtype=request.param)


@pytest.fixture(scope="module")
def prompts(tiny):
    return tiny.make_prompts(8, 64)


@pytest.fixture(scope="module")
def plain(precise, prompts, tiny):
    """One request at a time, without a drafter."""
    requests = tiny.make_requests(prompts, max_new_tokens=NEW_TOKENS)
    return tiny.token_ids(tiny.decode(precise, None, requests, max_requests=1))


def drafter_of(name, target, tiny):
    if name == "ngram":
        return tiny.ngram(target)
    if name == "right":
        return tiny.TargetDrafter(target)
    if name == "often right":
        return tiny.TargetDrafter(target, spoil=5)
    if name == "wrong":
        return tiny.TargetDrafter(target, factor=-1.0)
    if name in LAYERS:
        return tiny.make_eagle3(target, mtp=name == "mtp", **LAYERS[name])
    return tiny.make_drafter(target, head=name)


LAYERS = {
    "eagle3": {}, "mtp": {}, "projected": {"input_projection": True}, "deep": {"num_layers": 2},
}  # fmt: skip
NAMES = ("vanilla", "gated", "rnn", *LAYERS, "ngram", "right", "often right", "wrong")


def test_plain_decoding_equals_transformers(tiny, prompts):
    model = tiny.make_model()
    expected = []
    for prompt in prompts[:5]:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
        expected.append(tuple(out[0, len(prompt) :].tolist()))
    assert len({token for ids in expected for token in ids}) > 10
    requests = tiny.make_requests(prompts[:5], max_new_tokens=NEW_TOKENS)
    for batch in (1, 5):
        outputs = tiny.decode(tiny.make_target(), None, requests, max_requests=batch)
        assert tiny.token_ids(outputs) == expected


@pytest.mark.parametrize("choice", list(product(NAMES, (1, 3, 8))), ids=str)
def test_every_drafter_leaves_the_tokens_as_they_are(tiny, precise, prompts, plain, choice):
    name, batch = choice
    drafter = drafter_of(name, precise, tiny)
    some = slice(3 if batch == 1 else None)
    requests = tiny.make_requests(prompts[some], max_new_tokens=NEW_TOKENS)
    outputs = tiny.decode(precise, drafter, requests, max_requests=batch)
    assert tiny.token_ids(outputs) == plain[some]
    accepted = sum(output.stats.accepted for output in outputs)
    if name == "right":
        assert accepted == sum(output.stats.verified for output in outputs)
    if name == "wrong":
        assert accepted == 0
    if name == "often right":
        assert 0 < accepted < sum(output.stats.verified for output in outputs)


@pytest.mark.parametrize(
    "setting", list(product(VERIFIERS, (1, 3, 5), (None, 0.3, 0.5, 0.7))), ids=str
)
def test_every_setting_leaves_the_tokens_as_they_are(tiny, target, prompts, setting):
    options = dict(zip(("verifier", "block_size", "threshold"), setting, strict=True))
    requests = tiny.make_requests(prompts[:4], max_new_tokens=NEW_TOKENS)
    expected = tiny.token_ids(tiny.decode(target, None, requests, max_requests=1))
    outputs = tiny.decode(target, tiny.make_drafter(target), requests, max_requests=3, **options)
    assert tiny.token_ids(outputs) == expected
    assert max(len(output.stats.offered) for output in outputs) <= options["block_size"]


def test_many_prompts(target, tiny):
    requests = tiny.make_requests(tiny.make_prompts(48, 64, seed=3), max_new_tokens=12)
    expected = tiny.token_ids(tiny.decode(target, None, requests, max_requests=16))
    outputs = tiny.decode(target, tiny.make_drafter(target), requests, max_requests=6)
    assert tiny.token_ids(outputs) == expected


def test_threshold_really_trims(target, prompts, tiny):
    requests = tiny.make_requests(prompts[:6], max_new_tokens=NEW_TOKENS)
    verified = [
        sum(
            output.stats.verified
            for output in tiny.decode(
                target, tiny.make_drafter(target), requests, threshold=threshold
            )
        )
        for threshold in (0.0, 0.5, 1.0)
    ]
    assert verified[0] > verified[1] > verified[2] == 0


def test_schedule_off_never_asks_the_drafter(target, prompts, tiny):
    class Silent(tiny.MarkovDrafter):
        def propose(self, context, batch, draw):
            raise AssertionError("asked")

    requests = tiny.make_requests(prompts[:3], max_new_tokens=8)
    outputs = tiny.decode(target, Silent(64), requests, schedule=Schedule("off"))
    assert tiny.token_ids(outputs) == tiny.token_ids(tiny.decode(target, None, requests))
    assert all(output.stats.drafted == 0 for output in outputs)


def test_greedy_and_sampled_requests_share_a_round(target, prompts, plain, precise, tiny):
    requests = [
        Request(tuple(p), SamplingParams(NEW_TOKENS, temperature=float(i % 2), seed=i))
        for i, p in enumerate(prompts)
    ]
    outputs = tiny.decode(precise, tiny.TargetDrafter(precise, spoil=5), requests, max_requests=5)
    assert tiny.token_ids(outputs)[::2] == plain[::2]
    assert tiny.token_ids(outputs)[1::2] != plain[1::2]


def test_penalties_and_bias_act_on_drafts_as_on_the_target(precise, prompts, tiny):
    requests = tiny.make_requests(
        prompts,
        max_new_tokens=NEW_TOKENS,
        repetition_penalty=1.3,
        frequency_penalty=0.4,
        presence_penalty=0.3,
        logit_bias={5: 2.0, 7: float("-inf")},
    )
    expected = tiny.token_ids(tiny.decode(precise, None, requests, max_requests=1))
    outputs = tiny.decode(precise, tiny.TargetDrafter(precise), requests, max_requests=5)
    assert tiny.token_ids(outputs) == expected
    # Drafts from the target's own law, each with the state of its own prefix, are never rejected.
    assert sum(o.stats.accepted for o in outputs) == sum(o.stats.verified for o in outputs) > 50


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_draft_that_the_request_bans_is_rejected(target, tiny, temperature):
    """Prompt lookup proposes one token only; a ban must not leave its law empty.

    The first token is 9, the suffix (7, 9) is found in the prompt, and 8 followed it there.
    """
    requests = tiny.make_requests(
        [[7, 9, 8, 1, 7]],
        max_new_tokens=30,
        temperature=temperature,
        logit_bias={8: float("-inf"), 9: 50.0},
    )
    [output] = tiny.decode(target, tiny.ngram(target), requests)
    assert 8 not in output.token_ids
    assert output.stats.verified > output.stats.accepted


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_request_may_ban_every_token_that_a_drafter_knows(target, tiny, temperature):
    known = (3, 5, 8)
    bans = dict.fromkeys(known, float("-inf"))
    requests = tiny.make_requests(
        [[7, 9, 8, 1, 7]], max_new_tokens=12, temperature=temperature, logit_bias=bans
    )
    drafter = tiny.make_drafter(target, known=known)
    [output] = tiny.decode(target, drafter, requests)
    assert len(output.token_ids) == 12
    assert not set(known) & set(output.token_ids)
    if temperature == 0:
        [plain] = tiny.decode(target, None, requests)
        assert output.token_ids == plain.token_ids


@pytest.mark.parametrize(
    ("folder", "threshold"),
    [("dspark_vanilla", "0.0"), ("dspark_vanilla", "0.5"), ("eagle3", "0.0")],
)
def test_golden_decode(folder, threshold, monkeypatch):
    """The reference implementation's own decode at temperature 0, round for round."""
    decoded = json.loads((GOLDEN / folder / "decode.json").read_text())
    golden = decoded[f"T=0.0 threshold={threshold}"]
    target = Target.load(GOLDEN / "dspark_vanilla" / "target")  # both were made with this one
    drafter = load_drafter(GOLDEN / folder / "draft")
    drafter.bind(target.parts(), num_target_layers=target.num_layers)
    rounds = []
    record = Stats.record_round

    def spy(self, verified, accepted, *rest, **named):
        rounds.append((verified, accepted))
        record(self, verified, accepted, *rest, **named)

    monkeypatch.setattr(Stats, "record_round", spy)
    new = golden["num_output_tokens"]
    prompt = golden["output_ids"][: len(golden["output_ids"]) - new]
    schedule = Schedule("threshold", float(threshold)) if float(threshold) else Schedule()
    engine = Engine(target, drafter, max_length=128, schedule=schedule)
    [output] = engine.run([Request(tuple(prompt), SamplingParams(new))])
    assert list(output.token_ids) == golden["output_ids"][-new:]
    # The reference proposes past the limit of tokens at the very end, we do not.
    expected = list(zip(golden["proposal_lengths"], golden["accepted_draft_lengths"], strict=True))
    alike = len(rounds) - 4
    assert alike > 10
    assert rounds[:alike] == expected[:alike]
