"""Outputs in the API's terms: reasoning and tool calls read out of the text, log-probabilities."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from dspark.request import Logprob
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


_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_REPLACEMENT = "\ufffd"


class TokenTexts:
    """Texts and bytes of single tokens, remembered.

    Args:
        tokenizer: a transformers tokenizer; without one, a token's text is its number.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._find = cache(self._look_up)

    def __call__(self, token_id: int) -> str:
        r"""The text; `bytes:\x..` where the token alone is no whole character."""
        return self._find(token_id)[0]

    def bytes_of(self, token_id: int) -> list[int] | None:
        """The UTF-8 bytes; None where they cannot be told."""
        return self._find(token_id)[1]

    def _look_up(self, token_id: int) -> tuple[str, list[int] | None]:
        if self._tokenizer is None:
            text = str(token_id)
            return text, list(text.encode())
        text = self._tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
        if _REPLACEMENT not in text:
            return text, list(text.encode())
        found = _piece_bytes(self._tokenizer.convert_ids_to_tokens(token_id))
        if found is None:
            return text, None
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found), list(found)


def _piece_bytes(piece: str | None) -> bytes | None:
    """The bytes that a piece of the vocabulary stands for, where it stands for bytes."""
    if not piece:
        return None
    match = _BYTE_PIECE.fullmatch(piece)
    if match:
        return bytes([int(match[1], 16)])
    letters = _byte_letters()
    if all(letter in letters for letter in piece):
        return bytes(letters[letter] for letter in piece)
    return None


@cache
def _byte_letters() -> dict[str, int]:
    """The letters by which byte-level tokenizers write bytes (Radford et al. 2019)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(0x100 + i): b for i, b in enumerate(others)}


def chat_logprobs(found: Sequence[Logprob], texts: TokenTexts) -> dict[str, Any]:
    """Log-probabilities as chat completions show them."""

    def shown(token_id: int, value: float) -> dict[str, Any]:
        return {"token": texts(token_id), "logprob": value, "bytes": texts.bytes_of(token_id)}

    return {
        "content": [
            shown(each.token_id, each.logprob)
            | {"top_logprobs": [shown(token, value) for token, value in each.top]}
            for each in found
        ],
        "refusal": None,
    }


def text_logprobs(
    found: Sequence[Logprob | None], texts: TokenTexts, offset: int, first_id: int = -1
) -> dict[str, Any]:
    """Log-probabilities as text completions show them.

    Args:
        found: of the tokens; None for the first of a prompt, which nothing predicts.
        texts: of tokens.
        first_id: that token.
        offset: characters of the answer before them; tokens that are no whole characters count
            as their `bytes:` writing does not: by what they add once decoded, that is, nothing.
    """
    ids = [first_id if each is None else each.token_id for each in found]
    offsets = []
    for token_id in ids:
        offsets.append(offset)
        text = texts(token_id)
        offset += 0 if text.startswith("bytes:") else len(text)
    return {
        "tokens": [texts(token_id) for token_id in ids],
        "token_logprobs": [None if each is None else _finite(each.logprob) for each in found],
        "top_logprobs": [
            None if each is None else {texts(token): value for token, value in each.top}
            for each in found
        ],
        "text_offset": offsets,
    }


def _finite(logprob: float) -> float:
    """A number for JSON, which has no infinite ones: that of vLLM."""
    return max(logprob, -9999.0)
