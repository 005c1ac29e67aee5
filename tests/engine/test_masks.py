"""Constrained decoding: each row sees the mask of its own prefix, drafted and verified alike."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from itertools import product

import numpy as np
import pytest
import torch

from dspark.engine.engine import Engine
from dspark.engine.requests import masks as masks_module
from dspark.engine.requests.masks import RowMasks
from dspark.errors import RequestError
from dspark.request import VERIFIERS, Request, SamplingParams
from tests.helpers.laws import tempered_top_p

VOCAB, TOKENS, PER_KIND = 6, 3, 1200
EXACT, BIASED = 4.0, 6.0  # standard deviations


@dataclass(frozen=True)
class Sums:
    """A third of all tokens is never allowed; which one hangs on the sum of the output."""

    def allowed(self, output_ids):
        total = sum(output_ids) + len(output_ids)
        return np.array([(token + total) % 3 != 0 for token in range(VOCAB)])


@dataclass(frozen=True)
class Dying:
    """Nothing is allowed behind a token 2."""

    def allowed(self, output_ids):
        return [2 not in output_ids] * VOCAB


KINDS = (
    ((1, 2, 3), SamplingParams(TOKENS + 2, temperature=1.0), Sums()),
    ((0, 5), SamplingParams(TOKENS + 3, temperature=1.2), Dying()),
    (
        (4, 4),
        SamplingParams(
            TOKENS + 1, temperature=0.9, presence_penalty=0.6, logit_bias={2: 0.7}, top_p=0.9
        ),
        Sums(),
    ),
    ((3, 1, 1), SamplingParams(TOKENS + 4, temperature=1.0), None),
)


@pytest.fixture(scope="module")
def small(tiny):
    """A target of six tokens, and the same model as transformers runs it."""
    target, model = tiny.make_target(vocab=VOCAB, seed=4), tiny.make_model(vocab=VOCAB, seed=4)
    for weight in (target._anatomy.head.weight, model.lm_head.weight):
        weight.requires_grad_(False).mul_(0.3)  # closer to even, so that all outcomes are seen
    return target, model


def hand_made_law(logits, params, mask, output):
    """Processors written out, slowly and obviously."""
    scores = logits - params.presence_penalty * np.isin(np.arange(VOCAB), output)
    for token, value in params.logit_bias.items():
        scores[token] += value
    if mask is not None:
        scores[~np.array(mask.allowed(output), dtype=bool)] = -np.inf
    if np.isneginf(scores).all():
        return None
    return tempered_top_p(scores, params.temperature, params.top_p)


def exact_law(model, prompt, params, mask):
    """Probability of every output's first TOKENS tokens; fewer where the mask ends it."""
    law, ended = {(): 1.0}, {}
    for _ in range(TOKENS):
        prefixes = list(law)
        with torch.inference_mode():
            rows = model(torch.tensor([[*prompt, *prefix] for prefix in prefixes])).logits[:, -1]
        longer = {}
        for prefix, row in zip(prefixes, rows.double().numpy(), strict=True):
            probs = hand_made_law(row, params, mask, prefix)
            if probs is None:
                ended[prefix] = law[prefix]
                continue
            longer |= {(*prefix, token): law[prefix] * p for token, p in enumerate(probs)}
        law = longer
    return law | ended


def deviations(tiny, small, drafter, kinds=KINDS, per_kind=PER_KIND, **options):
    target, model = small
    engine = Engine(target, drafter, max_requests=192, max_length=16, **options)
    requests = [
        Request(prompt, params.with_seed(1000 * i + kind), mask)
        for i in range(per_kind)
        for kind, (prompt, params, mask) in enumerate(kinds)
    ]
    outputs = tiny.collect(engine, requests)
    found = [
        tiny.deviation(
            Counter(output.token_ids[:TOKENS] for output in outputs[kind :: len(kinds)]),
            exact_law(model, *described),
        )
        for kind, described in enumerate(kinds)
    ]
    return found, outputs


@pytest.mark.parametrize("verifier", VERIFIERS)
def test_tokens_follow_the_masked_law(tiny, small, verifier):
    found, outputs = deviations(tiny, small, tiny.MarkovDrafter(VOCAB), verifier=verifier)
    assert max(found) < EXACT
    for output in outputs[1 :: len(KINDS)]:
        died = output.token_ids[-1] == 2
        assert (output.finish_reason == "error") == (died and len(output.token_ids) < TOKENS + 3)
    stats = [output.stats for output in outputs]
    accepted, verified = sum(s.accepted for s in stats), sum(s.verified for s in stats)
    assert 0.1 < accepted / verified < 0.9


@pytest.mark.parametrize("verifier", ["token", "block"])
def test_drafts_of_a_reduced_vocabulary_that_the_mask_forbids(tiny, small, verifier):
    """Where the mask leaves the drafter no token, fewer are drafted, and the law stays."""
    drafter = tiny.make_drafter(small[0], known=(0, 3, 5))
    found, outputs = deviations(tiny, small, drafter, per_kind=800, verifier=verifier)
    assert max(found) < EXACT
    assert sum(output.stats.accepted for output in outputs) > 0


