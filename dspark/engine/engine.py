"""Requests in, tokens out: the queue, the slots and the rounds."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dspark.attention.slots import SlotCache
from dspark.drafters.base import Drafter
from dspark.engine.round import (
    Drafts,
    RowState,
    commit,
    draft,
    observe,
    target_batch,
    verify,
)
from dspark.engine.schedule import Schedule
from dspark.engine.sequence import ActiveRequest, Event
from dspark.engine.text import TextStream
from dspark.errors import RequestError, UsageError
from dspark.request import VERIFIERS, Output, Request, Verifier
from dspark.sampling.processors import Chain
from dspark.targets.target import Target


@dataclass
class Clock:
    """Time of the rounds of an engine: steps, and milliseconds summed over them."""

    steps: int = 0
    draft_ms: float = 0.0
    schedule_ms: float = 0.0
    verify_ms: float = 0.0


class Engine:
    """Decodes many requests at once, with a drafter or plainly.

    Args:
        target: the model whose outputs are wanted.
        drafter: who proposes; None decodes plainly, without hooks or draft context. It must be
            bound to the target.
        max_requests: requests in a round at most; more wait in the queue.
        max_length: tokens of prompt and output together; the target's context by default.
        verifier: token, block or coupled.
        schedule: how many drafts are verified.
        block_size: drafts per round, at most the drafter's own.

    Raises:
        UsageError: an option has a value that cannot be used.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None = None,
        *,
        max_requests: int = 8,
        max_length: int | None = None,
        verifier: Verifier = "block",
        schedule: Schedule | None = None,
        block_size: int | None = None,
    ) -> None:
        self.target = target
        self.schedule = schedule or Schedule()
        self.drafter = None if self.schedule.name == "off" else drafter
        self.verifier = verifier
        self.max_requests = max_requests
        self.max_length = min(max_length or target.max_context, target.max_context)
        self.clock = Clock()
        self.num_drafts = self._checked_num_drafts(block_size)
        self._queue: deque[ActiveRequest] = deque()
        self._running: list[ActiveRequest] = []
        self._free = list(range(max_requests))
        self._next_id = 0
        self._chain: tuple[list[int], Chain] | None = None
        capacity = self.max_length + self.num_drafts + 1
        self._cache = target.new_cache(max_requests, capacity)
        shapes = self.drafter.context_shapes if self.drafter else ()
        self._context = SlotCache(shapes, max_requests, capacity, target.dtype, target.device)

    def _checked_num_drafts(self, block_size: int | None) -> int:
        if self.verifier not in VERIFIERS:
            raise UsageError(
                f"The verifier is {self.verifier!r}, but must be one of {', '.join(VERIFIERS)}."
            )
        if self.max_requests < 1:
            raise UsageError(f"max_requests is {self.max_requests}, but must be at least 1.")
        if self.drafter is None:
            return 0
        own = self.drafter.block_size
        if block_size is not None and not 1 <= block_size <= own:
            raise UsageError(
                f"The block size is {block_size}, but must be between 1 and {own}, the block size "
                "that the drafter was trained with."
            )
        return block_size or own

    @property
    def has_work(self) -> bool:
        """Whether any request is waiting or running."""
        return bool(self._queue or self._running)

    def add(self, request: Request, *, prompt: str = "", live: bool = False) -> int:
        """Queue a request.

        Args:
            request: what to decode.
            prompt: the prompt's text, returned with the output.
            live: give every token's text with its event, not only the whole text at the end.

        Returns:
            The number that its events carry.

        Raises:
            RequestError: the prompt does not fit the context, or names a token that the model
                does not have, or stop strings are asked of a model without a tokenizer.
        """
        self._check(request)
        params = request.params
        ends = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            ends |= self.target.eos_token_ids
        tokenizer = self.target.tokenizer
        active = ActiveRequest(
            request_id=self._next_id,
            request=request,
            prompt=prompt,
            end_ids=ends,
            max_tokens=self.max_length,
            text=None if tokenizer is None else TextStream(tokenizer, params.stop),
            live=live or bool(params.stop),
        )
        self._next_id += 1
        self._queue.append(active)
        return active.request_id

    def _check(self, request: Request) -> None:
        length, ids = len(request.prompt_ids), request.prompt_ids
        if length >= self.max_length:
            raise RequestError(
                f"The prompt has {length} tokens, but the context holds {self.max_length} "
                "and one token at least is to be generated; shorten the prompt."
            )
        if min(ids) < 0 or max(ids) >= self.target.vocab_size:
            raise RequestError(
                f"The prompt names token {max(ids) if min(ids) >= 0 else min(ids)}, but token ids "
                f"of this model run from 0 to {self.target.vocab_size - 1}."
            )
        if request.params.stop and self.target.tokenizer is None:
            raise RequestError("Stop strings need a tokenizer, and this model has none.")

    def cancel(self, request_id: int) -> Output | None:
        """End a request now; what it has so far, or None if it is not waiting or running."""
        for requests in (self._queue, self._running):
            for active in requests:
                if active.request_id == request_id:
                    active.finish_reason = "cancelled"
                    requests.remove(active)
                    self._release(active)
                    return active.output()
        return None

    def _release(self, active: ActiveRequest) -> None:
        if active.slot >= 0:
            self._free.append(active.slot)
            active.slot = -1

    def _admit(self) -> None:
        while self._queue and self._free:
            active = self._queue.popleft()
            active.slot = self._free.pop()
            self._running.append(active)

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Admit what fits and run one round over all running requests.

        Returns:
            One event per running request; those with an output have ended and left their slot.

        Raises:
            NumericsError: target or drafter produced NaN or infinite logits.
        """
        self._admit()
        requests = self._running
        if not requests:
            return []
        state = RowState.of(requests, self._chain_of(requests), self.target, self.verifier)
        drafts = self._draft(requests, state)
        started = time.perf_counter()
        batch, judged = target_batch(requests, drafts, self.target.device)
        output = self.target.forward(
            batch,
            self._cache,
            taps=self.drafter.taps if self.drafter else (),
            logit_rows=torch.tensor(judged, device=self.target.device),
        )
        assert output.logits_NV is not None
        committed, accepted = verify(output.logits_NV, drafts, state)
        if self.drafter is not None and output.features_TF is not None:
            dropped = [v - a for v, a in zip(drafts.lengths, accepted, strict=True)]
            observe(self.drafter, self._context, batch, output.features_TF, dropped)
        self.clock.verify_ms += (time.perf_counter() - started) * 1e3
        self.clock.steps += 1
        pieces = commit(requests, committed, accepted, drafts)
        return self._finish_round(requests, pieces)

    def _draft(self, requests: Sequence[ActiveRequest], state: RowState) -> Drafts:
        none = (0,) * len(requests)
        if self.drafter is None:
            empty_DK = torch.zeros(0, 0, dtype=torch.int64, device=self.target.device)
            return Drafts(empty_DK, None, none, none)
        drafts, draft_ms, schedule_ms = draft(
            self.drafter, self._context, requests, state, self.schedule, self.num_drafts
        )
        self.clock.draft_ms += draft_ms
        self.clock.schedule_ms += schedule_ms
        return drafts

    def _chain_of(self, requests: Sequence[ActiveRequest]) -> Chain:
        """The processors of the running requests, rebuilt only when these change."""
        ids = [request.request_id for request in requests]
        if self._chain is None or self._chain[0] != ids:
            params = [request.request.params for request in requests]
            self._chain = (ids, Chain.of(params, self.target.device))
        return self._chain[1]

    def _finish_round(
        self, requests: Sequence[ActiveRequest], pieces: Sequence[tuple[object, ...]]
    ) -> list[Event]:
        events, still = [], []
        for request, new in zip(requests, pieces, strict=True):
            ended = request.finish_reason is not None
            events.append(Event(request.request_id, new, request.output() if ended else None))
            if ended:
                self._release(request)
            else:
                still.append(request)
        # Newly admitted requests go last: those with a draft context come first in a round.
        self._running = still
        return events

    def run(self, requests: Sequence[Request], prompts: Sequence[str] = ()) -> list[Output]:
        """Decode requests to their end, in the order given.

        Raises:
            RequestError, NumericsError: as `add` and `step`.
        """
        texts = prompts or [""] * len(requests)
        ids = [self.add(r, prompt=t) for r, t in zip(requests, texts, strict=True)]
        outputs: dict[int, Output] = {}
        while self.has_work:
            for event in self.step():
                if event.output is not None:
                    outputs[event.request_id] = event.output
        return [outputs[i] for i in ids]
