"""Training samples: token ids with a loss mask, from conversations or from sampled token ids.

`templates` says which characters an assistant wrote; the tokenizer's offsets say which tokens they
became.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dspark.data.conversations import Dialogue
from dspark.data.files.json_lines import scan_json_lines
from dspark.data.templates import Answer, answers_of, kept_answers, special_ids
from dspark.errors import DataError, DSparkWarning

Span = tuple[int, int]


@dataclass(frozen=True)
class Sample:
    """One training sequence.

    Attributes:
        input_ids: token ids.
        loss_mask: True for tokens written by the assistant (or the sampled model).
    """

    input_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]

    def truncated(self, length: int) -> Sample:
        """The first `length` tokens."""
        return Sample(self.input_ids[:length], self.loss_mask[:length])

    @property
    def num_supervised(self) -> int:
        """Number of tokens with loss."""
        return sum(self.loss_mask)


def conversation_samples(tokenizer: Any, dialogue: Dialogue) -> list[Sample]:
    """Tokens and loss masks of a conversation: every assistant turn with its end-of-turn token.

    Each answer follows exactly the tokens of the prompt that it would be generated from. One sample
    holds all answers that can satisfy this together; otherwise, as under a template that drops the
    thinking of earlier answers, a conversation yields several samples. White space that the
    template adds after an end-of-turn token carries no loss, nor does the end-of-turn token of a
    truncated answer.

    Raises:
        DataError: as `templates.answers_of`; or the tokenizer has no offsets.
    """
    answers = answers_of(tokenizer, dialogue)
    waiting = [_encode_answer(tokenizer, a, cut=False) for a in answers[:-1]]
    waiting.append(_encode_answer(tokenizer, answers[-1], cut=not dialogue.complete))
    samples = []
    while waiting:
        last = waiting.pop()
        alike = [e for e in waiting if last.ids[: e.end] == e.ids[: e.end]]
        kept = kept_answers(tokenizer, dialogue, [e.answer for e in alike], last.answer)
        shown = [e for e in alike if e.answer in kept]
        waiting = [e for e in waiting if e not in shown]
        mask = [False] * len(last.ids)
        for each in (*shown, last):
            mask[each.begin : each.end] = [True] * (each.end - each.begin)
        samples.append(Sample(last.ids, tuple(mask)))
    return samples[::-1]


@dataclass(frozen=True)
class _EncodedAnswer:
    """Token ids of an answer after its prompt, and the answer's range [begin, end)."""

    answer: Answer
    ids: tuple[int, ...]
    begin: int
    end: int


def _encode_answer(tokenizer: Any, answer: Answer, *, cut: bool) -> _EncodedAnswer:
    """Encode an answer's rendering; `cut` excludes its end-of-turn token."""
    text, edge = answer.through, len(answer.prompt)
    prompt_ids, _ = _encode(tokenizer, answer.prompt)
    ids, offsets = _encode(tokenizer, text)
    begin = len(prompt_ids)
    if ids[:begin] != prompt_ids or any(start < edge for start, _ in offsets[begin:]):
        # Tokens cross the border or depend on what follows, but a prompt is encoded before its
        # answer exists.
        rest, rest_offsets = _encode(tokenizer, answer.text)
        ids = prompt_ids + rest
        offsets = [(0, 0)] * begin + [(start + edge, stop + edge) for start, stop in rest_offsets]
    end = len(ids)
    mine = range(begin, end)
    mark = next((i for i in reversed(mine) if text[slice(*offsets[i])].strip()), None)
    if mark is not None and offsets[mark][0] >= answer.said and ids[mark] in special_ids(tokenizer):
        end = mark if cut else mark + 1
    return _EncodedAnswer(answer, tuple(ids), begin, end)


def _encode(tokenizer: Any, text: str) -> tuple[list[int], list[Span]]:
    try:
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    except NotImplementedError as error:
        raise DataError(
            "The target's tokenizer does not report the characters of its tokens; use its fast "
            "version, with a tokenizer.json."
        ) from error
    return list(found["input_ids"]), [(start, stop) for start, stop in found["offset_mapping"]]