def first_row_only(self, prefixes):
    return rows(self, [(request, drafted and ()) for request, drafted in prefixes])


rows = RowMasks.rows


@pytest.mark.parametrize("verifier", ["token", "block"])
def test_control_a_mask_of_the_first_row_only(tiny, small, verifier, monkeypatch):
    monkeypatch.setattr(RowMasks, "rows", first_row_only)
    drafter = tiny.MarkovDrafter(VOCAB)
    found, _ = deviations(tiny, small, drafter, KINDS[:1], verifier=verifier)
    assert found[0] > BIASED


@pytest.mark.parametrize("kind", ["dspark", "eagle3", "ngram", "target"])
def test_greedy_output_is_that_of_plain_decoding(tiny, kind):
    target = tiny.make_target(vocab=VOCAB, dtype=torch.float64, seed=4)
    drafter = {
        "dspark": tiny.make_drafter,
        "eagle3": tiny.make_eagle3,
        "ngram": tiny.ngram,
        "target": tiny.TargetDrafter,
    }[kind](target)
    params = SamplingParams(24, presence_penalty=0.3)
    masks = (Sums(), None, Dying(), Sums())
    requests = [Request((i, 5 - i), params, mask) for i, mask in enumerate(masks)]
    plain = tiny.collect(Engine(target, max_length=60), requests)
    for verifier, batch in product(VERIFIERS, (1, 3)):
        options = {"verifier": verifier, "max_requests": batch, "max_length": 60}
        outputs = tiny.collect(Engine(target, drafter, **options), requests)
        for mine, theirs in zip(outputs, plain, strict=True):
            assert mine.token_ids == theirs.token_ids
            assert (mine.finish_reason, mine.error) == (theirs.finish_reason, theirs.error)
        accepted = [output.stats.accepted for output in outputs]
        assert kind != "target" or min(accepted[0], accepted[3]) > 8
    for request, output in zip(requests, plain, strict=True):
        for i, token in enumerate(output.token_ids):
            assert request.mask is None or request.mask.allowed(output.token_ids[:i])[token]


LETTERS = '[],12"ab{}:'
END = len(LETTERS)


def read(state, letter):  # noqa: PLR0911 (a table of rules)
    """The next state of a reader of JSON; None where the letter is not allowed."""
    stack, expects = state
    value = "value" in expects
    if expects in ("string", "key string"):
        if letter == '"':
            return stack, "after" if expects == "string" else "colon"
        return state if letter in "ab" else None
    if expects == "colon":
        return (stack, "value") if letter == ":" else None
    if value and letter in "12":
        return stack, "after"
    if value and letter == '"':
        return stack, "string"
    if value and letter in "[{":
        return stack + letter, "value or end" if letter == "[" else "key or end"
    if "key" in expects and letter == '"':
        return stack, "key string"
    closes = expects == "after" or "end" in expects
    if closes and stack and letter == {"[": "]", "{": "}"}[stack[-1]]:
        return stack[:-1], "after"
    if expects == "after" and stack and letter == ",":
        return stack, "value" if stack[-1] == "[" else "key"
    return None


# Letters that a state needs at least, beside closing what is open.
NEEDS = {"value": 1, "string": 1, "key": 4, "key string": 3, "colon": 2}


@dataclass
class Json:
    """Allows what can still become JSON, and ends, within `limit` tokens."""

    limit: int
    asked: list[tuple[int, ...]] = field(default_factory=list)

    def allowed(self, output_ids):
        assert END not in output_ids  # nothing is asked about what follows an end token
        self.asked.append(tuple(output_ids))
        state = ("", "value")
        for token in output_ids:
            state = read(state, LETTERS[token])
        left = self.limit - len(output_ids) - 1
        answer = [False] * (END + 1)
        for token, letter in enumerate(LETTERS):
            after = read(state, letter)
            # One more for the end token.
            answer[token] = after is not None and (
                len(after[0]) + NEEDS.get(after[1], 0) + 1 <= left
            )
        answer[END] = state == ("", "after")
        return answer


@pytest.fixture(scope="module")
def writer(tiny):
    target = tiny.make_target(vocab=END + 1, dtype=torch.float64, seed=7)
    target._anatomy.head.weight.mul_(0.4)
    return target


