"""Admission: which requests wait, run, or are preempted where pages run short."""

from __future__ import annotations

from collections import deque

from dspark.attention.paged_cache import PAGE_SIZE
from dspark.engine.kv.memory import Memory
from dspark.engine.requests.sequence import ActiveRequest
from dspark.errors import QueueFullError, RequestError

# A prompt of which another running request is reading at least so many tokens waits for these.
_WORTH_WAITING_TOKENS = 2 * PAGE_SIZE


class Roster:
    """The queue and the running requests.

    Args:
        memory: whose pages they hold.
        max_requests: requests that run at most.
        max_queue: requests that may wait beyond those for whom a place is free; None for any
            number.

    Attributes:
        queue: requests that wait, the next one first.
        running: requests that hold pages; those that the drafter has failed are last.
        preemptions: how often a request gave its pages up for another.
    """

    def __init__(self, memory: Memory, max_requests: int, max_queue: int | None) -> None:
        self.memory = memory
        self.max_requests = max_requests
        self.max_queue = max_queue
        self.queue: deque[ActiveRequest] = deque()
        self.running: list[ActiveRequest] = []
        self.preemptions = 0
        self._admissions = 0

    @property
    def everyone(self) -> list[ActiveRequest]:
        """All requests that have not ended."""
        return [*self.running, *self.queue]

    @property
    def _places(self) -> int:
        return self.max_requests - len(self.running)

    def is_full(self, count: int) -> bool:
        """Whether the queue has no room for `count` more requests."""
        if self.max_queue is None:
            return False
        return len(self.queue) + count > self._places + self.max_queue

    def check_queue(self, count: int) -> None:
        """Refuse `count` more requests where the queue has no room for them.

        Raises:
            RequestError: it never has.
            QueueFullError: it has not now.
        """
        if self.max_queue is not None and count > self.max_requests + self.max_queue:
            raise RequestError(
                f"n is {count}, but no more than {self.max_requests + self.max_queue} requests "
                "can run and wait here; ask for fewer answers."
            )
        if self.is_full(count):
            waiting = max(len(self.queue) - self._places, 0)
            raise QueueFullError(
                f"{waiting} requests wait already, and {count} more would pass the limit of "
                f"{self.max_queue}; ask again later."
            )

    def admit(self) -> None:
        """Let waiting requests run, in their order, as far as there are places and pages."""
        waiting, self.queue = self.queue, deque()
        while waiting and self._places > 0:
            request = waiting.popleft()
            if self._soon_shared(request):
                self.queue.append(request)
                continue
            if not self.memory.admit(request, spare_pages=len(self.running)):
                waiting.appendleft(request)
                break
            request.admitted = self._admissions
            self._admissions += 1
            self.running.append(request)
        self.queue.extend(waiting)
        # Neighbouring pages side by side are what attention reads fastest.
        self.running.sort(key=lambda request: (request.plain, request.table.pages[0]))

    def _soon_shared(self, request: ActiveRequest) -> bool:
        """Whether a running request is reading a prefix that this one could take over."""
        if not self.memory.pool.reuse or request.reads_all:
            return False
        found = None
        for other in self.running:
            if other.resumed:
                continue
            both = zip(request.tokens[:-1], other.tokens, strict=False)
            shared = next((i for i, (a, b) in enumerate(both) if a != b), len(request.tokens) - 1)
            shared = min(shared, len(other.tokens)) // PAGE_SIZE * PAGE_SIZE
            if shared < _WORTH_WAITING_TOKENS or shared <= other.cached:
                continue
            found = self.memory.findable(request) if found is None else found
            if shared - found >= _WORTH_WAITING_TOKENS:
                return True
        return False

    def make_room(self) -> None:
        """Give every ready request the pages of its next round; who came last gives way.

        It goes back to the head of the queue, to be read again: drawn tokens, and the place in
        the stream of randomness, stay.
        """
        for request in sorted(self.running, key=lambda r: r.admitted):
            while request.ready and request.table.pages and not self.memory.grow(request):
                last = max(self.running, key=lambda r: r.admitted)
                self.remove(last)
                self.queue.appendleft(last)
                self.preemptions += 1

    def read_again(self) -> None:
        """Have every running request read again from its first token, in the order of admission.

        Nothing of what they have read, nor of kept prefixes, can be found any more. Those that
        decode plainly to their end go on: nobody drafts for them.
        """
        for request in sorted(self.running, key=lambda r: r.admitted, reverse=True):
            if request.plain:
                request.observed = 0
                continue
            self.remove(request)
            self.queue.appendleft(request)
        self.memory.pool.evict_all()

    def remove(self, request: ActiveRequest) -> None:
        """Take a request out, wherever it is, and its pages back."""
        if request in self.running:
            self.running.remove(request)
            self.memory.release(request)
        else:
            self.queue.remove(request)
