"""Markup is read the same however the answer is cut, and nothing of it is lost."""

import json
import random

import pytest

from dspark.serving.openai.output_parser import AnswerParser, Content, Reasoning, ToolCall

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [2, "</x>"]}}\n</tool_call>'
ADD = ToolCall("add", '{"a": 1, "b": [2, "</x>"]}')
CASES = [
    ("plain", "Just text, a < b and <b>bold</b>.", [Content("Just text, a < b and <b>bold</b>.")]),
    ("thought", "<think>\nHm.\n</think>\n\nYes.", [Reasoning("Hm."), Content("Yes.")]),
    ("no end", "<think>\nHm", [Reasoning("Hm")]),
    ("empty", "", []),
    ("empty thought", "<think>\n\n</think>\n\nYes", [Content("Yes")]),
    ("call", CALL, [ADD]),
    ("two calls", f"Let me see.\n{CALL}\n{CALL}", [Content("Let me see."), ADD, ADD]),
    ("all", f"<think>a <tool_call> b</think>{CALL}", [Reasoning("a <tool_call> b"), ADD]),
    ("no JSON", "<tool_call>oops</tool_call> x", [Content("<tool_call>oops</tool_call> x")]),
    ("no name", "<tool_call>[1]</tool_call>", [Content("<tool_call>[1]</tool_call>")]),
    ("cut call", "x<tool_call>{", [Content("x<tool_call>{")]),
    ("a mark and no more", "x<tool_call>", [Content("x<tool_call>")]),
    ("closing left out", '<tool_call>{"name": "f"}', [ToolCall("f", "{}")]),
    ("a mark in a string", CALL.replace("</x>", "</tool_call>"), [
        ToolCall("add", '{"a": 1, "b": [2, "</tool_call>"]}')
    ]),
    ("a string with no end", '<tool_call>{"a</tool_call> b', [
        Content('<tool_call>{"a</tool_call> b')
    ]),
    ("a beginning", "5 <thi", [Content("5 <thi")]),
    ("spaces at the end", "x  \n", [Content("x  \n")]),
]  # fmt: skip


def joined(parts):
    """Neighbouring texts of one kind as one."""
    found = []
    for part in parts:
        if found and type(found[-1]) is type(part) and not isinstance(part, ToolCall):
            found[-1] = type(part)(found[-1].text + part.text)
        else:
            found.append(part)
    return found


def parse(pieces, **options):
    parser = AnswerParser(**{"reasoning": True, "tools": True, **options})
    parts = [part for piece in pieces for part in parser.feed(piece)]
    return joined(parts + parser.finish())


@pytest.mark.parametrize(
    ("text", "wanted"), [case[1:] for case in CASES], ids=[c[0] for c in CASES]
)
def test_any_cut_gives_the_same(text, wanted):
    assert parse([text]) == wanted
    assert parse(list(text)) == wanted
    rng = random.Random(text)
    for _ in range(20):
        cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randint(0, 6)))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert parse(pieces) == wanted


def test_reasoning_that_the_prompt_has_opened():
    assert parse(["Hm.\n</th", "ink>\nYes"], reasoning_open=True) == [
        Reasoning("Hm."),
        Content("Yes"),
    ]


def test_marks_that_nobody_looks_for_are_text():
    text = f"<think>a</think>{CALL}"
    assert parse([text], reasoning=False, tools=False) == [Content(text)]
    assert parse([text], tools=False) == [Reasoning("a"), Content(CALL)]


def test_text_is_given_out_as_soon_as_it_is_decided():
    parser = AnswerParser(reasoning=True, tools=True)
    assert parser.feed("Hello") == [Content("Hello")]
    assert parser.feed(" <to") == []
    assert parser.feed("ast>") == [Content(" <toast>")]


def test_random_marks_lose_nothing():
    rng = random.Random(0)
    words = ["<think>", "</think>", "<tool_call>", "</tool_call>", "a", "b", "<", ">", '{"name":']
    for _ in range(300):
        pieces = rng.choices(words, k=rng.randint(1, 12))
        parts = parse(pieces)
        kept = "".join(part.text for part in parts if not isinstance(part, ToolCall))
        text = "".join(pieces)
        assert kept.count("b") == text.count("b")
        assert parts == parse(list(text))


def test_arguments_that_are_text_stay_as_they_are():
    (call,) = parse(["<tool_call>" + json.dumps({"name": "f", "arguments": "x"}) + "</tool_call>"])
    assert call == ToolCall("f", "x")
