"""What a target is trained on: conversations as one stream of tokens, each with a part to play.

A token is learned, only read, or unlearned. Unlearning is for a model's own answers: a token that
repeats a row of tokens of the same answer is made unlikely (unlikelihood training, Welleck et al.
2020), which is what stops a small model from going round in circles at temperature 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dspark.data.conversations import Dialogue
from dspark.data.corpus import Conversation, read_source
from dspark.data.samples import conversation_samples
from dspark.data.tokenizer import TEXT_END
from dspark.training.recipe import CorpusSettings, Source

LEARN, READ, UNLEARN = 1, 0, -1
TOKEN = np.dtype([("id", np.uint16), ("part", np.int8)])
"""A token's id and its part: LEARN, READ or UNLEARN."""


def corpus_conversations(corpus: CorpusSettings) -> Iterator[Conversation]:
    """Yield the training conversations of every source, each `repeat` times."""
    for source in corpus.sources:
        for _ in range(source.repeat):
            yield from source_conversations(corpus, source)


def source_conversations(corpus: CorpusSettings, source: Source) -> Iterator[Conversation]:
    """Yield the conversations of one source, once."""
    path = None if source.path is None else Path(corpus.root) / source.path
    return read_source(source.format, path)


def corpus_documents(corpus: CorpusSettings, tokenizer: Any) -> list[np.ndarray]:
    """Every training conversation, rendered by the chat template and encoded: rows of `TOKEN`."""
    documents: list[np.ndarray] = []
    for source in corpus.sources:
        conversations = list(source_conversations(corpus, source))
        gram = source.unlearn_repeats
        encoded = (
            repeating_documents(tokenizer, conversations, gram)
            if gram
            else learned_documents(tokenizer, conversations)
        )
        documents += encoded * source.repeat
    return documents


def learned_documents(tokenizer: Any, conversations: Sequence[Conversation]) -> list[np.ndarray]:
    """Conversations of which every token is learned."""
    texts = [tokenizer.apply_chat_template(list(c), tokenize=False) for c in conversations]
    return [
        _document(tokenizer, ids, LEARN)
        for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]
    ]


def repeating_documents(
    tokenizer: Any, conversations: Sequence[Conversation], gram: int
) -> list[np.ndarray]:
    """Conversations whose answers repeat themselves; of these only the repeats count.

    Args:
        tokenizer: with a chat template.
        conversations: whose assistant turns the model has written itself.
        gram: neighbouring tokens that must stand twice in an answer to count as a repeat.
    """
    documents = []
    for conversation in conversations:
        for sample in conversation_samples(tokenizer, Dialogue(conversation)):
            repeated = repeated_tokens(sample.input_ids, sample.loss_mask, gram)
            if repeated.any():
                document = _document(tokenizer, sample.input_ids, READ)
                document["part"][:-1][repeated] = UNLEARN
                documents.append(document)
    return documents


def repeated_tokens(ids: Sequence[int], own: Sequence[bool], gram: int) -> np.ndarray:
    """Which tokens belong to a row of `gram` tokens that stood earlier in the same answer.

    Args:
        ids: tokens of a conversation.
        own: True for the answers' tokens; an answer is a row of neighbouring ones.
        gram: length of the rows.

    Returns:
        bool, one per token.
    """
    found = np.zeros(len(ids), dtype=bool)
    seen: set[tuple[int, ...]] = set()
    for start in range(len(ids) - gram + 1):
        if not all(own[start : start + gram]):
            if not own[start]:
                seen.clear()
            continue
        row = tuple(ids[start : start + gram])
        if row in seen:
            found[start : start + gram] = True
        seen.add(row)
    return found


def _document(tokenizer: Any, ids: Sequence[int], part: int) -> np.ndarray:
    document = np.empty(len(ids) + 1, dtype=TOKEN)
    document["id"][:-1] = ids
    document["id"][-1] = tokenizer.convert_tokens_to_ids(TEXT_END)
    document["part"] = part
    return document


class TokenStream:
    """Conversations, shuffled anew each epoch, joined and cut into rows.

    Row r of step s is a function of (seed, s, r) alone.
    """

    def __init__(self, documents: list[np.ndarray], row_tokens: int, seed: int) -> None:
        self.documents = documents
        self.row_tokens = row_tokens
        self.seed = seed
        self.rows_per_epoch = sum(len(d) for d in documents) // row_tokens
        self._epoch = -1
        self._tokens = np.empty(0, dtype=TOKEN)

    def rows(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Rows `first`..`first + count - 1` of the endless stream.

        Returns:
            Ids, int64, and parts, int8; both [count, row_tokens].
        """
        found = np.stack([self._row(first + i) for i in range(count)])
        ids, parts = found["id"].astype(np.int64), np.ascontiguousarray(found["part"])
        return torch.from_numpy(ids), torch.from_numpy(parts)

    def _row(self, index: int) -> np.ndarray:
        epoch, within = divmod(index, self.rows_per_epoch)
        if epoch != self._epoch:
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.documents))
            self._tokens = np.concatenate([self.documents[i] for i in order])
            self._epoch = epoch
        start = within * self.row_tokens
        return self._tokens[start : start + self.row_tokens]
