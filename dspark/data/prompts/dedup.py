"""Deduplication and decontamination of prompts.

Two prompts are near duplicates if `near_text` maps them to the same text. A prompt is contaminated
if it shares N consecutive words with an evaluation prompt, or equals one that is shorter than that.
Wording shared by many evaluation prompts, such as "please reason step by step", does not count: a
word inside an n-gram of `WORDING_WORDS` words that occurs in more than `WORDING_PROMPTS` of them is
removed, and matches do not extend across it.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from dspark.data.conversations import read_record
from dspark.data.files.json_lines import json_lines_files, read_json_lines

# Scripts that put no spaces between words: each character is a word.
_UNSPACED = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\uac00-\ud7af"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
_AROUND_WORDS = (
    ".,;:!?\"'`()[]{}*_#"
    "\u2026\u201c\u201d\u2018\u2019\u00ab\u00bb\u2013\u2014"  # typographic marks and dashes
    "\u3001\u3002\u300c\u300d"  # CJK marks that have no compatibility form
)


def words_of(text: str) -> list[str]:
    """The words of a text: runs of letters and digits, NFKC-normalised and case-folded.

    Each character of a script without spaces (Han, kana, hangul) is a word.
    """
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def near_text(text: str) -> str:
    """A normalised text that is equal for near duplicates.

    Compatibility characters, case, the width of white space, and punctuation or markup at either
    end of a word are removed; digits, operators and punctuation within words stay, so that two sums
    remain different texts.
    """
    spaced = unicodedata.normalize("NFKC", text).casefold().split()
    return " ".join(filter(None, (word.strip(_AROUND_WORDS) for word in spaced)))


def digest(texts: Iterable[str]) -> int:
    """A 64-bit hash of a sequence of texts."""
    hasher = blake2b(digest_size=8)
    for text in texts:
        data = text.encode()
        hasher.update(len(data).to_bytes(8, "little") + data)
    return int.from_bytes(hasher.digest(), "little")


WORDING_WORDS, WORDING_PROMPTS = 6, 10
Words = tuple[str, ...]


@dataclass(frozen=True)
class Match:
    """A match between a prompt and an evaluation prompt.

    Attributes:
        against: file and line of the evaluation prompt.
        words: the words that both contain.
    """

    against: str
    words: str


class EvaluationTexts:
    """An n-gram index of evaluation sets.

    Args:
        texts: (file and line, text) of every evaluation prompt.
        ngram: number of consecutive words that make a match.
    """

    def __init__(self, texts: Iterable[tuple[str, str]], ngram: int = 13) -> None:
        self.ngram = ngram
        found = [(where, words_of(text)) for where, text in texts]
        wording = _wording([words for _, words in found])
        self._where = [where for where, _ in found]
        self._rows: dict[int, int] = {}
        self._short: dict[Words, int] = {}
        for index, (_, words) in enumerate(found):
            runs = list(_runs_without(words, wording))
            for row in (row for run in runs for row in _rows(run, ngram)):
                self._rows.setdefault(hash(row), index)
            if not any(len(run) >= ngram for run in runs):
                self._short.setdefault(tuple(words), index)
                self._short.setdefault(tuple(word for run in runs for word in run), index)
        self._short.pop((), None)

    def __len__(self) -> int:
        return len(self._where)

    def match(self, text: str) -> Match | None:
        """The text's first match with the evaluation sets; None if it is clean."""
        words = words_of(text)
        whole = self._short.get(tuple(words))
        if whole is not None:
            return Match(self._where[whole], " ".join(words))
        for row in _rows(words, self.ngram):
            index = self._rows.get(hash(row))
            if index is not None:
                return Match(self._where[index], " ".join(row))
        return None


def _rows(words: Sequence[str], size: int) -> Iterator[Words]:
    return (tuple(words[i : i + size]) for i in range(len(words) - size + 1))


def _wording(prompts: Sequence[Sequence[str]]) -> set[int]:
    """Hashes of the n-grams that many prompts share."""
    counts: Counter[int] = Counter()
    for words in prompts:
        counts.update({hash(row) for row in _rows(words, WORDING_WORDS)})
    return {row for row, count in counts.items() if count > WORDING_PROMPTS}


def _runs_without(words: Sequence[str], wording: set[int]) -> Iterator[Sequence[str]]:
    """The parts of a prompt between shared wording."""
    common = [False] * len(words)
    for start, row in enumerate(_rows(words, WORDING_WORDS)):
        if hash(row) in wording:
            common[start : start + WORDING_WORDS] = [True] * WORDING_WORDS
    for is_common, run in groupby(zip(words, common, strict=True), itemgetter(1)):
        if not is_common:
            yield [word for word, _ in run]


def evaluation_texts(paths: Sequence[str | Path], ngram: int = 13) -> EvaluationTexts:
    """Read evaluation sets: JSON-lines files, or folders of them.

    Raises:
        DataError: there is no such file, none in a folder, or a line is malformed.
    """
    return EvaluationTexts(_texts(paths), ngram)


def _texts(paths: Sequence[str | Path]) -> Iterator[tuple[str, str]]:
    for file in (file for path in paths for file in json_lines_files(Path(path))):
        for where, record in read_json_lines(file):
            for text in read_record(record, where).user_turns:
                yield where, text
