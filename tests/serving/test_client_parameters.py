"""Parameters that real clients send: each acts, is named in a warning, or is refused."""

import pytest

IGNORED = {
    "user": "u",
    "store": True,
    "metadata": {"a": "b"},
    "service_tier": "auto",
    "safety_identifier": "s",
    "prompt_cache_key": "k",
    "prediction": {"type": "content", "content": "x"},
}


def text(live, prompt, **fields):
    reply = live.post("/v1/completions", {"prompt": prompt, **fields})
    assert reply.status == 200, reply.json
    return reply.json["choices"][0]


@pytest.fixture
def client(live):
    with live.client() as made:
        yield made


def test_what_changes_nothing_is_named_in_a_warning(live):
    plain = live.chat(max_tokens=8)
    more = {"reasoning_effort": "high", "verbosity": "low"}  # the template knows neither
    same = {"parallel_tool_calls": True, "modalities": ["text"], "skip_special_tokens": True,
            "add_generation_prompt": True, "chat_template_kwargs": {}}  # fmt: skip
    reply = live.chat(max_tokens=8, **IGNORED, **more, **same)
    assert reply.json["choices"] == plain.json["choices"]
    found = reply.headers["warning"]
    assert found.startswith('299 dspark "')
    assert all(name in found for name in (*IGNORED, *more))
    assert not any(name in found for name in same)
    assert "warning" not in plain.headers


@pytest.mark.parametrize("name", ["unheard_of", "x-y", "logit_biases"])
def test_unknown_names_are_refused(live, name):
    reply = live.chat(**{name: 1})
    assert (reply.status, reply.error["code"]) == (400, "unknown_parameter")


