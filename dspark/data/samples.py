"""Training samples: token ids with a loss mask, from conversations or from sampled token ids.

The chat template is the tokenizer's own. Which tokens are an assistant's is found by rendering the
conversation turn by turn: what a turn adds behind the generation prompt is its answer, and the
tokenizer's offsets say which tokens those characters became. Nothing is searched for in rendered
text, so a user who writes a template's header changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dspark.data.conversations import Message, check_messages, read_json_lines
from dspark.errors import DataError


@dataclass(frozen=True)
class Sample:
    """One sequence to train on.

    Attributes:
        input_ids: its tokens.
        loss_mask: True for tokens that the assistant (or the sampled model) wrote.
    """

    input_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]

    def truncated(self, length: int) -> Sample:
        """The first `length` tokens."""
        return Sample(self.input_ids[:length], self.loss_mask[:length])

    @property
    def num_supervised(self) -> int:
        """How many tokens carry loss."""
        return sum(self.loss_mask)


def render(tokenizer: Any, messages: Sequence[Message], *, generation: bool = False) -> str:
    """The text of a conversation by the tokenizer's own template.

    Raises:
        DataError: the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise DataError("The target's tokenizer has no chat template; train on raw token ids.")
    text: str = tokenizer.apply_chat_template(
        [dict(m) for m in messages], tokenize=False, add_generation_prompt=generation
    )
    return text


def conversation_sample(tokenizer: Any, messages: Sequence[Message]) -> Sample:
    """Tokens and loss mask of a conversation: every assistant turn, its end mark included.

    Raises:
        DataError: there is no assistant turn, or the template rewrites earlier turns, so that an
            answer's place cannot be told.
    """
    text = render(tokenizer, messages)
    spans: list[tuple[int, int]] = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(tokenizer, messages[:i], generation=True)
        through = render(tokenizer, messages[: i + 1])
        if not (through.startswith(before) and text.startswith(through)):
            raise DataError(
                "The chat template does not keep earlier turns as they were, so the answers of "
                "this conversation cannot be told apart; give one turn per conversation."
            )
        spans.append((len(before), len(through)))
    if not spans:
        raise DataError("A conversation has no assistant turn; there is nothing to learn from it.")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    mask = [
        any(begin <= start and end <= stop for begin, stop in spans) and end > start
        for start, end in encoded["offset_mapping"]
    ]
    return Sample(tuple(encoded["input_ids"]), tuple(mask))


def read_samples(path: Path, tokenizer: Any) -> Iterator[Sample]:
    """Yield the samples of a JSON-lines file.

    A line holds `input_ids` with `prompt_len` (the rest is the answer), or `messages`.
    Conversations without an assistant turn are passed over.

    Raises:
        DataError: a line holds neither, or is malformed.
    """
    for number, record in read_json_lines(path):
        where = f"{path}, line {number}"
        ids = record.get("input_ids")
        if ids is not None:
            length = record.get("prompt_len")
            if not isinstance(length, int) or not all(isinstance(i, int) for i in ids):
                raise DataError(f"{where}: 'input_ids' must be integers, with a 'prompt_len'.")
            yield Sample(tuple(ids), tuple(i >= length for i in range(len(ids))))
            continue
        messages = check_messages(record.get("messages"), where)
        if any(m["role"] == "assistant" for m in messages):
            yield conversation_sample(tokenizer, messages)


@dataclass(frozen=True)
class SampleBatch:
    """Samples one after the other, without padding: T rows, the sum of their lengths.

    Attributes:
        input_ids_T: tokens, int64.
        loss_mask_T: True for supervised tokens.
        positions_T: each token's position in its own sample.
        lengths: tokens of each sample.
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
        """How many samples."""
        return len(self.lengths)

    @property
    def ends_T(self) -> Tensor:
        """The row behind each token's sample."""
        ends = torch.tensor(self.lengths).cumsum(0)
        return ends.repeat_interleave(torch.tensor(self.lengths)).to(self.input_ids_T.device)


class SampleStream:
    """Batches of samples of like length, in an order that is a function of (seed, step) alone.

    Each epoch is shuffled, cut into groups, sorted by length within a group and cut into batches,
    which are shuffled again.

    Args:
        samples: what to draw from.
        rows: samples per batch.
        seed: names the order.
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
        epoch, within = divmod(step, self.batches_per_epoch)
        if epoch != self._epoch:
            self._batches, self._epoch = self._plan(epoch), epoch
        return [self.samples[i] for i in self._batches[within]]

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
    """Cut samples to `max_length` and keep those with enough supervised tokens left."""
    cut = (sample.truncated(max_length) for sample in samples)
    return [sample for sample in cut if sample.num_supervised >= min_supervised]
