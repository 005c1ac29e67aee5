"""One simulated replica: requests wait, run and end as in the engine, on the clock of a table.

A step takes what the machine's table says. Prompts are shared among steps by the engine's own
`plan_step`, drafts are decided on by its own `Scheduler`; what a round keeps comes from the
acceptance profile.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np

from dspark.attention.paged_cache import PAGE_SIZE
from dspark.engine.requests.sequence import ActiveRequest
from dspark.engine.requests.step_plan import plan_step
from dspark.engine.speculation.round_record import Spent
from dspark.engine.speculation.schedule import Schedule
from dspark.scheduling.cost_table import CostTable
from dspark.simulation.acceptance import Acceptance
from dspark.simulation.decisions import Decisions
from dspark.simulation.jobs import Job
from dspark.simulation.machine import Machine

_WORD = (1 << 64) - 1


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
        tree_costs: of rounds of draft trees, in which the engine's choice drafts these; None for
            chains alone. `acceptance` knows of trees then.
    """

    name: str
    costs: CostTable
    acceptance: Acceptance | None = None
    schedule: Schedule = field(default_factory=Schedule)
    depth: int | None = None
    tree_costs: CostTable | None = None

    def machine(self) -> Machine:
        """What its steps take."""
        drafts = self.acceptance.num_drafts if self.acceptance else 0
        return Machine(self.costs, self.depth or drafts)

    @property
    def nodes(self) -> int:
        """Of a draft tree at most; 0 for chains alone."""
        trees = self.acceptance.trees if self.acceptance is not None else None
        return trees.nodes if trees is not None and self.tree_costs is not None else 0


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
        self._most_drafts = max(acceptance.num_drafts if acceptance else 0, self.way.nodes)
        self._decisions: Decisions | None = None
        if acceptance is not None:
            way = self.way
            self._decisions = Decisions(way.schedule, way.costs, acceptance, way.tree_costs)
        self._tree_machine = self._machine
        if self.way.tree_costs is not None:
            self._tree_machine = Machine(self.way.tree_costs, self.way.nodes)
        self._admissions = 0
        self._ending: list[Job] = []
        self._run_T: list[int] = acceptance.run_T.tolist() if acceptance else []
        self._calm = False  # whether everybody has read their prompt, and there are pages enough

    def send(self, job: Job) -> None:
        """Queue a request."""
        acceptance = self.way.acceptance
        if acceptance is not None:
            stream = job.stream
            if stream is None:  # the same for the same request, whatever way, rate and replica
                stream = _any_of(len(acceptance.starts_S), self.seed, job.request_id)
            job.place = (int(acceptance.starts_S[stream]), int(acceptance.lengths_S[stream]))
        self.queue.append(job)
        self.in_flight += 1

    @property
    def has_work(self) -> bool:
        """Whether anybody waits or runs."""
        return bool(self.queue or self.running)

    def step(self, now_s: float, until_s: float = -math.inf) -> float:
        """Play the step that begins now; when it ends.

        Who ends in it is returned by `settle`. Steps that begin before `until_s`, before which no
        request comes, may be played with it, as far as nobody ends in any but the last.
        """
        if self._calm and not self.queue:
            end_s = self._repeat(now_s, until_s)
            if end_s is not None:
                return end_s
        self._admit()
        self._make_room()
        running = cast("list[ActiveRequest]", self.running)
        plan = plan_step(running, self.limits.step_tokens, self._most_drafts)
        ready = cast("list[Job]", plan.ready)
        opening = cast("list[Job]", plan.opening)
        prompt_rows = sum(job.unread for job in opening) + sum(c.count for c in plan.reading)
        if self._decisions is None:
            kept = [0] * len(ready)
            step_ms = self._plain_ms(len(ready), prompt_rows)
        else:
            kept, step_ms = self._round(self._decisions, ready, opening, prompt_rows)
        end_s = now_s + step_ms / 1e3
        self.counts.steps += 1
        self.counts.busy_s += step_ms / 1e3
        for chunk in plan.reading:
            cast("Job", chunk.request).read(chunk.count)
        for job in opening:
            job.first_s = end_s
        self._commit([*ready, *opening], [*kept, *(0,) * len(opening)], end_s)
        self.counts.rounds += len(ready)
        if prompt_rows or not self._calm:
            roomy = self.limits.cache_tokens is None
            self._calm = roomy and all(job.ready for job in self.running)
        return end_s

    def settle(self) -> list[Job]:
        """The requests that ended in the last step, which is over now."""
        ended, self._ending = self._ending, []
        self.in_flight -= len(ended)
        return ended

    def _repeat(self, now_s: float, until_s: float) -> float | None:
        """Rounds that need no plan: plain ones, or whole blocks by a decision that holds.

        Returns:
            When the last of them ends; None if there is no such round.
        """
        requests, machine, counts = len(self.running), self._machine, self.counts
        depth, most = 0, min(job.left for job in self.running)
        draft_ms, verify_ms, rest_ms = 0.0, machine.plain_ms(requests), 0.0
        if self._decisions is not None:
            depth, most = self._decisions.whole(requests)
            if not most:
                return None
            draft_ms = machine.draft_ms(requests, depth)
            verify_ms = machine.verify_ms(requests, requests * depth)
            rest_ms = machine.rest_ms(requests)
            rest_ms += self._decisions.held_weight * machine.schedule_ms(requests)
        step_s = (draft_ms + verify_ms + rest_ms) / 1e3
        steps, end_s = 0, now_s
        while steps < most and not self._ending and (end_s < until_s or not steps):
            steps, end_s = steps + 1, end_s + step_s
            self._commit_whole(depth, end_s)
        if self._decisions is not None:
            self._decisions.skip(requests, steps)
        counts.steps += steps
        counts.rounds += requests * steps
        counts.busy_s += steps * step_s
        counts.draft_s += steps * draft_ms / 1e3
        counts.verify_s += steps * verify_ms / 1e3
        counts.verified += steps * requests * depth
        return end_s

    def _commit_whole(self, depth: int, end_s: float) -> None:
        """Commit a round of whole blocks."""
        run_T, kept = self._run_T, list[int]()
        for job in self.running:
            start, length = job.place
            kept.append(min(run_T[start + (job.tokens - 1) % length], depth) if depth else 0)
        self._commit(list(self.running), kept, end_s)

    def _plain_ms(self, requests: int, prompt_rows: int) -> float:
        step_ms = self._machine.plain_ms(requests) if requests else 0.0
        if not prompt_rows:
            self.counts.verify_s += step_ms / 1e3
        return step_ms + self._machine.prompt_ms(prompt_rows, requests, drafter=False)

    def _round(
        self,
        decisions: Decisions,
        ready: Sequence[Job],
        opening: Sequence[Job],
        prompt_rows: int,
    ) -> tuple[list[int], float]:
        """Drafts kept of each ready request, and the step's milliseconds."""
        acceptance, requests = self.way.acceptance, len(ready)
        assert acceptance is not None
        places_R = np.array(
            [s + (job.tokens - 1) % n for job in ready for s, n in [job.place]], dtype=np.int64
        )
        decision = decisions.decide(ready, opening, places_R)
        machine = self._tree_machine if decision.tree else self._machine
        kept = acceptance.kept(places_R, decision.lengths, trees=decision.tree)
        draft_ms = machine.draft_ms(requests, decision.depth) if decision.depth else 0.0
        schedule_ms = decision.weighed * self._machine.schedule_ms(requests)
        verified = sum(decision.lengths)
        verify_ms = machine.verify_ms(requests, verified) if requests else 0.0
        if requests and not prompt_rows:
            self.counts.verify_s += verify_ms / 1e3
        self.counts.draft_s += draft_ms / 1e3
        self.counts.verified += verified
        whole_ms = verify_ms + self._machine.prompt_ms(prompt_rows, requests, drafter=True)
        if decision.asked:
            rows = requests + verified + prompt_rows
            decisions.learn(kept, Spent(rows, draft_ms, schedule_ms, whole_ms))
        rests = machine if machine.costs.extras else self._machine
        rest_ms = rests.rest_ms(requests) if requests else 0.0
        return kept, draft_ms + whole_ms + rest_ms + schedule_ms

    def _commit(self, jobs: Sequence[Job], kept: Sequence[int], end_s: float) -> None:
        """Commit each one's kept drafts and the token behind them."""
        for job, accepted in zip(jobs, kept, strict=True):
            gained = min(accepted + 1, job.left)
            if job.tokens:
                self.counts.gained += gained
            job.commit(gained)
            self.counts.tokens += gained
            if job.left <= 0:
                job.end_s = end_s
                self._ending.append(job)
                self.running.remove(job)
                if self._decisions is not None:
                    self._decisions.forget(job.request_id)

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
        ahead = 1 + self._most_drafts
        pages = sum(
            -(-(job.prompt_tokens + job.tokens + ahead) // PAGE_SIZE)
            for job in (*self.running, *more)
        )
        return pages * PAGE_SIZE <= self.limits.cache_tokens


def _any_of(count: int, seed: int, number: int) -> int:
    """A number below `count` that hangs on both (splitmix64; Steele, Lea and Flood 2014)."""
    mixed = (number + 1 + (seed << 32)) * 0x9E3779B97F4A7C15 & _WORD
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & _WORD
    return (mixed ^ mixed >> 31) % count
