"""Detokenizer: text from tokens as they come; possible stop strings are held back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class TextStream:
    """Decodes a growing list of tokens.

    Text is given out once it can no longer change: bytes of an unfinished character wait for the
    rest, and an end that could grow into a stop string waits until it does or does not. Where
    bytes are no valid text at all, what they look like may hang on when they were decoded; the
    text is then what pushing token by token gives, also where the tokens were held.

    Args:
        tokenizer: a transformers tokenizer.
        stop: strings that end the text; the string itself is never given out.
        min_tokens: tokens in whose text nothing is looked for.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), min_tokens: int = 0) -> None:
        self._min_tokens = min_tokens
        self._tokenizer = tokenizer
        self._stops = tuple(map(_StopString, stop))
        self._ids: list[int] = []
        self._waiting: list[int] = []
        # ids[prefix:read] are settled, and decode to `context`; they are decoded again with what
        # follows, since a token's text may hang on the one before it.
        self._prefix = self._read = 0
        self._context = ""
        self._held = ""
        self.text = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Add a token and return the text that it settles; sets `stopped` at a stop string."""
        self._ids.append(token_id)
        after = self._decode(self._ids[self._prefix :])
        if len(after) <= len(self._context) or after.endswith("\ufffd"):
            return ""
        settled = after[len(self._context) :]
        self._advance()
        return self._settle(settled)

    def hold(self, token_id: int) -> None:
        """Add a token without decoding; `finish` decodes all that was held. Not after `push`."""
        self._waiting.append(token_id)

    def finish(self) -> str:
        """Return what is still held back, when no further token comes; may set `stopped`."""
        if self.stopped:
            return ""
        given = self._push_waiting()
        rest = self._decode(self._ids[self._prefix :])[len(self._context) :]
        self._advance()
        given += self._settle(rest) + self._held
        self.text += self._held
        self._held = ""
        return given

    def _push_waiting(self) -> str:
        waiting, self._waiting = self._waiting, []
        if "\ufffd" in self._decode(waiting):
            return "".join(map(self.push, waiting))
        self._ids += waiting
        return ""

    def _advance(self) -> None:
        self._prefix, self._read = self._read, len(self._ids)
        self._context = self._decode(self._ids[self._prefix :])

    def _settle(self, new: str) -> str:
        """Give out what can no longer become part of a stop string, of `new` text and held."""
        if len(self._ids) <= self._min_tokens:
            self.text += new
            return new
        before = len(self._held)
        self._held += new
        starts = [before + end - len(s.text) for s in self._stops if (end := s.feed(new))]
        if starts:
            self.stopped = True
            given, self._held = self._held[: min(starts)], ""
        else:
            cut = len(self._held) - max((s.matched for s in self._stops), default=0)
            given, self._held = self._held[:cut], self._held[cut:]
        self.text += given
        return given

    def _decode(self, ids: list[int]) -> str:
        if not ids:
            return ""
        text: str = self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text


class _StopString:
    """Looks for one string in a growing text, each character once (Knuth, Morris & Pratt 1977).

    Attributes:
        text: the string.
        matched: how many of its characters the text ends with.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        # borders[i]: length of the longest proper beginning of text[: i + 1] that also ends it
        self._borders = [0]
        size = 0
        for letter in text[1:]:
            while size and letter != text[size]:
                size = self._borders[size - 1]
            size += letter == text[size]
            self._borders.append(size)

    def feed(self, new: str) -> int:
        """Read on; how much of `new` there is up to the end of the first match, 0 without one."""
        text, borders, size = self.text, self._borders, self.matched
        for place, letter in enumerate(new):
            while size and letter != text[size]:
                size = borders[size - 1]
            size += letter == text[size]
            if size == len(text):
                return place + 1
        self.matched = size
        return 0
