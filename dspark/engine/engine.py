"""Requests in, tokens out: the queue, who runs, and the rounds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from dspark.drafters.base import Drafter
from dspark.engine.kv.memory import Memory
from dspark.engine.requests.admission import Roster
from dspark.engine.requests.collector import Collector
from dspark.engine.requests.sequence import ActiveRequest, Event, Piece
from dspark.engine.requests.step_plan import StepPlan, default_step_tokens, plan_step
from dspark.engine.requests.validation import check_request, check_sizes, checked_num_drafts
from dspark.engine.round import play
from dspark.engine.speculation.draft_scheduler import Scheduler, schedule_of
from dspark.engine.speculation.drafter_faults import Shield
from dspark.engine.speculation.round_record import Watch
from dspark.engine.speculation.sampling_state import RequestSampling, RoundState
from dspark.engine.speculation.schedule import Schedule
from dspark.engine.speculation.speculator import Speculator
from dspark.engine.speculation.trees.draft import TreeDrafting, check_trees
from dspark.engine.timing import Clock
from dspark.errors import UsageError
from dspark.request import FinishReason, Output, Request, Verifier
from dspark.scheduling.cost_table import CostTable
from dspark.targets.target import Target


class Engine:
    """Decodes many requests at once, with a drafter or plainly.

    Args:
        target: the model whose outputs are wanted.
        drafter: who proposes; None decodes plainly, without hooks or draft context. It must be
            bound to the target.
        max_requests: requests in a round at most; more wait in the queue.
        max_length: tokens of prompt and output together; the target's context by default.
        verifier: token, block or coupled, of the requests that are not `reproducible`; these are
            verified by coupled. Without a drafter all draw as they do.
        schedule: how many drafts are verified, all by default; `off` leaves the drafter out. One
            that weighs costs, or calibrated confidences, comes as a `Scheduler`.
        block_size: drafts per round, at most the drafter's own, which is the default.
        tree_nodes: draft trees of so many nodes at most, `block_size` deep; None drafts chains.
            Under a schedule that protects plain decoding rounds draft trees or chains, whichever
            are faster, unless its `Scheduler` is one of trees.
        tree_costs: what rounds of trees cost, where a schedule weighs it; None takes the costs of
            chains.
        watch: is told about every round in which a drafter takes part.
        step_tokens: rows of one step. Verification goes first; prompts are read in parts that
            fit the rest (at least a quarter of it); 512 on a CPU, else 2048.
        cache_tokens: rows of the cache, in place of room for `max_requests` of `max_length` as
            far as memory allows. With less, requests wait for pages, and who came last gives
            its pages up where the others grow; its output does not change.
        memory_share: what the cache may take of the free memory, where `cache_tokens` says nothing:
            above 0 and at most 1; .9 on an accelerator, .5 on a host. On a host its pages are taken
            as they are used.
        prefix_reuse: whether prompts share the pages of equal beginnings.
        max_queue: requests that may wait beyond those for whom a place is free; None for any
            number.
        now: seconds of a clock that never goes back, for timeouts.
        strict: raise what the drafter does wrong, in place of going on plainly: for whoever
            measures it.

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
        tree_nodes: int | None = None,
        tree_costs: CostTable | None = None,
        watch: Watch | None = None,
        step_tokens: int | None = None,
        cache_tokens: int | None = None,
        memory_share: float | None = None,
        prefix_reuse: bool = True,
        max_queue: int | None = None,
        now: Callable[[], float] = time.monotonic,
        strict: bool = False,
    ) -> None:
        check_sizes(
            verifier,
            max_queue,
            max_length,
            memory_share,
            max_requests=max_requests,
            step_tokens=step_tokens,
            cache_tokens=cache_tokens,
        )
        self.target = target
        self.schedule = schedule_of(schedule)
        self.drafter = None if self.schedule.name == "off" else drafter
        self.verifier, self.max_requests, self._now = verifier, max_requests, now
        self.max_length = min(max_length or target.max_context, target.max_context)
        self.num_drafts = checked_num_drafts(self.drafter, block_size)
        scheduler = schedule if isinstance(schedule, Scheduler) else None
        trees: TreeDrafting | None = None
        if self.drafter is not None:
            scheduler = scheduler or Scheduler(self.schedule, verifier, self.num_drafts)
            if tree_nodes is not None:
                trees = TreeDrafting.beside(scheduler, tree_nodes, self.drafter, target, tree_costs)
        self.tree_nodes = None if trees is None else trees.nodes
        self.most_drafts, ahead = self.num_drafts, self.drafter.rows_ahead if self.drafter else 0
        if trees is not None:
            self.most_drafts = max(trees.nodes, 0 if trees.choice is None else self.num_drafts)
            ahead = max(ahead, trees.rows_ahead(self.num_drafts))
        self.step_tokens = step_tokens or default_step_tokens(target.device)
        self.memory = Memory(
            target,
            self.drafter,
            max_requests=max_requests,
            max_length=self.max_length,
            rows_ahead=1 + max(self.most_drafts, ahead),
            cache_tokens=cache_tokens,
            memory_share=memory_share,
            reuse=prefix_reuse and not target.own_cache,
        )
        self.roster = Roster(self.memory, max_requests, max_queue)
        self.clock, self._next_id = Clock(), 0
        self._sampling: RequestSampling | None = None
        self._speculator: Speculator | None = None
        if self.drafter is not None:
            assert self.memory.context is not None
            assert scheduler is not None
            self._speculator = Speculator(
                self.drafter,
                self.memory.context,
                scheduler,
                watch,
                Shield(strict=strict),
                trees=trees,
            )
            self._speculator.prepare()

    def watch(self, watch: Watch | None, *, confidences: bool = True) -> None:
        """Tell `watch` about every round from now on in which a drafter takes part.

        Args:
            watch: None for nobody.
            confidences: have drafts come with confidences also where no schedule reads them.
        """
        if self._speculator is not None:
            self._speculator = replace(self._speculator, watch=watch, wants_confidences=confidences)

    def collect(self, collector: Collector | None) -> None:
        """Hand requests that may be learned from to `collector` from now on; None to nobody."""
        if self._speculator is not None:
            self._speculator = replace(self._speculator, collector=collector)
            self._speculator.scheduler.learns = collector is not None

    def replace_drafter(self, drafter: Drafter) -> None:
        """Draft with another drafter from the next round on; call it between steps.

        A round is judged by the distributions that its drafts were drawn from, and those of later
        rounds depend on finished ones at most: no output changes its distribution, and none its
        tokens where they follow from the target alone (docs/learning.md). Rows of the draft context
        are the old drafter's, so running requests are read again, and kept prefixes are given up.

        Raises:
            UsageError: there is no drafter here, or the new one differs in shape.
        """
        if self.drafter is None or self._speculator is None:
            raise UsageError("A drafter can be replaced only where one drafts.")
        for name in ("block_size", "taps", "context_shapes", "reads_next_token", "rows_ahead"):
            old, new = getattr(self.drafter, name), getattr(drafter, name)
            if old != new:
                raise UsageError(
                    f"The new drafter's {name} is {new}, but that of the one at work is {old}; "
                    "start the engine anew with it."
                )
        self.roster.read_again()
        self._speculator.context.hand_over(drafter)
        trees = self._speculator.trees
        if trees is not None:
            able = check_trees(trees.nodes, drafter, self.target, self.schedule.name)
            trees = replace(trees, drafter=able)
        self.drafter = drafter
        self._speculator = replace(self._speculator, drafter=drafter, trees=trees)
        self._speculator.prepare()

    @property
    def scheduler(self) -> Scheduler | None:
        """Who decides verification lengths; None without a drafter."""
        return None if self._speculator is None else self._speculator.scheduler

    @property
    def has_work(self) -> bool:
        """Whether any request is waiting or running."""
        return bool(self.roster.everyone)

    def add(self, request: Request, *, prompt: str = "", live: bool = False) -> int:
        """Queue a request, or as many as it asks answers.

        Args:
            request: what to decode.
            prompt: the prompt's text, returned with the output.
            live: give every token's text with its event, not only the whole text at the end.

        Returns:
            The number that its events carry; further answers have the numbers after it.

        Raises:
            RequestError: the prompt does not fit the context; prompt or logit bias name a token
                that the model does not have; the bias leaves no token; or stop strings are asked
                of a model without a tokenizer.
            QueueFullError: too many requests wait already.
        """
        check_request(request, self.target, self.memory, self.max_length)
        self.roster.check_queue(request.params.n)
        first_id = self._next_id
        deadline = None if request.timeout_s is None else self._now() + request.timeout_s
        for sample in request.samples():
            waiting = ActiveRequest.waiting(
                sample, self._next_id, self.target, self.max_length, prompt, live=live
            )
            waiting.first_id, waiting.deadline = first_id, deadline
            self.roster.queue.append(waiting)
            self._next_id += 1
        return first_id

    def cancel(self, request_id: int) -> Output | None:
        """End a request now; what it has so far, or None if it is not waiting or running.

        Of several answers asked for together this ends one; `cancel_all` ends the rest.
        """
        active = next((r for r in self.roster.everyone if r.request_id == request_id), None)
        return None if active is None else self._end(active, "cancelled").output

    def cancel_all(self, first_id: int) -> list[Output]:
        """End every answer that is still to come of those asked for together.

        Args:
            first_id: what `add` returned.
        """
        answers = [r.request_id for r in self.roster.everyone if r.first_id == first_id]
        outputs = [self.cancel(request_id) for request_id in sorted(answers)]
        return [output for output in outputs if output is not None]

    def _expire(self) -> list[Event]:
        """End the requests whose time is up, whether they wait or run."""
        timed = [(r, r.deadline) for r in self.roster.everyone if r.deadline is not None]
        now = self._now() if timed else 0.0
        return [self._end(active, "timeout") for active, deadline in timed if deadline <= now]

    def _end(
        self, active: ActiveRequest, reason: FinishReason, pieces: tuple[Piece, ...] = ()
    ) -> Event:
        """Take a request out; it ends for this reason, unless it has ended for another."""
        active.end(reason)
        self.roster.remove(active)
        if self._speculator is not None:
            self._speculator.forget(active.request_id)
            if self._speculator.collector is not None and active.request.learn:
                self._speculator.collector.ended(active)
        return Event(active.request_id, pieces, active.output())

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Admit what fits and run one round over all running requests.

        Returns:
            One event per request that gained tokens; those with an output have ended and given
            their pages back. Requests whose time is up, those that wait included, have ended
            without taking part.

        Raises:
            Exception: what the drafter does wrong, where the engine is strict; it is of no use
                after that.
        """
        events = self._expire()
        roster = self.roster
        roster.admit()
        if self._speculator is not None:
            self._speculator.rest(roster.running, shares=self.memory.pool.reuse)
        roster.make_room()
        if roster.running:
            plan = plan_step(roster.running, self.step_tokens, self.most_drafts)
            events += self._play(plan)
            if not roster.running:  # idle from here on: time to prove that nothing leaked
                self.memory.check()
        return events

    def _play(self, plan: StepPlan) -> list[Event]:
        requests, sampling, state = plan.judged, None, None
        if requests:
            sampling, vocab_size = self._sampling_of(requests), self.target.vocab_size
            state = RoundState.of(requests, sampling, self.num_drafts, vocab_size)
        pieces, times = play(plan, state, self.target, self.memory.cache, self._speculator)
        if sampling is not None:
            sampling.commit([[piece.token_id for piece in new] for new in pieces])
        self.clock.record(times, prefill=plan.reads_prompts)
        if plan.reads_prompts:
            self._settle(plan)
        return [
            Event(request.request_id, new, None)
            if request.finish_reason is None
            else self._end(request, request.finish_reason, new)
            for request, new in zip(requests, pieces, strict=True)
        ]

    def _settle(self, plan: StepPlan) -> None:
        """Let others find what has been read of prompts, the drafter's rows included."""
        if self._speculator is not None and self.memory.pool.reuse:
            with self._speculator.shield.over(plan.running):
                self._speculator.context.flush()
        for request in (*plan.opening, *(chunk.request for chunk in plan.reading)):
            self.memory.settle(request)

    def _sampling_of(self, requests: Sequence[ActiveRequest]) -> RequestSampling:
        """Sampling of the running requests, rebuilt only when other requests run."""
        ids = tuple(request.request_id for request in requests)
        if self._sampling is None or self._sampling.request_ids != ids:
            verifier: Verifier = self.verifier if self.drafter is not None else "coupled"
            vocab_size, device = self.target.vocab_size, self.target.device
            self._sampling = RequestSampling.of(requests, verifier, vocab_size, device)
        return self._sampling

    def run(self, requests: Sequence[Request], prompts: Sequence[str] = ()) -> list[Output]:
        """Decode requests to their end, in the order given.

        Returns:
            The outputs, all answers to a request side by side.

        Raises:
            RequestError: as `add`; or, once all have ended, what ended the first of those that
                ended with an error.
            NumericsError: likewise.
        """
        for request in requests:
            check_request(request, self.target, self.memory, self.max_length)
        texts = prompts or [""] * len(requests)
        ids, outputs = list[int](), dict[int, Output]()
        for request, text in zip(requests, texts, strict=True):
            while self.roster.is_full(request.params.n) and self.has_work:
                self._collect(outputs)
            first_id = self.add(request, prompt=text)
            ids += range(first_id, first_id + request.params.n)
        while self.has_work:
            self._collect(outputs)
        return [outputs[i].checked() for i in ids]

    def _collect(self, outputs: dict[int, Output]) -> None:
        """Take one step, and note the outputs of the requests that it ends."""
        for event in self.step():
            if event.output is not None:
                outputs[event.request_id] = event.output
