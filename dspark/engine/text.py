"""From tokens to text, one token at a time, with stop strings held back until decided."""

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
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
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
        if len(after) > len(self._context) and not after.endswith("\ufffd"):
            self._held += after[len(self._context) :]
            self._advance()
        return self._settle()

    def hold(self, token_id: int) -> None:
        """Add a token without decoding; `finish` decodes all that was held. Not after `push`."""
        self._waiting.append(token_id)

    def finish(self) -> str:
        """Return what is still held back, when no further token comes; may set `stopped`."""
        if self.stopped:
            return ""
        given = self._push_waiting()
        self._held += self._decode(self._ids[self._prefix :])[len(self._context) :]
        self._advance()
        given += self._settle() + self._held
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

    def _settle(self) -> str:
        found = [at for at in (self._held.find(s) for s in self._stop) if at >= 0]
        if found:
            self.stopped = True
            given, self._held = self._held[: min(found)], ""
        else:
            keep = max((_overlap(self._held, s) for s in self._stop), default=0)
            cut = len(self._held) - keep
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


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
