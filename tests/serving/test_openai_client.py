"""The official client against a real server: streamed, whole, and the same as offline."""

import math

import openai
import pytest


@pytest.fixture(scope="module")
def client(live):
    with live.client() as made:
        yield made


def test_chat_whole(client, kit, offline):
    (alone,) = offline(kit.prompts[0], max_new_tokens=24)
    answer = client.chat.completions.create(
        model="bundled", messages=kit.messages(kit.prompts[0]), max_tokens=24
    )
    (choice,) = answer.choices
    assert choice.message.content == alone.text
    assert choice.message.role == "assistant"
    assert choice.finish_reason == alone.finish_reason
    assert answer.usage.completion_tokens == len(alone.token_ids)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + len(alone.token_ids)
    counts = answer.usage.model_extra["dspark"]
    assert set(counts) == {"rounds", "drafted", "verified", "accepted"}
    assert counts["verified"] >= counts["accepted"] > 0
    assert answer.id.startswith("chatcmpl-")


def test_chat_streamed(client, kit, offline):
    (alone,) = offline(kit.prompts[1], max_new_tokens=24)
    chunks = list(
        client.chat.completions.create(
            model="bundled",
            messages=kit.messages(kit.prompts[1]),
            max_completion_tokens=24,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    *said, usage = chunks
    assert usage.choices == []
    assert usage.usage.completion_tokens == len(alone.token_ids)
    assert usage.usage.model_extra["dspark"]["rounds"] == alone.stats.rounds
    assert said[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in said) == alone.text
    assert [c.choices[0].finish_reason for c in said if c.choices[0].finish_reason] == [
        alone.finish_reason
    ]
    assert len({c.id for c in chunks}) == 1
    assert len(said) > 4  # it came in pieces


@pytest.mark.parametrize("stream", [False, True])
def test_text_completion(client, offline, stream):
    (alone,) = offline("The command `ls`", raw=True, max_new_tokens=16)
    answer = client.completions.create(
        model="bundled", prompt="The command `ls`", max_tokens=16, stream=stream
    )
    text = "".join(c.choices[0].text for c in answer) if stream else answer.choices[0].text
    assert text == alone.text


def test_token_ids_and_several_prompts(client, model, offline):
    texts = ["The command `ls`", "Hello"]
    alone = [offline(text, raw=True, max_new_tokens=8)[0].text for text in texts]
    ids = [list(model.encode(text)) for text in texts]
    for prompt in (texts, ids):
        answer = client.completions.create(model="bundled", prompt=prompt, max_tokens=8)
        assert [choice.text for choice in answer.choices] == alone
        assert [choice.index for choice in answer.choices] == [0, 1]
    one = client.completions.create(model="bundled", prompt=ids[0], max_tokens=8)
    assert one.choices[0].text == alone[0]


@pytest.mark.parametrize("stream", [False, True])
def test_several_answers_with_a_seed(client, kit, offline, stream):
    wanted = offline(kit.prompts[2], max_new_tokens=10, n=3, temperature=1.0, seed=11)
    texts = [""] * 3
    answer = client.chat.completions.create(
        model="bundled",
        messages=kit.messages(kit.prompts[2]),
        max_tokens=10,
        n=3,
        temperature=1.0,
        seed=11,
        stream=stream,
    )
    if stream:
        for chunk in answer:
            texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    else:
        texts = [choice.message.content for choice in answer.choices]
    assert texts == [output.text for output in wanted]
    assert len(set(texts)) > 1


def test_without_a_seed_samples_differ(client, kit):
    def sample():
        answer = client.chat.completions.create(
            model="bundled", messages=kit.messages(kit.prompts[1]), max_tokens=16, temperature=1.0
        )
        return answer.choices[0].message.content

    assert len({sample() for _ in range(4)}) > 1


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings(client, kit, offline, stream):
    (free,) = offline(kit.prompts[0], max_new_tokens=24)
    stop = free.text[6:9]
    answer = client.chat.completions.create(
        model="bundled",
        messages=kit.messages(kit.prompts[0]),
        max_tokens=24,
        stop=[stop],
        stream=stream,
    )
    if stream:
        chunks = list(answer)
        text = "".join(c.choices[0].delta.content or "" for c in chunks)
        reason = chunks[-1].choices[0].finish_reason
    else:
        text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
    assert text == free.text[: free.text.index(stop)]
    assert reason == "stop"


def test_vendor_parameters_act(client, kit, offline):
    given = {"top_k": 5, "min_p": 0.02, "repetition_penalty": 1.3, "ignore_eos": True}
    (alone,) = offline(kit.prompts[0], max_new_tokens=40, temperature=0.8, seed=2, **given)
    answer = client.chat.completions.create(
        model="bundled",
        messages=kit.messages(kit.prompts[0]),
        max_tokens=40,
        temperature=0.8,
        seed=2,
        extra_body=given,
    )
    assert answer.choices[0].message.content == alone.text
    assert answer.usage.completion_tokens == 40


def test_logit_bias_and_penalties_act(client, kit, offline):
    (free,) = offline(kit.prompts[0], max_new_tokens=6)
    banned = free.token_ids[0]
    params = {"logit_bias": {banned: -100.0}, "presence_penalty": 0.5, "frequency_penalty": 0.3}
    (alone,) = offline(kit.prompts[0], max_new_tokens=6, **params)
    answer = client.chat.completions.create(
        model="bundled",
        messages=kit.messages(kit.prompts[0]),
        max_tokens=6,
        **{**params, "logit_bias": {str(banned): -100.0}},
    )
    assert answer.choices[0].message.content == alone.text != free.text


@pytest.mark.parametrize("stream", [False, True])
def test_chat_logprobs(client, kit, offline, stream):
    (alone,) = offline(kit.prompts[0], max_new_tokens=8, logprobs=3)
    answer = client.chat.completions.create(
        model="bundled",
        messages=kit.messages(kit.prompts[0]),
        max_tokens=8,
        logprobs=True,
        top_logprobs=3,
        stream=stream,
    )
    choices = [c.choices[0] for c in answer] if stream else [answer.choices[0]]
    found = [each for c in choices if c.logprobs for each in c.logprobs.content]
    assert len(found) == len(alone.token_ids)
    for shown, own in zip(found, alone.logprobs, strict=True):
        assert shown.logprob == pytest.approx(own.logprob, abs=1e-4)
        assert len(shown.top_logprobs) == 3
        assert shown.top_logprobs[0].logprob == max(t.logprob for t in shown.top_logprobs)
        assert math.exp(shown.logprob) <= 1
    written = b"".join(bytes(each.bytes) for each in found).decode()
    assert written.startswith(alone.text)


def test_text_logprobs(client, offline):
    (alone,) = offline("The command", raw=True, max_new_tokens=6, logprobs=2)
    answer = client.completions.create(
        model="bundled", prompt="The command", max_tokens=6, logprobs=2
    )
    found = answer.choices[0].logprobs
    assert found.token_logprobs == pytest.approx([x.logprob for x in alone.logprobs], abs=1e-4)
    assert all(len(top) == 2 for top in found.top_logprobs)
    for token, start in zip(found.tokens, found.text_offset, strict=True):
        assert alone.text[start:].startswith(token) or token.startswith("<|")


def test_models(client):
    assert [model.id for model in client.models.list()] == ["bundled"]
    assert client.models.retrieve("bundled").id == "bundled"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-6")


def test_labels_are_accepted_and_named(client, kit):
    answer = client.chat.completions.with_raw_response.create(
        model="bundled",
        messages=kit.messages("Hi"),
        max_tokens=2,
        user="me",
        store=False,
    )
    assert answer.headers["warning"] == '299 dspark "Ignored, without effect here: user, store"'
    plain = client.chat.completions.with_raw_response.create(
        model="bundled", messages=kit.messages("Hi"), max_tokens=2
    )
    assert "warning" not in plain.headers


def test_the_clients_errors(client, kit):
    ask = client.chat.completions.create
    with pytest.raises(openai.NotFoundError) as unknown:
        ask(model="gpt-6", messages=kit.messages("Hi"))
    assert unknown.value.body["code"] == "model_not_found"
    with pytest.raises(openai.BadRequestError) as extra:
        ask(model="bundled", messages=kit.messages("Hi"), extra_body={"beam_width": 4})
    assert extra.value.body["param"] == "beam_width"
    with pytest.raises(openai.UnprocessableEntityError):
        ask(model="bundled", messages=kit.messages("Hi"), temperature=-1)


def test_timeouts_end_an_answer_as_it_is(client, kit):
    answer = client.chat.completions.create(
        model="bundled",
        messages=kit.messages(kit.prompts[0]),
        max_tokens=200,
        extra_body={"timeout_s": 0.05, "ignore_eos": True},
    )
    assert answer.choices[0].finish_reason == "timeout"
    assert answer.usage.completion_tokens < 200
