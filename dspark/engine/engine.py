"""Requests in, tokens out: the queue, who runs, and the rounds."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dspark.attention.pages import PAGE_SIZE
from dspark.drafters.base import Drafter
from dspark.engine.batching import StepPlan, plan_step
from dspark.engine.memory import Memory
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


# Rows of a step: on a CPU a step of so many takes a few times as long as one of a few rows.
_CPU_STEP_TOKENS, _DEVICE_STEP_TOKENS = 512, 2048
# A prompt of which another running request is reading at least so many tokens waits for these.
_WORTH_WAITING_TOKENS = 2 * PAGE_SIZE


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
        step_tokens: rows of one step. Verification goes first; prompts are read in parts that
            fit the rest (at least a quarter of it); 512 on a CPU, else 2048.
        cache_tokens: rows of the cache, in place of room for `max_requests` of `max_length` as
            far as memory allows. With less, requests wait for pages, and who came last gives
            its pages up where the others grow; its output does not change.
        prefix_reuse: whether prompts share the pages of equal beginnings.

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
        step_tokens: int | None = None,
        cache_tokens: int | None = None,
        prefix_reuse: bool = True,
    ) -> None:
        _check_sizes(verifier, max_requests, max_length, step_tokens, cache_tokens)
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
        self.preemptions = 0
        self._next_id = 0
        self._admissions = 0
        self._laws: RequestLaws | None = None
        on_cpu = target.device.type == "cpu"
        self.step_tokens = step_tokens or (_CPU_STEP_TOKENS if on_cpu else _DEVICE_STEP_TOKENS)
        self.memory = Memory(
            target,
            self.drafter,
            max_requests=max_requests,
            max_length=self.max_length,
            rows_ahead=1 + self.num_drafts + (self.drafter is not None),
            cache_tokens=cache_tokens,
            reuse=prefix_reuse,
        )
        self._speculator: Speculator | None = None
        if self.drafter is not None:
            assert self.memory.context is not None
            self._speculator = Speculator(
                self.drafter,
                self.memory.context,
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
        longest = min(len(ids) + params.max_new_tokens, self.max_length)
        if not self.memory.fits(longest):
            raise RequestError(
                f"Prompt and output may reach {longest} tokens, but the cache holds "
                f"{self.memory.tokens} rows; shorten the prompt, ask for fewer new tokens, or "
                "give the engine a larger cache."
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
        """Take back what a request holds; it may be waiting, running or have ended."""
        if active.table.pages:
            self.memory.release(active)
        if self._speculator is not None:
            self._speculator.scheduler.forget(active.request_id)

    def _admit(self) -> None:
        """Let waiting requests run, in their order, as far as there are places and pages."""
        waiting, self._queue = self._queue, deque()
        while waiting and len(self._running) < self.max_requests:
            active = waiting.popleft()
            if self._soon_shared(active):
                self._queue.append(active)
                continue
            if not self.memory.admit(active, spare_pages=len(self._running)):
                waiting.appendleft(active)
                break
            active.admitted = self._admissions
            self._admissions += 1
            self._running.append(active)
        self._queue.extend(waiting)

    def _soon_shared(self, active: ActiveRequest) -> bool:
        """Whether a running request is reading a prefix that this one could take over."""
        if not self.memory.pool.reuse:
            return False
        found = None
        for other in self._running:
            if other.resumed:
                continue
            both = zip(active.tokens[:-1], other.tokens, strict=False)
            shared = next((i for i, (a, b) in enumerate(both) if a != b), len(active.tokens) - 1)
            shared = min(shared, len(other.tokens)) // PAGE_SIZE * PAGE_SIZE
            if shared < _WORTH_WAITING_TOKENS or shared <= other.cached:
                continue
            found = self.memory.findable(active) if found is None else found
            if shared - found >= _WORTH_WAITING_TOKENS:
                return True
        return False

    def _make_room(self) -> None:
        """Give every ready request the pages of its next round; who came last gives way."""
        for request in sorted(self._running, key=lambda r: r.admitted):
            while request.ready and request.table.pages and not self.memory.grow(request):
                self._preempt(max(self._running, key=lambda r: r.admitted))

    def _preempt(self, request: ActiveRequest) -> None:
        """Back to the queue's head, to be read again; drawn tokens and randomness stay."""
        self._running.remove(request)
        self.memory.release(request)
        self._queue.appendleft(request)
        self.preemptions += 1

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Admit what fits and run one round over all running requests.

        Returns:
            One event per request that gained tokens; those with an output have ended and given
            their pages back.

        Raises:
            NumericsError: target or drafter produced NaN or infinite logits.
        """
        self._admit()
        self._make_room()
        if not self._running:
            return []
        plan = plan_step(self._running, self.step_tokens, self.num_drafts)
        requests = plan.judged
        laws, state = None, None
        if requests:
            laws = self._laws_of(requests)
            state = RoundState.of(requests, laws, self.verifier, self.num_drafts)
        pieces, times = play(plan, state, self.target, self.memory.cache, self._speculator)
        if laws is not None:
            laws.commit([[piece.token_id for piece in new] for new in pieces])
        self.clock.record(times, prefill=plan.reads_prompts)
        for request in (*plan.opening, *(chunk.request for chunk in plan.reading)):
            self.memory.settle(request)
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
        events = []
        for request, new in zip(requests, pieces, strict=True):
            ended = request.finish_reason is not None
            events.append(Event(request.request_id, new, request.output() if ended else None))
            if ended:
                self._running.remove(request)
                self._release(request)
        # Neighbouring pages side by side are what attention reads fastest.
        self._running.sort(key=lambda request: request.table.pages[0])
        if not self._running:
            self.memory.check()
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


def _check_sizes(
    verifier: str,
    max_requests: int,
    max_length: int | None,
    step_tokens: int | None,
    cache_tokens: int | None,
) -> None:
    if verifier not in VERIFIERS:
        raise UsageError(
            f"The verifier is {verifier!r}, but must be one of {', '.join(VERIFIERS)}."
        )
    if max_length is not None and max_length < 2:
        raise UsageError(
            f"max_length is {max_length}, but must be at least 2: one token of prompt, one of "
            "output."
        )
    sizes = {
        "max_requests": max_requests,
        "step_tokens": step_tokens,
        "cache_tokens": cache_tokens,
    }
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise UsageError(f"{name} is {size}, but must be at least 1.")


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
