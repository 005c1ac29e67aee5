"""Short live runs: acceptance and speed of a drafter."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from dspark.attention.paged_cache import PagedCache
from dspark.attention.ragged_batch import RaggedBatch
from dspark.data.conversations import Prompt
from dspark.drafters.base import BorrowedParts, DraftBatch, Drafter, Draw, Proposal
from dspark.engine.model import Model
from dspark.evaluation.check.findings import LiveRun
from dspark.request import Request, Stats, merge_stats

REPEATS = 3
CLEAR = 1.25
"""So many times faster than the other, a side needs no repeats."""
TokenIds = tuple[int, ...]


@dataclass
class ObservedDrafter:
    """A drafter with chosen taps, whose first draft distributions are recorded.

    Implements `drafters.base.Drafter`.

    Attributes:
        drafter: the drafter, bound to the target; its shapes are read once.
        taps: the layers that it reads; its own, or an alternative.
        beliefs: per round, the largest probability [R] of each first draft's distribution.
    """

    drafter: Drafter
    taps: tuple[int, ...]
    beliefs: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        own = self.drafter
        self.block_size, self.context_shapes = own.block_size, own.context_shapes
        self.reads_next_token, self.rows_ahead = own.reads_next_token, own.rows_ahead

    def bind(self, parts: BorrowedParts) -> None:
        """Bind the drafter."""
        self.drafter.bind(parts)

    def observe(
        self,
        context: PagedCache,
        batch: RaggedBatch,
        features_TF: Tensor,
        next_tokens_T: Tensor,
    ) -> None:
        """Pass the features on."""
        self.drafter.observe(context, batch, features_TF, next_tokens_T)

    def propose(self, context: PagedCache, batch: DraftBatch, draw: Draw) -> Proposal:
        """Draft, recording the first distribution; confidences are omitted."""

        def watched(step: int, logits_RC: Tensor, tokens: Tensor | None = None) -> Tensor:
            if step == 0:
                self.beliefs.append(logits_RC.double().softmax(dim=1).amax(dim=1))
            return draw(step, logits_RC, tokens)

        return self.drafter.propose(context, replace(batch, confidences=False), watched)

    @property
    def belief(self) -> float | None:
        """The mean of `beliefs`: the expected acceptance of first drafts at temperature 0."""
        values = [value for row in self.beliefs for value in row.tolist()]
        return sum(values) / len(values) if values else None


def render(model: Model, prompts: Sequence[Prompt]) -> list[TokenIds]:
    """Token ids of prompts: messages by the chat template if there is one, raw text as it is.

    Raises:
        RequestError: the chat template refuses a prompt, or is missing for a dialogue.
    """
    return [
        model.encode(p.text, raw=True)
        if p.messages is None
        else model.encode(p.messages if len(p.messages) > 1 else p.text, raw=False)
        for p in prompts
    ]


def other_renderings(model: Model, prompts: Sequence[Prompt]) -> dict[str, list[TokenIds]]:
    """Other renderings that a drafter may have been trained on: raw, or in a thinking mode.

    Renderings with the same tokens as `render` are skipped.
    """
    tokenizer = model.target.tokenizer
    found: dict[str, list[TokenIds]] = {"raw prompts": [model.encode(p.text) for p in prompts]}
    if "enable_thinking" in (tokenizer.chat_template or ""):
        for thinking in (True, False):
            found[f"enable_thinking={thinking}"] = [
                model.encode(p.messages or p.text, thinking=thinking) for p in prompts
            ]
    usual = render(model, prompts)
    return {name: rendered for name, rendered in found.items() if rendered != usual}


def accepted(model: Model, drafter: Drafter, requests: Sequence[Request]) -> Stats:
    """Decode all requests at once with the drafter; returns counts."""
    engine = Model(model.target, drafter).engine(
        requests, batch_size=len(requests), schedule="fixed", strict=True
    )
    return merge_stats(engine.run(requests))


def race(
    model: Model,
    requests: Sequence[Request],
    *,
    temperature: float,
    batch_size: int,
    deadline_s: float = math.inf,
) -> LiveRun:
    """Decode alternately without and with the drafter; the fastest of `REPEATS` runs counts.

    A first run has as many requests as run at once. It is the only one where all of them would
    pass the deadline; repeats end early where one side is clearly faster, or at the deadline.

    Args:
        model: a target with a drafter.
        requests: to decode; their temperature is replaced.
        temperature: of all requests.
        batch_size: requests at once.
        deadline_s: of `time.monotonic`.
    """
    warm = [Request(r.prompt_ids, replace(r.params, temperature=temperature)) for r in requests]
    few, started_s = warm[:batch_size], time.monotonic()
    plain, ours, stats = _both(model, few, batch_size)
    took_s = time.monotonic() - started_s
    if time.monotonic() + took_s * len(warm) / len(few) <= deadline_s:
        plain, ours = 0.0, 0.0
        for _ in range(REPEATS):
            started_s = time.monotonic()
            plain_run, our_run, stats = _both(model, warm, batch_size)
            plain, ours = max(plain, plain_run), max(ours, our_run)
            clear = not 1 / CLEAR < ours / plain < CLEAR
            if clear or 2 * time.monotonic() - started_s > deadline_s:  # nor would one more fit
                break
    first = stats.conditional_acceptance[0] if stats.offered else None
    return LiveRun(temperature, stats.tokens, stats.accepted_length, first, ours, plain)


def _both(model: Model, requests: Sequence[Request], batch_size: int) -> tuple[float, float, Stats]:
    """Tokens/s plainly and with the drafter, and what the drafter did."""
    plain, _ = _tokens_per_s(Model(model.target), requests, batch_size)
    ours, stats = _tokens_per_s(model, requests, batch_size)
    return plain, ours, stats


def _tokens_per_s(
    model: Model, requests: Sequence[Request], batch_size: int
) -> tuple[float, Stats]:
    engine = model.engine(requests, batch_size=batch_size, schedule="fixed", strict=True)
    started = time.perf_counter()
    outputs = engine.run(requests)
    seconds = time.perf_counter() - started
    return sum(len(output.token_ids) for output in outputs) / seconds, merge_stats(outputs)