@pytest.mark.parametrize("verifier", VERIFIERS)
def test_a_grammar_whose_output_always_parses(tiny, writer, verifier):
    limits = [6 + i % 20 for i in range(60)]
    requests = [
        Request(
            (i % END,),
            SamplingParams(
                limit, temperature=(0.0, 1.0, 1.5)[i % 3], stop_token_ids=(END,), seed=i
            ),
            Json(limit),
        )
        for i, limit in enumerate(limits)
    ]
    engine = Engine(
        writer,
        tiny.make_drafter(writer, std=0.2),
        max_requests=16,
        max_length=40,
        verifier=verifier,
    )
    outputs = engine.run(requests)
    texts = set()
    for output in outputs:
        assert (output.finish_reason, output.token_ids[-1]) == ("stop", END)
        texts.add("".join(LETTERS[token] for token in output.token_ids[:-1]))
    assert all(json.loads(text) is not None for text in texts)
    assert len(texts) > 20
    assert len({text[0] for text in texts}) >= 3
    assert sum(output.stats.accepted for output in outputs) > 0


def test_control_an_output_without_the_grammar_does_not_parse(tiny, writer):
    requests = tiny.make_requests([[i] for i in range(END)], max_new_tokens=16, temperature=1.0)
    outputs = Engine(writer, max_length=40).run(requests)
    texts = ["".join((LETTERS + " ")[token] for token in output.token_ids) for output in outputs]
    bad = 0
    for text in texts:
        try:
            json.loads(text)
        except json.JSONDecodeError:
            bad += 1
    assert bad > len(texts) / 2


def test_each_prefix_is_asked_for_once_in_a_round_and_by_nobody_else(tiny, writer, monkeypatch):
    mask = Json(30)
    request = Request((3,), SamplingParams(30, temperature=1.0, stop_token_ids=(END,)), mask)
    others = [Request((i,), SamplingParams(10)) for i in range(3)]
    engine = Engine(writer, tiny.make_drafter(writer), max_length=40)
    first = engine.add(request)
    for other in others:
        engine.add(other)
    while any(active.request_id == first for active in engine.roster.everyone):
        before = len(mask.asked)
        engine.step()
        asked = mask.asked[before:]
        assert len(set(asked)) == len(asked) <= 1 + 5

    def fail(*_args):
        raise AssertionError("a mask was asked for")

    monkeypatch.setattr(masks_module, "_ask", fail)
    assert len(engine.run(others)) == 3


class Failing:
    """Goes wrong once the output has `after` tokens."""

    def __init__(self, after, how):
        self.after, self.how = after, how

    def allowed(self, output_ids):
        if len(output_ids) < self.after:
            return [True] * 64
        if self.how == "raises":
            raise KeyError("state 7")
        return [False] * 64 if self.how == "nothing" else [True] * 63


FAILURES = {
    "raises": "The mask raised KeyError after 5 tokens of output: 'state 7'",
    "nothing": "The mask allows no token after 5 tokens of output",
    "short": r"The mask's answer has shape \(63,\) after 5 tokens of output, .* 64 tokens",
}


@pytest.mark.parametrize("how", FAILURES)
@pytest.mark.parametrize("verifier", VERIFIERS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_mask_that_fails_ends_its_request_and_no_other(tiny, how, verifier, temperature):
    target = tiny.make_target(dtype=torch.float64)
    prompts = tiny.make_prompts(5, 64, seed=3)
    requests = tiny.make_requests(prompts, max_new_tokens=12, temperature=temperature)
    failing = Request(requests[2].prompt_ids, requests[2].params, Failing(5, how))
    for drafter in (None, tiny.TargetDrafter(target), tiny.make_drafter(target)):
        options = {"verifier": verifier, "max_length": 60}
        right = tiny.collect(Engine(target, drafter, **options), requests)
        mixed = [*requests[:2], failing, *requests[3:]]
        engine = Engine(target, drafter, **options)
        outputs = tiny.collect(engine, mixed)
        bad = outputs.pop(2)
        assert (bad.finish_reason, len(bad.token_ids)) == ("error", 5)
        if temperature == 0 or verifier == "coupled":
            assert bad.token_ids == right[2].token_ids[:5]
        with pytest.raises(RequestError, match=FAILURES[how]):
            bad.checked()
        del right[2]
        assert tiny.token_ids(outputs) == tiny.token_ids(right)
        assert not engine.has_work
        with pytest.raises(RequestError, match=FAILURES[how]):
            engine.run(mixed)
        assert not engine.has_work  # the others were decoded to their end


def test_a_mask_that_would_fail_behind_the_end_never_does(tiny, target):
    for drafter in (None, tiny.TargetDrafter(target)):
        request = Request((1, 2), SamplingParams(5), Failing(5, "raises"))
        [output] = Engine(target, drafter, max_length=60).run([request])
        assert (output.finish_reason, len(output.token_ids)) == ("length", 5)


def test_what_bias_and_mask_forbid_together(tiny, target):
    """The mask allows one token, and the bias bans it."""

    class One:
        def allowed(self, output_ids):
            return np.arange(64) == 9

    params = SamplingParams(4, logit_bias={9: float("-inf")})
    for drafter in (None, tiny.make_drafter(target)):
        with pytest.raises(RequestError, match="leave no token"):
            Engine(target, drafter, max_length=60).run([Request((1, 2), params, One())])
