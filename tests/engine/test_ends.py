"""Where a request ends: nothing behind it is emitted, counted or shown."""

from __future__ import annotations

import pytest

from dspark.engine.engine import Engine
from dspark.engine.model import stream_pieces
from dspark.request import Request, SamplingParams

PROMPT = (7, 20, 31)


def drafters(tiny, target):
    """None, and drafters whose blocks are kept whole, in part and never."""
    return (
        None,
        tiny.TargetDrafter(target),
        tiny.TargetDrafter(target, spoil=3),
        tiny.TargetDrafter(target, factor=-1.0),
    )


def plain_ids(tiny, target, **params):
    [output] = tiny.decode(target, None, [Request(PROMPT, SamplingParams(**params))])
    return output.token_ids


@pytest.mark.parametrize("kind", range(4))
def test_stop_tokens_end_within_a_block(tiny, target, kind):
    drafter = drafters(tiny, target)[kind]
    plain = plain_ids(tiny, target, max_new_tokens=20)
    assert len(set(plain)) > 5
    for token in set(plain):
        params = SamplingParams(20, stop_token_ids=(token,))
        [output] = tiny.decode(target, drafter, [Request(PROMPT, params)])
        assert output.token_ids == plain[: plain.index(token) + 1]
        assert output.finish_reason == "stop"
        # The first token is drawn with the prompt; all others were gained in rounds.
        assert output.stats.tokens == len(output.token_ids) - 1
        assert output.stats.accepted <= output.stats.tokens


def test_the_models_own_end_tokens(tiny):
    plain = plain_ids(tiny, tiny.make_target(), max_new_tokens=20)
    token = plain[6]
    model = tiny.make_model()
    model.generation_config.eos_token_id = [token, 63]
    target = type(tiny.make_target()).from_model(model)
    drafter = tiny.TargetDrafter(target)
    [output] = tiny.decode(target, drafter, [Request(PROMPT, SamplingParams(20))])
    assert output.token_ids == plain[: plain.index(token) + 1]
    assert output.finish_reason == "stop"
    ignoring = Request(PROMPT, SamplingParams(20, ignore_eos=True))
    [output] = tiny.decode(target, drafter, [ignoring])
    assert (output.token_ids, output.finish_reason) == (plain, "length")


@pytest.mark.parametrize("kind", range(4))
def test_the_limit_of_new_tokens_is_exact(tiny, target, kind):
    drafter = drafters(tiny, target)[kind]
    plain = plain_ids(tiny, target, max_new_tokens=14)
    for limit in range(1, 15):
        [output] = tiny.decode(target, drafter, [Request(PROMPT, SamplingParams(limit))])
        assert output.token_ids == plain[:limit]
        assert output.finish_reason == "length"
        assert output.stats.tokens == limit - 1
        # No draft is verified in the place of a token that the request may not take.
        assert output.stats.verified <= 5 * output.stats.rounds
        if kind == 1:
            assert output.stats.verified == output.stats.accepted <= max(limit - 2, 0)


@pytest.mark.parametrize("kind", range(4))
def test_the_context_ends_a_request(tiny, target, kind):
    drafter = drafters(tiny, target)[kind]
    for length in (4, 5, 12):
        request = Request(PROMPT, SamplingParams(50))
        [output] = tiny.decode(target, drafter, [request], max_length=length)
        assert len(PROMPT) + len(output.token_ids) == length
        assert output.finish_reason == "length"


def test_the_models_own_context_is_never_passed(tiny, target):
    prompt = tuple(range(60))
    engine = Engine(target, tiny.make_drafter(target), max_length=10_000)
    [output] = engine.run([Request(prompt, SamplingParams(500))])
    assert len(prompt) + len(output.token_ids) == engine.max_length == tiny.max_context


@pytest.mark.parametrize("kind", range(4))
def test_stop_strings_cut_text_and_tokens(tiny, talker, kind):
    drafter = drafters(tiny, talker)[kind]
    params = {"max_new_tokens": 40, "ignore_eos": True}
    [plain] = tiny.decode(talker, None, [Request(PROMPT, SamplingParams(**params))])
    candidates = [plain.text[i : i + 2] for i in range(2, len(plain.text) - 2, 5)]
    stops = [stop for stop in candidates if "\ufffd" not in stop]
    assert len(stops) > 3
    for stop in stops:
        request = Request(PROMPT, SamplingParams(stop=(stop,), **params))
        [output] = tiny.decode(talker, drafter, [request])
        assert output.finish_reason == "stop"
        assert output.text == plain.text[: plain.text.find(stop)]
        count = len(output.token_ids)
        assert output.token_ids == plain.token_ids[:count]
        assert stop in talker.tokenizer.decode(output.token_ids)
        assert stop not in talker.tokenizer.decode(output.token_ids[:-1])
        pieces = list(stream_pieces(Engine(talker, drafter, max_length=60), request))
        assert "".join(piece.text for piece in pieces) == output.text
        assert tuple(piece.token_id for piece in pieces) == output.token_ids


def test_end_tokens_are_in_the_tokens_but_not_in_the_text(tiny, talker):
    params = {"max_new_tokens": 12, "ignore_eos": True}
    [plain] = tiny.decode(talker, None, [Request(PROMPT, SamplingParams(**params))])
    last = plain.token_ids[8]
    first = plain.token_ids.index(last)
    request = Request(PROMPT, SamplingParams(stop_token_ids=(last,), **params))
    [output] = tiny.decode(talker, tiny.TargetDrafter(talker), [request])
    assert output.token_ids == plain.token_ids[: first + 1]
    assert output.text == talker.tokenizer.decode(output.token_ids[:-1], skip_special_tokens=True)


@pytest.mark.parametrize("kind", range(4))
def test_streamed_text_is_the_generated_text(tiny, talker, kind):
    drafter = drafters(tiny, talker)[kind]
    request = Request(PROMPT, SamplingParams(30, temperature=1.0, seed=5, ignore_eos=True))
    [output] = tiny.decode(talker, drafter, [request], max_length=60)
    pieces = list(stream_pieces(Engine(talker, drafter, max_length=60), request))
    assert "".join(map(str, pieces)) == output.text != ""
    assert tuple(piece.token_id for piece in pieces) == output.token_ids
    assert sum(piece.drafted for piece in pieces) == output.stats.accepted
