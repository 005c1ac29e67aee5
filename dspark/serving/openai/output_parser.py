"""Output parser: reasoning and tool calls out of an answer's text, whole or streamed.

The markup of Qwen3 and of the Hermes family: `<think>...</think>`, and `<tool_call>` around a JSON
object with `name` and `arguments`. What only looks like it stays what it is: content. No character
of an answer is lost but the marks themselves and the white space around them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from dspark.serving.openai.chat_template import CALL, CALL_END, THINK, THINK_END


@dataclass(frozen=True)
class Content:
    """Text for the reader."""

    text: str


@dataclass(frozen=True)
class Reasoning:
    """Text of the model's reasoning."""

    text: str


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool, with its arguments as JSON."""

    name: str
    arguments: str


Part = Content | Reasoning | ToolCall


class AnswerParser:
    """Reads an answer piece by piece.

    Args:
        reasoning: look for reasoning.
        tools: look for calls of tools.
        reasoning_open: the prompt has opened a passage of reasoning.
    """

    def __init__(self, *, reasoning: bool, tools: bool, reasoning_open: bool = False) -> None:
        self._marks = [THINK] * reasoning + [CALL] * tools
        self._inside: str | None = THINK if reasoning and reasoning_open else None
        self._held = ""
        self._trims = self._inside == THINK  # white space after a mark is the mark's
        self._started = False

    def feed(self, text: str) -> list[Part]:
        """The parts that a further piece of text decides."""
        self._held += text
        found: list[Part] = []
        while (parts := self._advance(last=False)) is not None:
            found += parts
        return found

    def finish(self) -> list[Part]:
        """The rest, when no further text comes."""
        found: list[Part] = []
        while (parts := self._advance(last=True)) is not None:
            found += parts
        return found

    def _advance(self, *, last: bool) -> list[Part] | None:
        """Take what can be taken off the held text; None if nothing can."""
        if self._trims:
            self._held = self._held.lstrip()
            self._trims = not self._held
        if self._inside == CALL:
            return self._take_call(last)
        if not self._held:
            return None
        if self._inside == THINK:
            return self._take_reasoning(last)
        return self._take_content(last)

    def _take_content(self, last: bool) -> list[Part] | None:
        places = [(self._held.find(mark), mark) for mark in self._marks if mark in self._held]
        if places:
            place, mark = min(places)
            text = self._held[:place]
            self._held = self._held[place + len(mark) :]
            self._inside, self._trims = mark, mark == THINK
            return self._content(text.rstrip() if mark == CALL else text)
        return self._content(self._take_safe(self._marks, last, spaces=CALL in self._marks))

    def _content(self, text: str) -> list[Part] | None:
        return [Content(text)] if text else ([] if self._inside else None)

    def _take_reasoning(self, last: bool) -> list[Part] | None:
        text, mark, rest = self._held.partition(THINK_END)
        if mark:
            self._held, self._inside, self._trims = rest, None, True
            text = text.rstrip()
            return [Reasoning(text)] if text else []
        text = self._take_safe([THINK_END], last, spaces=True)
        return [Reasoning(text)] if text else None

    def _take_call(self, last: bool) -> list[Part] | None:
        text, mark, rest = _cut_call(self._held)
        if not mark and not last:
            return None
        call = read_call(text)
        if call is None and not mark:  # a string that never ends holds no marks
            text, mark, rest = self._held.partition(CALL_END)
        self._held, self._inside, self._trims = rest, None, call is not None
        return [call] if call else [Content(CALL + text + mark)]

    def _take_safe(self, marks: list[str], last: bool, *, spaces: bool) -> str:
        """Take what cannot become part of a mark; white space before one belongs to it."""
        keep = 0
        if not last:
            keep = max((_overlap(self._held, mark) for mark in marks), default=0)
            if spaces:
                body = self._held[: len(self._held) - keep]
                keep += len(body) - len(body.rstrip())
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text


def _overlap(text: str, mark: str) -> int:
    """How much of the end of `text` is a beginning of `mark`."""
    longest = min(len(text), len(mark) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(mark[:n])), 0)


def _cut_call(text: str) -> tuple[str, str, str]:
    """Cut as `str.partition` does, at the first end mark that is not within a JSON string."""
    end = text.find(CALL_END)
    while end >= 0 and _ends_within_string(text[:end]):
        end = text.find(CALL_END, end + len(CALL_END))
    return (text[:end], CALL_END, text[end + len(CALL_END) :]) if end >= 0 else (text, "", "")


def _ends_within_string(text: str) -> bool:
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return error.msg.startswith("Unterminated string")
    except RecursionError:
        return False
    return False


def read_call(text: str) -> ToolCall | None:
    """What is written between the marks of a call; None where that is no call."""
    try:
        call: Any = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", {})
    written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return ToolCall(call["name"], written)
