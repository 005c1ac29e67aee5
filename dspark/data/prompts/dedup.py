"""Whether a prompt stands in an evaluation set, whole or in part.

A prompt is contaminated where it shares a row of N neighbouring words with an evaluation prompt, or
is one of those that are shorter than that. Wording that many evaluation prompts share, such as
"please reason step by step", is no evidence: a word inside a row of `WORDING_WORDS` words that
stands in more than `WORDING_PROMPTS` of them is left out, and rows do not reach across it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dspark.data.files.json_lines import json_lines_files, read_json_lines
from dspark.data.records import read_record
from dspark.data.texts import words_of

WORDING_WORDS, WORDING_PROMPTS = 6, 10
Words = tuple[str, ...]


@dataclass(frozen=True)
class Match:
    """Why a prompt is contaminated.

    Attributes:
        against: file and line of the evaluation prompt.
        words: what both have.
    """

    against: str
    words: str


class EvaluationTexts:
    """The texts of evaluation sets, ready to be looked up.

    Args:
        texts: (where it stands, text) of every evaluation prompt.
        ngram: how many neighbouring words make a match.
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
        """What a text has in common with the evaluation sets; None where it is clean."""
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
    """Hashes of the rows of words that many prompts share."""
    counts: Counter[int] = Counter()
    for words in prompts:
        counts.update({hash(row) for row in _rows(words, WORDING_WORDS)})
    return {row for row, count in counts.items() if count > WORDING_PROMPTS}


def _runs_without(words: Sequence[str], wording: set[int]) -> Iterator[Sequence[str]]:
    """The parts of a prompt between wording."""
    common = [False] * len(words)
    for start, row in enumerate(_rows(words, WORDING_WORDS)):
        if hash(row) in wording:
            common[start : start + WORDING_WORDS] = [True] * WORDING_WORDS
    run: list[str] = []
    for word, is_common in zip(words, common, strict=True):
        if not is_common:
            run.append(word)
        elif run:
            yield run
            run = []
    if run:
        yield run


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
