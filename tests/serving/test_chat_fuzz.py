"""Chats that imitate markers, have empty parts, images or very long lists of tools."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from dspark.errors import RequestError
from dspark.serving.openai.chat_fields import Message
from dspark.serving.openai.chat_template import ChatTemplate
from dspark.serving.openai.output_parser import AnswerParser, Content, Reasoning, ToolCall
from dspark.sources.names import BUNDLED

TEMPLATES = Path(__file__).parents[1] / "data/templates"
MARKS = (
    "<|im_start|>", "<|im_end|>", "<|im_start|>system\n", "<tool_call>", "</tool_call>",
    "<think>", "</think>", "<tool_response>", "{{ x }}", "{% raw %}", "{#", "\x00", "", " ", "\n",
    '{"name": "f", "arguments": {}}', "\u202e", "😀", "é",
)  # fmt: skip
TEXT = st.lists(st.sampled_from(MARKS) | st.text(max_size=5), max_size=6).map("".join)
PARTS = st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": TEXT}), max_size=3)
CALL = st.fixed_dictionaries(
    {
        "id": TEXT,
        "type": st.just("function"),
        "function": st.fixed_dictionaries(
            {"name": TEXT, "arguments": TEXT | st.just('{"a": [1, null, {}]}')}
        ),
    }
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "developer", "user", "assistant", "tool"])},
    optional={
        "content": st.none() | TEXT | PARTS,
        "name": TEXT,
        "tool_call_id": TEXT,
        "reasoning_content": TEXT,
        "tool_calls": st.none() | st.lists(CALL, max_size=2),
    },
)
SETTINGS = settings(max_examples=80, deadline=None, derandomize=True, database=None)


@pytest.fixture(scope="module", params=["own", *sorted(p.name for p in TEMPLATES.glob("*.jinja"))])
def template(request):
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    if request.param != "own":
        tokenizer.chat_template = (TEMPLATES / request.param).read_text()
    return ChatTemplate(tokenizer, "m")


def test_any_chat_is_rendered_or_refused_in_one_sentence(template):
    @SETTINGS
    @given(st.lists(MESSAGE, min_size=1, max_size=4), st.booleans())
    def check(messages, continues):
        given = [Message.model_validate(message).for_template() for message in messages]
        told = ""
        try:
            ids = template.encode(
                template.write(given, continues=continues, prompt=not continues)
            ).token_ids
        except RequestError as error:
            ids, told = (), str(error)
        assert ids or (told.endswith(".") and "\n" not in told)

    check()


@SETTINGS
@given(TEXT, st.booleans(), st.booleans(), st.booleans(), st.integers(1, 4))
def test_no_text_of_an_answer_is_lost(text, reasoning, tools, opened, size):
    """Streamed in pieces of any size, an answer parses as it does whole."""

    def parse(pieces):
        parser = AnswerParser(reasoning=reasoning, tools=tools, reasoning_open=opened)
        parts = [part for piece in pieces for part in parser.feed(piece)] + parser.finish()
        found = []
        for part in parts:  # neighbours of a kind are one
            if found and type(found[-1]) is type(part) and not isinstance(part, ToolCall):
                part = type(part)(found.pop().text + part.text)  # noqa: PLW2901
            found.append(part)
        return found

    whole = parse([text])
    assert parse([text[i : i + size] for i in range(0, len(text), size)]) == whole
    if not reasoning and not tools:
        assert whole == ([Content(text)] if text else [])
    assert all(isinstance(part, Content | Reasoning | ToolCall) for part in whole)


def test_images_are_refused_and_many_tools_are_not(live):
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    for part in (image, {"type": "input_audio"}, {"type": "text"}, {}):
        reply = live.chat(messages=[{"role": "user", "content": [part]}])
        assert reply.status in (400, 422), part
        assert reply.error["message"]
    tools = [{"type": "function", "function": {"name": f"f{i}"}} for i in range(5000)]
    reply = live.chat(tools=tools)
    assert reply.status == 400
    assert reply.error["message"]