def read_samples(path: Path, tokenizer: Any) -> Iterator[Sample]:
    """Yield the samples of a JSON-lines file.

    A line holds `input_ids` with `prompt_len` (the rest is the answer), or `messages`. Unusable
    lines, such as conversations without an assistant turn, are skipped; a final warning gives their
    number and the first fault.

    Raises:
        DataError: the file is missing, or has no usable line.
    """
    used, left_out, first = 0, 0, ""
    for row in scan_json_lines(path):
        try:
            found = record_samples(row.whole(), tokenizer, row.where)
        except DataError as error:
            left_out += 1
            first = first or str(error)
            continue
        used += 1
        yield from found
    if left_out and not used:
        raise DataError(f"No line of {path} can be used; the first fault: {first}")
    if left_out:
        warnings.warn(
            DSparkWarning(f"{left_out} lines of {path} are left out; the first: {first}"),
            stacklevel=2,
        )


def record_samples(record: Mapping[str, Any], tokenizer: Any, where: str) -> list[Sample]:
    """The samples of one line.

    Raises:
        DataError: it holds neither token ids nor a conversation, or cannot be used.
    """
    ids = record.get("input_ids")
    if ids is not None:
        length = record.get("prompt_len")
        if not isinstance(length, int) or not all(isinstance(i, int) for i in ids):
            raise DataError(f"{where}: 'input_ids' must be integers, with a 'prompt_len'.")
        return [Sample(tuple(ids), tuple(i >= length for i in range(len(ids))))]
    dialogue = Dialogue.of(record, where)
    try:
        return conversation_samples(tokenizer, dialogue)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


@dataclass(frozen=True)
class SampleBatch:
    """Concatenated samples without padding: T rows, the sum of their lengths.

    Attributes:
        input_ids_T: tokens, int64.
        loss_mask_T: True for supervised tokens.
        positions_T: each token's position in its sample.
        lengths: tokens per sample.
    """

    input_ids_T: Tensor
    loss_mask_T: Tensor
    positions_T: Tensor
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> SampleBatch:
        """Pack samples, on the CPU."""
        lengths = tuple(len(s.input_ids) for s in samples)
        return cls(
            input_ids_T=torch.tensor([i for s in samples for i in s.input_ids], dtype=torch.long),
            loss_mask_T=torch.tensor([m for s in samples for m in s.loss_mask], dtype=torch.bool),
            positions_T=torch.tensor([p for n in lengths for p in range(n)], dtype=torch.long),
            lengths=lengths,
        )

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.lengths)

    @property
    def ends_T(self) -> Tensor:
        """For each token, the row after its sample's last."""
        ends = torch.tensor(self.lengths).cumsum(0)
        return ends.repeat_interleave(torch.tensor(self.lengths)).to(self.input_ids_T.device)


class SampleStream:
    """Batches of samples of similar length, in an order that depends on (seed, step) alone.

    Each epoch is shuffled, split into groups, sorted by length within a group and split into
    batches, which are shuffled again.

    Args:
        samples: the data set.
        rows: samples per batch.
        seed: of the order.
    """

    GROUP = 32

    def __init__(self, samples: Sequence[Sample], rows: int, seed: int) -> None:
        if len(samples) < rows:
            raise DataError(
                f"There are {len(samples)} usable samples, fewer than a batch of {rows}."
            )
        self.samples = samples
        self.rows = rows
        self.seed = seed
        self.batches_per_epoch = len(samples) // rows
        self._epoch = -1
        self._batches: list[list[int]] = []

    def batch(self, step: int) -> list[Sample]:
        """The samples of a step."""
        return [self.samples[i] for i in self.indices(step)]

    def indices(self, step: int) -> list[int]:
        """Indices of a step's samples."""
        epoch, within = divmod(step, self.batches_per_epoch)
        if epoch != self._epoch:
            self._batches, self._epoch = self._plan(epoch), epoch
        return self._batches[within]

    def _plan(self, epoch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.samples), generator=generator).tolist()
        order = order[: self.batches_per_epoch * self.rows]
        size = self.GROUP * self.rows
        batches: list[list[int]] = []
        for start in range(0, len(order), size):
            group = sorted(order[start : start + size], key=self._length)
            batches += [group[i : i + self.rows] for i in range(0, len(group), self.rows)]
        shuffled = torch.randperm(len(batches), generator=generator).tolist()
        return [batches[i] for i in shuffled]

    def _length(self, index: int) -> int:
        return len(self.samples[index].input_ids)


def usable(samples: Iterable[Sample], max_length: int, min_supervised: int) -> list[Sample]:
    """Truncate samples to `max_length` and keep those with enough supervised tokens."""
    cut = (sample.truncated(max_length) for sample in samples)
    return [sample for sample in cut if sample.num_supervised >= min_supervised]
