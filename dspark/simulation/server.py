"""One simulated replica: requests wait, run and end as in the engine, on the clock of a table.

A step takes what the machine's table says. Prompts are shared among steps by the engine's own
`plan_step`, drafts are decided on by its own `Scheduler`; what a round keeps comes from the
acceptance profile.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np

from dspark.attention.paged_cache import PAGE_SIZE
from dspark.engine.requests.sequence import ActiveRequest
from dspark.engine.requests.step_plan import StepPlan, plan_step
from dspark.engine.speculation.acceptance import Offer
from dspark.engine.speculation.draft import Drafts, draft_limits
from dspark.engine.speculation.draft_scheduler import Scheduler
from dspark.engine.speculation.round_record import Spent
from dspark.engine.speculation.schedule import Schedule
from dspark.scheduling.cost_table import CostTable
from dspark.simulation.acceptance import Acceptance
from dspark.simulation.jobs import Job
from dspark.simulation.machine import Machine


@dataclass(frozen=True)
class Way:
    """A way of decoding.

    Attributes:
        name: in the results.
        costs: of the target with this way's drafter.
        acceptance: of the drafter; None decodes plainly.
        schedule: of the drafts.
        depth: drafts of a block of which `costs` has the drafting time, where the blocks of
            `acceptance` are shorter; None where they are not.
    """

    name: str
    costs: CostTable
    acceptance: Acceptance | None = None
    schedule: Schedule = field(default_factory=Schedule)
    depth: int | None = None

    def machine(self) -> Machine:
        """What its steps take."""
        drafts = self.acceptance.num_drafts if self.acceptance else 0
        return Machine(self.costs, self.depth or drafts)


@dataclass(frozen=True)
class Limits:
    """What a replica has room for.

    Attributes:
        max_requests: that run at once, at most as many as the table covers.
        step_tokens: rows of a step, as `Engine`.
        cache_tokens: rows of the cache; None for as many as are needed.
    """

    max_requests: int
    step_tokens: int = 512
    cache_tokens: int | None = None


# Rounds that go by the last decision, where that verified whole blocks as the one before it did.
STEADY_ROUNDS = 31


@dataclass
class Counts:
    """What a replica's steps did.

    Attributes:
        tokens: committed.
        rounds: of requests that had read their prompts, summed over these.
        gained: tokens of those rounds.
        verified: drafts that were verified.
        steps: of the engine.
        busy_s: their time.
        draft_s, verify_s: of that, drafting, and the target's forward in steps without prompts.
        preemptions: requests that gave their pages up.
    """

    tokens: int = 0
    rounds: int = 0
    gained: int = 0
    verified: int = 0
    steps: int = 0
    busy_s: float = 0.0
    draft_s: float = 0.0
    verify_s: float = 0.0
    preemptions: int = 0


@dataclass
class Server:
    """A replica.

    Attributes:
        way: how it decodes.
        limits: what it has room for.
        seed: decides which stream of the profile an answer follows.
        queue, running: requests that wait, and that run.
        in_flight: how many have been sent here and have not ended.
        counts: what it did.
    """

    way: Way
    limits: Limits
    seed: int = 0
    queue: deque[Job] = field(default_factory=deque)
    running: list[Job] = field(default_factory=list)
    in_flight: int = 0
    counts: Counts = field(default_factory=Counts)

    def __post_init__(self) -> None:
        self._machine = self.way.machine()
        acceptance = self.way.acceptance
        self._num_drafts = acceptance.num_drafts if acceptance else 0
        self._scheduler = Scheduler(
            self.way.schedule, num_drafts=self._num_drafts, costs=self.way.costs
        )
        self._admissions = 0
        self._ending: list[Job] = []
        self._run_T: list[int] = acceptance.run_T.tolist() if acceptance else []
        self._depth = self._steady = 0  # drafts of each in the last decision, 0 if they differed
        self._drawn = self._num_drafts

    def send(self, job: Job) -> None:
        """Queue a request."""
        acceptance = self.way.acceptance
        if acceptance is not None:
            stream = job.stream
            if stream is None:  # the same for the same request, whatever way, rate and replica
                generator = np.random.default_rng((self.seed, job.request_id))
                stream = int(generator.integers(len(acceptance.starts_S)))
            job.place = (int(acceptance.starts_S[stream]), int(acceptance.lengths_S[stream]))
        self.queue.append(job)
        self.in_flight += 1
        self._steady = 0

    @property
    def has_work(self) -> bool:
        """Whether anybody waits or runs."""
        return bool(self.queue or self.running)

    def step(self, now_s: float) -> float:
        """Play the step that begins now; when it ends.

        Who ends in it is returned by `settle`.
        """
        if self._steady:
            return self._repeat(now_s)
        self._admit()
        self._make_room()
        running = cast("list[ActiveRequest]", self.running)
        plan = plan_step(running, self.limits.step_tokens, self._num_drafts)
        ready = cast("list[Job]", plan.ready)
        opening = cast("list[Job]", plan.opening)
        prompt_rows = sum(job.unread for job in opening) + sum(c.count for c in plan.reading)
        if self.way.acceptance is None:
            kept = [0] * len(ready)
            step_ms = self._plain_ms(len(ready), prompt_rows)
        else:
            kept, step_ms = self._round(plan, prompt_rows)
        end_s = now_s + step_ms / 1e3
        self.counts.steps += 1
        self.counts.busy_s += step_ms / 1e3
        for chunk in plan.reading:
            cast("Job", chunk.request).read(chunk.count)
        for job in opening:
            job.first_s = end_s
        self._commit([*ready, *opening], [*kept, *(0,) * len(opening)], end_s)
        self.counts.rounds += len(ready)
        return end_s

    def settle(self) -> list[Job]:
        """The requests that ended in the last step, which is over now."""
        ended, self._ending = self._ending, []
        self.in_flight -= len(ended)
        return ended

    def _repeat(self, now_s: float) -> float:
        """A round in which the last decision holds: whole blocks of the same depth.

        What the scheduler would have learned from it is left out. It decides anew where a request
        comes, and after some rounds.
        """
        self._steady -= 1
        requests, depth, machine = len(self.running), self._depth, self._machine
        kept, run_T = list[int](), self._run_T
        for job in self.running:
            start, length = job.place
            kept.append(min(run_T[start + (job.tokens - 1) % length], depth))
        draft_ms = machine.draft_ms(requests, self._drawn)
        verify_ms = machine.verify_ms(requests, requests * depth)
        rest_ms = machine.rest_ms(requests, schedules=self.way.schedule.protects)
        counts, step_s = self.counts, (draft_ms + verify_ms + rest_ms) / 1e3
        counts.steps += 1
        counts.rounds += requests
        counts.busy_s += step_s
        counts.draft_s += draft_ms / 1e3
        counts.verify_s += verify_ms / 1e3
        counts.verified += requests * depth
        self._commit(list(self.running), kept, now_s + step_s)
        return now_s + step_s

    def _hold(self, depth: int) -> None:
        """Let a decision to verify so many drafts of everyone hold, if the one before was alike."""
        alone = not self.queue and self.limits.cache_tokens is None
        self._steady = STEADY_ROUNDS if depth and depth == self._depth and alone else 0
        self._depth = depth

    def _plain_ms(self, requests: int, prompt_rows: int) -> float:
        step_ms = self._machine.plain_ms(requests) if requests else 0.0
        if not prompt_rows:
            self.counts.verify_s += step_ms / 1e3
        return step_ms + self._machine.prompt_ms(prompt_rows, requests)

    def _round(self, plan: StepPlan, prompt_rows: int) -> tuple[list[int], float]:
        """Drafts kept of each ready request, and the step's milliseconds."""
        acceptance, scheduler, machine = self.way.acceptance, self._scheduler, self._machine
        assert acceptance is not None
        judged, requests = plan.judged, len(plan.ready)
        limits = scheduler.limits(judged, draft_limits(judged, self._num_drafts))
        drawn = max(limits, default=0)
        lengths, kept, draft_ms = [0] * requests, [0] * requests, 0.0
        if drawn > 0:
            ready = cast("Sequence[Job]", plan.ready)
            places_R = np.array([s + (job.tokens - 1) % n for job in ready for s, n in [job.place]])
            reads = scheduler.reads_confidences
            logits_RK = acceptance.logits_TK[places_R, :drawn] if reads else None
            wanted = scheduler.lengths(judged, limits, Offer(requests, drawn, logits_RK))
            lengths = [min(pair) for pair in zip(wanted, limits, strict=False)]
            kept = np.minimum(acceptance.run_T[places_R], lengths).tolist()
            draft_ms = machine.draft_ms(requests, scheduler.depth or self._num_drafts)
        verified = sum(lengths)
        verify_ms = machine.verify_ms(requests, verified) if requests else 0.0
        if requests and not prompt_rows:
            self.counts.verify_s += verify_ms / 1e3
        self.counts.draft_s += draft_ms / 1e3
        self.counts.verified += verified
        whole_ms = verify_ms + machine.prompt_ms(prompt_rows, requests)
        if judged:
            joining = [0] * len(plan.opening)
            spent = Spent(requests + verified + prompt_rows, draft_ms, 0.0, whole_ms)
            tried = cast("Drafts", _Tried([*lengths, *joining], list(limits)))
            scheduler.learn(judged, tried, [*kept, *joining], spent)
        rest_ms = machine.rest_ms(requests, schedules=self.way.schedule.protects)
        if not prompt_rows:
            self._drawn = scheduler.depth or self._num_drafts
            self._hold(drawn if verified == drawn * requests else 0)
        return kept, draft_ms + whole_ms + (rest_ms if requests else 0.0)

    def _commit(self, jobs: Sequence[Job], kept: Sequence[int], end_s: float) -> None:
        """Commit each one's kept drafts and the token behind them."""
        for job, accepted in zip(jobs, kept, strict=True):
            gained = min(accepted + 1, job.left)
            if job.tokens:
                self.counts.gained += gained
            job.commit(gained)
            self.counts.tokens += gained
            if job.left <= 0:
                self._steady *= len(self.running) > 1
                job.end_s = end_s
                self._ending.append(job)
                self.running.remove(job)
                self._scheduler.forget(job.request_id)

    def _admit(self) -> None:
        """Let requests run in their order, as far as there are places and pages."""
        while self.queue and len(self.running) < self.limits.max_requests:
            if self.running and not self._fits(self.queue[0]):
                break
            job = self.queue.popleft()
            job.admitted = self._admissions
            self._admissions += 1
            self.running.append(job)

    def _make_room(self) -> None:
        """Who was admitted last gives its pages up where the others outgrow the cache."""
        while len(self.running) > 1 and not self._fits():
            last = max(self.running, key=lambda job: job.admitted)
            self.running.remove(last)
            last.give_way()
            self.queue.appendleft(last)
            self.counts.preemptions += 1

    def _fits(self, *more: Job) -> bool:
        if self.limits.cache_tokens is None:
            return True
        ahead = 1 + self._num_drafts
        pages = sum(
            -(-(job.prompt_tokens + job.tokens + ahead) // PAGE_SIZE)
            for job in (*self.running, *more)
        )
        return pages * PAGE_SIZE <= self.limits.cache_tokens


@dataclass(frozen=True)
class _Tried:
    """What `Scheduler.learn` reads of `Drafts`."""

    lengths: list[int]
    proposed: list[int]
