"""Chats become the very tokens that the template means, and nothing is lost in it."""

import json

import pytest

from dspark.data.templates import train_tokenizer
from dspark.engine.requests.sequence import Piece
from dspark.errors import RequestError
from dspark.request import Output, Stats
from dspark.serving.openai.chat import ChatWriter
from dspark.serving.openai.chat_fields import Message
from dspark.serving.openai.chat_template import ChatTemplate, encode
from dspark.serving.openai.output_parser import AnswerParser, TokenTexts

# The parts of Qwen3's template that matter here.
TEMPLATE = """
{%- if tools %}{{ '<|im_start|>system\n' }}{% for tool in tools %}{{ tool | tojson }}
{% endfor %}{{ '<|im_end|>\n' }}{% endif %}
{%- for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content }}
{%- for call in message.tool_calls or [] %}{{ '<tool_call>' }}
{{- {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}
{{- '</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and enable_thinking %}{{ '<think>\n' }}{% endif %}
{%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}
{%- endif %}{% endif %}"""
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


@pytest.fixture(scope="module")
def tokenizer():
    made = train_tokenizer(["how many apples are left, a table for two"] * 4, 300)
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="module")
def template(tokenizer):
    return ChatTemplate.of(tokenizer, "tiny")


def test_a_chat_is_what_the_engine_makes_of_it(model, kit):
    own = ChatTemplate.of(model.target.tokenizer, "bundled")
    for text in kit.prompts:
        assert own.encode(own.write(kit.messages(text))).token_ids == model.encode(
            kit.messages(text)
        )


def test_tools_options_and_calls_reach_the_template(template, tokenizer):
    messages = [
        {"role": "user", "content": "1 + 1?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
            ],
        },
        {"role": "tool", "content": "2", "tool_call_id": "x"},
    ]
    rendered = template.encode(template.write(messages, [TOOL], {"enable_thinking": True}))
    text = tokenizer.decode(rendered.token_ids)
    assert json.dumps(TOOL["function"]["parameters"]) in text
    assert '"arguments": {"a": 1}' in text
    assert text.endswith("<|im_start|>assistant\n<think>\n")
    assert rendered.reasoning_open
    assert not template.encode(
        template.write(messages, None, {"enable_thinking": False})
    ).reasoning_open
    assert not template.encode(template.write(messages)).reasoning_open
    asked = [{"role": "user", "content": "What is <think>?"}]  # which opens nothing
    assert not template.encode(template.write(asked)).reasoning_open


def test_what_has_no_place_is_refused(model, template, kit):
    plain = ChatTemplate.of(model.target.tokenizer, "bundled")
    with pytest.raises(RequestError, match="no place for tools"):
        plain.encode(plain.write(kit.messages("Hi"), [TOOL]))
    with pytest.raises(RequestError, match="'enable_thinking'"):
        plain.encode(plain.write(kit.messages("Hi"), None, {"enable_thinking": True}))
    with pytest.raises(RequestError, match="'style'"):
        template.encode(template.write(kit.messages("Hi"), None, {"style": 1}))
    with pytest.raises(RequestError, match="refuses"):
        template.encode(template.write([{"role": "user", "content": None}]))
    with pytest.raises(RequestError, match="surrogate"):
        encode(model.target.tokenizer, "\ud800")
    assert ChatTemplate.of(None, "x") is None


def test_messages_as_clients_send_them():
    message = Message.model_validate(
        {
            "role": "assistant",
            "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}},
                {"id": "2", "type": "function", "function": {"name": "g", "arguments": "no JSON"}},
            ],
            "refusal": None,
            "audio": None,
            "function_call": None,
            "annotations": [],
        }
    )
    found = message.for_template()
    assert found["content"] == "ab"
    assert [call["function"]["arguments"] for call in found["tool_calls"]] == [{"a": 1}, "no JSON"]
    assert Message(role="developer", content="x").for_template()["role"] == "system"


def output_of(text, reason="stop"):
    return Output("", text, (1, 2), reason, Stats())


@pytest.fixture
def writer(tokenizer):
    def make():
        parser = AnswerParser(reasoning=True, tools=True)
        return ChatWriter(0, parser, TokenTexts(tokenizer), logprobs=False)

    return make


def test_calls_and_reasoning_in_a_whole_answer(writer):
    choice = writer().full(output_of(f"<think>Hm.</think>\n\nWait. {CALL}\n{CALL}"))
    message = choice["message"]
    assert message["reasoning_content"] == "Hm."
    assert message["content"] == "Wait."
    assert [call["function"] for call in message["tool_calls"]] == [
        {"name": "add", "arguments": '{"a": 1}'}
    ] * 2
    assert choice["finish_reason"] == "tool_calls"
    assert len({call["id"] for call in message["tool_calls"]}) == 2
    alone = writer().full(output_of(CALL))["message"]
    assert alone["content"] is None
    cut = writer().full(output_of(f"{CALL} x", "length"))
    assert cut["finish_reason"] == "length"


def test_calls_and_reasoning_in_a_stream(writer):
    text = f"<think>Hm.</think>\n\nWait. {CALL}\n{CALL}"
    speaker, choices = writer(), []
    for letter in text[:-3]:
        choices += speaker.stream_delta([Piece(letter, 1, drafted=False)])
    choices += speaker.stream_end(output_of(text))
    deltas = [choice["delta"] for choice in choices]
    assert deltas[0]["role"] == "assistant"
    assert "".join(d.get("content", "") for d in deltas) == "Wait."
    assert "".join(d.get("reasoning_content", "") for d in deltas) == "Hm."
    calls = [call for d in deltas for call in d.get("tool_calls", [])]
    assert [call["index"] for call in calls] == [0, 1]
    assert choices[-1]["finish_reason"] == "tool_calls"


def test_bytes_of_tokens(tokenizer):
    texts = TokenTexts(tokenizer)
    ids = tokenizer("é")["input_ids"]
    assert len(ids) == 2  # no merge was learned for it
    assert [texts(i) for i in ids] == ["bytes:\\xc3", "bytes:\\xa9"]
    assert bytes(byte for i in ids for byte in texts.bytes_of(i)) == "é".encode()
    assert texts.bytes_of(tokenizer("a")["input_ids"][0]) == [97]
    assert TokenTexts(None)(7) == "7"
