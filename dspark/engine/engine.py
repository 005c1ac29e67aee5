"""Requests in, tokens out: the queue, the slots and the rounds."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dspark.attention.pages import PAGE_SIZE, BlockTable, PagedCache
from dspark.drafters.base import Drafter
from dspark.engine.context import DraftContext
from dspark.engine.record import Watch
from dspark.engine.round import RoundTimes, Speculator, play
from dspark.engine.schedule import Schedule
from dspark.engine.scheduler import Scheduler
from dspark.engine.sequence import ActiveRequest, Event, Piece
from dspark.engine.state import RequestLaws, RoundState
from dspark.engine.text import TextStream
from dspark.errors import RequestError, UsageError
from dspark.request import VERIFIERS, Output, Request, Verifier
from dspark.sampling.processors import Chain
from dspark.targets.target import Target


@dataclass
class Clock:
    """Time of an engine's steps, those that read a prompt apart from the rest.

    Attributes:
        prefills: steps that read at least one prompt.
        prefill_ms: milliseconds of all parts of these.
        steps: steps that read none.
        draft_ms, schedule_ms, verify_ms: milliseconds of their parts, summed.
    """

    prefills: int = 0
    prefill_ms: float = 0.0
    steps: int = 0
    draft_ms: float = 0.0
    schedule_ms: float = 0.0
    verify_ms: float = 0.0

    def record(self, times: RoundTimes, *, prefill: bool) -> None:
        """Add one step."""
        if prefill:
            self.prefills += 1
            self.prefill_ms += times.draft_ms + times.schedule_ms + times.verify_ms
            return
        self.steps += 1
        self.draft_ms += times.draft_ms
        self.schedule_ms += times.schedule_ms
        self.verify_ms += times.verify_ms

    def per_step(self) -> RoundTimes:
        """Mean times of the steps that read no prompt."""
        steps = max(self.steps, 1)
        return RoundTimes(self.draft_ms / steps, self.schedule_ms / steps, self.verify_ms / steps)


class Engine:
    """Decodes many requests at once, with a drafter or plainly.

    Args:
        target: the model whose outputs are wanted.
        drafter: who proposes; None decodes plainly, without hooks or draft context. It must be
            bound to the target.
        max_requests: requests in a round at most; more wait in the queue.
        max_length: tokens of prompt and output together; the target's context by default.
        verifier: token, block or coupled.
        schedule: how many drafts are verified, all by default; `off` leaves the drafter out. One
            that weighs costs, or calibrated confidences, comes as a `Scheduler`.
        block_size: drafts per round, at most the drafter's own, which is the default.
        watch: is told about every round in which a drafter takes part.

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
        schedule: Schedule | Scheduler | None = None,
        block_size: int | None = None,
        watch: Watch | None = None,
    ) -> None:
        _check_sizes(verifier, max_requests, max_length)
        self.target = target
        given = schedule if isinstance(schedule, Scheduler) else None
        self.schedule = (
            schedule.schedule if isinstance(schedule, Scheduler) else schedule or Schedule()
        )
        self.drafter = None if self.schedule.name == "off" else drafter
        self.verifier = verifier
        self.max_requests = max_requests
        self.max_length = min(max_length or target.max_context, target.max_context)
        self.num_drafts = _num_drafts(self.drafter, block_size)
        self.clock = Clock()
        self._queue: deque[ActiveRequest] = deque()
        self._running: list[ActiveRequest] = []
        self._free = list(range(max_requests))  # a heap: low slots first keeps those in use dense
        self._next_id = 0
        self._laws: RequestLaws | None = None
        self._pages_each = -(-(self.max_length + self.num_drafts + 2) // PAGE_SIZE)
        pages = max_requests * self._pages_each
        self._cache = target.new_cache(pages)
        self._speculator: Speculator | None = None
        if self.drafter is not None:
            shapes = self.drafter.context_shapes
            context = PagedCache(shapes, pages, PAGE_SIZE, target.dtype, target.device)
            self._speculator = Speculator(
                self.drafter,
                DraftContext(self.drafter, context),
                given or Scheduler(self.schedule, verifier, self.num_drafts),
                watch,
            )

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
            RequestError: the prompt does not fit the context; prompt or logit bias name a token
                that the model does not have; the bias leaves no token; or stop strings are asked
                of a model without a tokenizer.
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
        ids, params = request.prompt_ids, request.params
        if len(ids) >= self.max_length:
            raise RequestError(
                f"The prompt has {len(ids)} tokens, but the context holds {self.max_length} "
                "and one token at least is to be generated; shorten the prompt."
            )
        vocab_size = self.target.vocab_size
        for what, tokens in (("prompt", ids), ("logit bias", params.logit_bias)):
            wrong = [token for token in tokens if not 0 <= token < vocab_size]
            if wrong:
                raise RequestError(
                    f"The {what} names token {wrong[0]}, but token ids of this model run from 0 "
                    f"to {vocab_size - 1}."
                )
        Chain.of([params])  # refuses biases that are no numbers
        if sum(value == float("-inf") for value in params.logit_bias.values()) == vocab_size:
            raise RequestError("The logit bias bans every token; allow at least one.")
        if params.stop and self.target.tokenizer is None:
            raise RequestError("Stop strings need a tokenizer, and this model has none.")

    def cancel(self, request_id: int) -> Output | None:
        """End a request now; what it has so far, or None if it is not waiting or running."""
        for requests in (self._queue, self._running):
            for active in requests:
                if active.request_id == request_id:
                    requests.remove(active)
                    self._release(active)
                    return active.cancel()
        return None

    def _release(self, active: ActiveRequest) -> None:
        if active.slot >= 0:
            if self._speculator is not None:
                self._speculator.context.forget(active.table)
                self._speculator.scheduler.forget(active.request_id)
            heapq.heappush(self._free, active.slot)
            active.slot, active.table = -1, BlockTable()

    def _admit(self) -> None:
        while self._queue and self._free:
            active = self._queue.popleft()
            active.slot = heapq.heappop(self._free)
            active.table = self._pages_of(active.slot)
            self._running.append(active)

    def _pages_of(self, slot: int) -> BlockTable:
        """Every slot owns a run of pages for the longest request."""
        return BlockTable(range(slot * self._pages_each, (slot + 1) * self._pages_each))

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
        laws = self._laws_of(requests)
        state = RoundState.of(requests, laws, self.verifier, self.num_drafts)
        prefill = any(request.cached == 0 for request in requests)
        pieces, times = play(requests, state, self.target, self._cache, self._speculator)
        laws.commit([[piece.token_id for piece in new] for new in pieces])
        self.clock.record(times, prefill=prefill)
        return self._finish_round(requests, pieces)

    def _laws_of(self, requests: Sequence[ActiveRequest]) -> RequestLaws:
        """The laws of the running requests, rebuilt only when other requests run."""
        ids = tuple(request.request_id for request in requests)
        if self._laws is None or self._laws.request_ids != ids:
            self._laws = RequestLaws.of(requests, self.target.vocab_size, self.target.device)
        return self._laws

    def _finish_round(
        self, requests: Sequence[ActiveRequest], pieces: Sequence[tuple[Piece, ...]]
    ) -> list[Event]:
        events, still = [], []
        for request, new in zip(requests, pieces, strict=True):
            ended = request.finish_reason is not None
            events.append(Event(request.request_id, new, request.output() if ended else None))
            if ended:
                self._release(request)
            else:
                still.append(request)
        # Newly admitted requests go behind these: who has a draft context comes first in a round.
        # Neighbouring slots side by side are what attention reads fastest.
        self._running = sorted(still, key=lambda request: request.slot)
        return events

    def run(self, requests: Sequence[Request], prompts: Sequence[str] = ()) -> list[Output]:
        """Decode requests to their end, in the order given.

        Raises:
            RequestError, NumericsError: as `add` and `step`.
        """
        for request in requests:
            self._check(request)
        texts = prompts or [""] * len(requests)
        ids = [self.add(r, prompt=t) for r, t in zip(requests, texts, strict=True)]
        outputs: dict[int, Output] = {}
        while self.has_work:
            for event in self.step():
                if event.output is not None:
                    outputs[event.request_id] = event.output
        return [outputs[i] for i in ids]


def _check_sizes(verifier: str, max_requests: int, max_length: int | None) -> None:
    if verifier not in VERIFIERS:
        raise UsageError(
            f"The verifier is {verifier!r}, but must be one of {', '.join(VERIFIERS)}."
        )
    if max_requests < 1:
        raise UsageError(f"max_requests is {max_requests}, but must be at least 1.")
    if max_length is not None and max_length < 2:
        raise UsageError(
            f"max_length is {max_length}, but must be at least 2: one token of prompt, one of "
            "output."
        )


def _num_drafts(drafter: Drafter | None, block_size: int | None) -> int:
    if drafter is None:
        return 0
    own = drafter.block_size
    if block_size is None:
        return own
    if not 1 <= block_size <= own:
        raise UsageError(
            f"The block size is {block_size}, but must be between 1 and {own}, the block size "
            "that the drafter was trained with."
        )
    return block_size
