"""Which regenerated answers are worth keeping."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dspark.data.answers.replay import Reply


@dataclass(frozen=True)
class Wanted:
    """Which answers are worth keeping; by default all.

    Attributes:
        finished: only those that the model ended itself, within the limit of tokens.
        token_gram: only those in which no row of so many neighbouring tokens stands twice; 0 does
            not look.
        word_gram: the same of words, as split at white space.
        without: only those that contain none of these texts.
    """

    finished: bool = False
    token_gram: int = 0
    word_gram: int = 0
    without: tuple[str, ...] = ()

    def keeps(self, reply: Reply) -> bool:
        """Whether an answer is wanted."""
        if self.finished and reply.finish_reason != "stop":
            return False
        if any(text in reply.text for text in self.without):
            return False
        rows = ((reply.token_ids, self.token_gram), (reply.text.split(), self.word_gram))
        return not any(repeats_gram(items, size) for items, size in rows)


def repeats_gram(items: Sequence[object], size: int) -> bool:
    """Whether any `size` neighbouring items stand twice in a row of items; for 0, False."""
    if size == 0:
        return False
    grams = [tuple(items[i : i + size]) for i in range(len(items) - size + 1)]
    return len(set(grams)) < len(grams)