def test_an_answer_goes_on_where_the_last_message_ends(live, kit, client):
    whole = live.chat(max_tokens=24).json["choices"][0]["message"]["content"]
    begun = whole[: len(whole) // 2].rstrip()
    messages = [*kit.messages(kit.prompts[0]), {"role": "assistant", "content": begun}]
    ask = {"messages": messages, "continue_final_message": True, "max_tokens": 24}
    rest = live.post("/v1/chat/completions", ask).json["choices"][0]["message"]["content"]
    assert (begun + rest).startswith(whole)
    echoed = live.post("/v1/chat/completions", {**ask, "echo": True})
    assert echoed.json["choices"][0]["message"]["content"] == begun + rest
    stream = client.chat.completions.create(
        model="bundled", messages=messages, max_tokens=24, stream=True,
        extra_body={"continue_final_message": True, "echo": True},
    )  # fmt: skip
    assert "".join(c.choices[0].delta.content or "" for c in stream) == begun + rest
    anew = live.post("/v1/chat/completions", {"messages": messages, "max_tokens": 24})
    assert anew.json["choices"][0]["message"]["content"] != rest


@pytest.mark.parametrize(
    "fields",
    [
        {"continue_final_message": True},
        {"echo": True},
        {"add_generation_prompt": True, "continue_final_message": True,
         "messages": [{"role": "assistant", "content": "x"}]},
        {"min_tokens": 3, "response_format": {"type": "json_object"}},
    ],
)  # fmt: skip
def test_what_contradicts_itself_is_refused(live, fields):
    reply = live.chat(**fields)
    assert (reply.status, reply.error["code"]) == (400, "invalid_combination")


def test_min_tokens_keep_an_answer_from_ending(live):
    short = live.chat(max_tokens=200).json
    assert short["choices"][0]["finish_reason"] == "stop"
    least = short["usage"]["completion_tokens"] + 5
    long = live.chat(max_tokens=200, min_tokens=least).json
    assert long["usage"]["completion_tokens"] >= least
    assert live.chat(max_tokens=4, min_tokens=5).error["param"] == "min_tokens"


def test_bad_words_do_not_come(live, kit):
    free = live.chat(max_tokens=24).json["choices"][0]["message"]["content"]
    words = free.split()[:3]
    held = live.chat(max_tokens=24, bad_words=words).json["choices"][0]["message"]["content"]
    assert words[0] not in held.split()
    assert held != free
    assert live.chat(bad_words=[" "]).error["param"] == "bad_words"


def test_prompts_are_cut_at_their_beginning(live, model):
    ids = list(model.encode("one two three four five six", raw=True))
    cut = live.post(
        "/v1/completions", {"prompt": ids, "truncate_prompt_tokens": 4, "max_tokens": 8}
    )
    assert cut.json["usage"]["prompt_tokens"] == 4
    alone = live.post("/v1/completions", {"prompt": ids[-4:], "max_tokens": 8})
    assert cut.json["choices"] == alone.json["choices"]
    many = ids * 100
    refused = live.post("/v1/completions", {"prompt": many, "max_tokens": 8})
    assert refused.status == 400
    fits = live.post(
        "/v1/completions", {"prompt": many, "max_tokens": 8, "truncate_prompt_tokens": -1}
    )
    assert fits.json["usage"]["prompt_tokens"] == 256 - 8
    assert live.chat(truncate_prompt_tokens=0).error["param"] == "truncate_prompt_tokens"


def test_echo_scores_the_prompt_as_generation_scores_answers(live, model, client):
    """What is generated, then echoed as a prompt, has the same log-probabilities."""
    prompt = "A train travels"
    made = text(live, prompt, max_tokens=12, logprobs=2)
    whole = text(live, prompt + made["text"], max_tokens=1, logprobs=2, echo=True)
    assert whole["text"].startswith(prompt + made["text"])
    shown = whole["logprobs"]
    count = len(model.encode(prompt, raw=True))
    assert (shown["token_logprobs"][0], shown["top_logprobs"][0]) == (None, None)
    assert shown["text_offset"][0] == 0
    assert "".join(shown["tokens"]) == whole["text"]
    if shown["tokens"][count : count + 12] == made["logprobs"]["tokens"]:
        again = shown["token_logprobs"][count : count + 12]
        assert again == pytest.approx(made["logprobs"]["token_logprobs"], abs=1e-4)
    scored = text(live, prompt + made["text"], max_tokens=0, logprobs=2, echo=True)
    assert scored["text"] == prompt + made["text"]
    assert scored["logprobs"]["token_logprobs"] == shown["token_logprobs"][:-1]
    many = live.post(
        "/v1/completions", {"prompt": ["a b", "c d"], "max_tokens": 0, "echo": True, "logprobs": 0}
    )
    assert [choice["text"] for choice in many.json["choices"]] == ["a b", "c d"]
    assert many.json["usage"]["completion_tokens"] == 0
    stream = client.completions.create(
        model="bundled", prompt=prompt, max_tokens=12, echo=True, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == prompt + made["text"]
    wrong = {"prompt": "a", "echo": True, "logprobs": 1, "stream": True}
    assert live.post("/v1/completions", wrong).status == 400
    assert live.post("/v1/completions", {"prompt": "a", "max_tokens": 0}).status == 422


def test_tokens_go_there_and_back(live, model, kit):
    words = "It costs 12 dollars."
    found = live.post("/tokenize", {"prompt": words, "return_token_strs": True}).json
    assert found["tokens"] == list(model.encode(words, raw=True))
    assert (found["count"], found["max_model_len"]) == (len(found["tokens"]), 256)
    assert "".join(found["token_strs"]) == words
    assert live.post("/detokenize", {"tokens": found["tokens"]}).json == {"prompt": words}
    chat = live.post("/tokenize", {"messages": kit.messages("Hi")}).json
    assert chat["tokens"] == list(model.encode("Hi", raw=False))
    assert live.post("/tokenize", {"prompt": ""}).json["tokens"] == []
    assert live.post("/tokenize", {}).status == 400
    assert live.post("/detokenize", {"tokens": [1 << 40]}).status == 422


def test_supervisors_are_answered(live):
    import dspark

    assert live.ask("GET", "/version").json == {"version": dspark.__version__}
    for method in ("GET", "POST"):
        assert live.ask(method, "/ping").status == 200
