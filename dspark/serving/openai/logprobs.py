"""Single tokens as text and bytes, and log-probabilities in both of the API's shapes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from dspark.request import Logprob

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_REPLACEMENT = "\ufffd"


class TokenTexts:
    """Texts and bytes of single tokens, remembered.

    Args:
        tokenizer: a transformers tokenizer; without one, a token's text is its number.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, tuple[str, list[int] | None]] = {}

    def __call__(self, token_id: int) -> str:
        r"""The text; `bytes:\x..` where the token alone is no whole character."""
        return self._find(token_id)[0]

    def bytes_of(self, token_id: int) -> list[int] | None:
        """The UTF-8 bytes; None where they cannot be told."""
        return self._find(token_id)[1]

    def _find(self, token_id: int) -> tuple[str, list[int] | None]:
        if token_id not in self._known:
            self._known[token_id] = self._look_up(token_id)
        return self._known[token_id]

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


@lru_cache(maxsize=1)
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
