"""Texts as prompts are compared: words, and what counts as the same text."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from hashlib import blake2b

# Scripts that put no spaces between words: each character is a word.
_UNSPACED = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\uac00-\ud7af"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
_AROUND_WORDS = (
    ".,;:!?\"'`()[]{}*_#"
    "\u2026\u201c\u201d\u2018\u2019\u00ab\u00bb\u2013\u2014"  # typographic marks and dashes
    "\u3001\u3002\u300c\u300d"  # CJK marks that have no compatibility form
)


def words_of(text: str) -> list[str]:
    """The words of a text: runs of letters and digits, in compatibility form and lower case.

    A character of a script without spaces (Han, kana, hangul) is a word of its own.
    """
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def near_text(text: str) -> str:
    """A text without what tells near duplicates apart.

    Compatibility characters, upper case, the width of white space, and punctuation or markup at
    either end of a word go; digits, operators and punctuation within words stay, so that two sums
    are two texts.
    """
    spaced = unicodedata.normalize("NFKC", text).casefold().split()
    return " ".join(filter(None, (word.strip(_AROUND_WORDS) for word in spaced)))


def digest(texts: Iterable[str]) -> int:
    """64 bits that name a row of texts."""
    hasher = blake2b(digest_size=8)
    for text in texts:
        data = text.encode()
        hasher.update(len(data).to_bytes(8, "little") + data)
    return int.from_bytes(hasher.digest(), "little")
