"""`/v1/responses` through the official client: whole, streamed, with tools and reasoning."""

import json

import pytest

import dspark
from dspark.serving.openai.response_fields import ResponseFields
from dspark.serving.openai.responses import ResponseFraming

TOOL = {
    "type": "function",
    "name": "add",
    "parameters": {
        "type": "object",
        "properties": {"a": {"enum": [1, 2]}},
        "required": ["a"],
        "additionalProperties": False,
    },
}

TEMPLATE = """{%- if tools %}{{ tools | tojson }}{% endif %}
{%- for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content }}
{%- for call in message.tool_calls or [] %}{{ '<tool_call>\n{"name": "' + call.function.name }}
{{- '", "arguments": ' }}{{ call.function.arguments | tojson }}{{ '}\n</tool_call>' }}
{%- endfor %}{{ '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


@pytest.fixture
def client(live):
    with live.client() as made:
        yield made


def test_a_text_is_that_of_a_chat(live, kit, client):
    chat = live.chat(max_tokens=24).json
    found = client.responses.create(model="bundled", input=kit.prompts[0], max_output_tokens=24)
    assert found.output_text == chat["choices"][0]["message"]["content"]
    assert found.usage.input_tokens == chat["usage"]["prompt_tokens"]
    assert found.usage.output_tokens == chat["usage"]["completion_tokens"]
    cut = chat["choices"][0]["finish_reason"] == "length"
    assert found.status == ("incomplete" if cut else "completed")
    short = client.responses.create(model="bundled", input=kit.prompts[0], max_output_tokens=2)
    assert (short.status, short.incomplete_details.reason) == ("incomplete", "max_output_tokens")


def test_a_stream_says_the_same_and_numbers_its_events(live, kit, client):
    whole = client.responses.create(model="bundled", input=kit.prompts[0], max_output_tokens=200)
    with client.responses.stream(
        model="bundled", input=kit.prompts[0], max_output_tokens=200
    ) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert final.output_text == whole.output_text
    assert final.usage == whole.usage
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created", "response.in_progress",
        "response.output_item.added", "response.content_part.added",
    ]  # fmt: skip
    assert kinds[-4:-1] == [
        "response.output_text.done", "response.content_part.done", "response.output_item.done"
    ]  # fmt: skip
    assert [event.sequence_number for event in events] == list(range(len(events)))
    said = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    assert said == whole.output_text


def test_instructions_and_items_are_the_messages_of_a_chat(live):
    chat = live.post(
        "/v1/chat/completions",
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hello"},
                {"role": "user", "content": "What does `tar` do?"},
            ],
            "max_tokens": 16,
        },
    ).json
    found = live.post(
        "/v1/responses",
        {
            "instructions": "Be brief.",
            "input": [
                {"role": "user", "content": "Hi"},
                {
                    "type": "message", "id": "msg_1", "status": "completed", "role": "assistant",
                    "content": [{"type": "output_text", "text": "Hello", "annotations": []}],
                },
                {
                    "role": "user",
                    "content": [{"type": "input_text", "text": "What does `tar` do?"}],
                },
            ],
            "max_output_tokens": 16, "store": True, "include": ["reasoning.encrypted_content"],
        },
    )  # fmt: skip
    [item] = found.json["output"]
    assert item["content"][0]["text"] == chat["choices"][0]["message"]["content"]
    assert "store" in found.headers["warning"]
    assert "include" in found.headers["warning"]


@pytest.fixture(scope="module")
def with_tools(kit):
    """A server of a model whose template writes tools and calls down."""
    made = dspark.load("bundled", dtype="float32")
    made.target.tokenizer.chat_template = TEMPLATE
    with kit.serve(made, max_length=1024) as started:
        yield started


@pytest.mark.parametrize("stream", [False, True])
def test_a_forced_call_comes_back_as_an_item(with_tools, stream):
    pytest.importorskip("llguidance")
    ask = {"model": "bundled", "input": "Add.", "tools": [TOOL], "max_output_tokens": 100}
    ask["tool_choice"] = {"type": "function", "name": "add"}
    with with_tools.client() as client:
        if stream:
            with client.responses.stream(**ask) as events:
                found = events.get_final_response()
        else:
            found = client.responses.create(**ask)
    [call] = found.output
    assert (call.type, call.name) == ("function_call", "add")
    assert json.loads(call.arguments)["a"] in (1, 2)
    said = call.model_dump(include={"type", "call_id", "name", "arguments"})
    items = [
        {"role": "user", "content": "Add."},
        {"type": "reasoning", "summary": [], "id": "rs_1"},
        said,
        {"type": "function_call_output", "call_id": call.call_id, "output": "3"},
    ]
    ask = {"input": items, "tools": [TOOL], "max_output_tokens": 4}
    follow = with_tools.post("/v1/responses", ask)
    assert follow.status == 200, follow.json
    function = {"name": "add", "arguments": said["arguments"]}
    calls = [{"id": call.call_id, "type": "function", "function": function}]
    messages = [
        items[0],
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "3", "tool_call_id": call.call_id},
    ]
    tools = [{"type": "function", "function": {k: v for k, v in TOOL.items() if k != "type"}}]
    chat = with_tools.chat(messages=messages, tools=tools, max_tokens=4)
    assert follow.json["usage"]["input_tokens"] == chat.json["usage"]["prompt_tokens"]


def test_reasoning_text_and_calls_are_items_in_their_order():
    framing = ResponseFraming("r", "m", ResponseFields(input="x"))
    deltas = [
        {"role": "assistant", "content": ""},
        {"reasoning_content": "Hm"},
        {"reasoning_content": "."},
        {"content": "Yes"},
        {"tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "{}"}}]},
    ]
    written = framing.begin()
    for delta in deltas:
        written += framing.event({"delta": delta, "logprobs": None, "finish_reason": None})
    written += framing.event({"delta": {}, "logprobs": None, "finish_reason": "tool_calls"})
    usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3, "dspark": {}}
    written += framing.end(usage)
    events = [json.loads(block.split("data: ")[1]) for block in written.split("\n\n") if block]
    message = {
        "content": "Yes", "reasoning_content": "Hm.", "tool_calls": deltas[-1]["tool_calls"]
    }  # fmt: skip
    whole = ResponseFraming("r", "m", ResponseFields(input="x")).full(
        [{"message": message, "logprobs": None, "finish_reason": "tool_calls"}], usage
    )
    assert events[-1]["response"]["output"] == whole["output"]
    assert [item["type"] for item in whole["output"]] == ["reasoning", "message", "function_call"]
    assert whole["status"] == "completed"


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"input": []}, 422),
        ({}, 422),
        ({"input": "x", "previous_response_id": "resp_1"}, 422),
        ({"input": "x", "tools": [{"type": "web_search"}]}, 422),
        ({"input": "x", "max_tokens": 3}, 400),
        ({"input": "x", "truncation": "auto"}, 422),
        ({"input": "x", "tool_choice": "required"}, 400),
    ],
)
def test_what_cannot_be_done_is_refused(live, fields, status):
    assert live.post("/v1/responses", fields).status == status
    assert live.post("/v1/responses", fields).error["message"]
