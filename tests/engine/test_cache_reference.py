"""The account of pages in lock-step with a slow and obvious one."""

from __future__ import annotations

import itertools
import random

import pytest

from dspark.engine.kv.page_allocator import Windows
from dspark.engine.kv.page_manager import PagePool
from dspark.engine.kv.prefix_cache import PrefixTree


class SlowPool:
    """What `PagePool` must do. A findable page is known by all the tokens up to its last one."""

    def __init__(self, pages, page_size, extent):
        self.pages, self.page_size, self.extent = pages, page_size, extent
        self.holds = dict.fromkeys(range(pages), 0)
        self.findable = {}  # all tokens up to the page's last -> page
        self.used = {}  # kept page -> time of last use
        self.windows = {}  # last page of a run -> [end, claimed pages]
        self.clock = self.hit_tokens = self.evictions = 0

    @property
    def in_use(self):
        return sum(holds > 0 for holds in self.holds.values())

    @property
    def available(self):
        return self.pages - self.in_use

    @property
    def order_of_eviction(self):
        return sorted(self.used, key=self.used.get)

    def prefixes(self, tokens, most):
        size = self.page_size
        return [tuple(tokens[: n * size]) for n in range(1, most + 1)]

    def find(self, tokens):
        found = []
        for prefix in self.prefixes(tokens, max(len(tokens) - 1, 0) // self.page_size):
            if prefix not in self.findable:
                break
            found.append(self.findable[prefix])
        return found

    def match(self, tokens):
        found = self.find(tokens)
        self.hit_tokens += len(found) * self.page_size
        for page in found:
            self.holds[page] += 1
            self.used.pop(page, None)
        return found

    def can_allocate(self, count, beside):
        held = {page for page, holds in self.holds.items() if holds} | set(self.find(beside))
        return count <= self.pages - len(held)

    def register(self, tokens, pages):
        prefixes = self.prefixes(tokens, len(tokens) // self.page_size)
        for prefix, page in zip(prefixes, pages, strict=False):
            self.findable.setdefault(prefix, page)

    def release(self, pages):
        for page in pages:
            self.holds[page] -= 1
            if not self.holds[page]:
                self.windows.pop(page, None)
        paths = [path for path, page in self.findable.items() if page in pages]
        touched = [
            (len(path), page)
            for path, page in self.findable.items()
            if any(longer[: len(path)] == path for longer in paths)
        ]
        for _, page in sorted(touched, reverse=True):
            if not self.holds[page]:
                self.clock += 1
                self.used[page] = self.clock

    def evict_all(self):
        self.evictions += len(self.used)
        self.findable, self.used = {}, {}

    def evict(self, page):
        (path,) = [path for path, p in self.findable.items() if p == page]
        for longer, p in list(self.findable.items()):
            if longer[: len(path)] == path:
                del self.findable[longer]
                self.evictions += self.used.pop(p, 0) > 0

    def take(self, pages):
        for page in pages:
            if page in self.used:
                self.evict(page)
            self.holds[page] = 1
        return list(pages)

    def claimed(self, page, tail=None):
        return any(page in claims for t, (_, claims) in self.windows.items() if t != tail)

    def allocate(self, count, after=None, room=0):
        if count > self.available:
            return None
        taken = []
        if after is not None:
            page = after + 1
            while (
                len(taken) < count
                and page < self.pages
                and not self.holds[page]
                and not self.claimed(page, after)
            ):
                taken += self.take([page])
                page += 1
            window = self.windows.pop(after, None)
            if window is None:
                room -= len(taken)
            elif len(taken) == count:
                self.windows[taken[-1] if taken else after] = [
                    max(window[0], page),
                    window[1] | set(taken),
                ]
            else:
                room = max(room - len(taken), window[0] - page)
        if len(taken) < count:
            taken += self.begin(count - len(taken), room)
        return taken

    def begin(self, count, room):
        need = max(count, room)
        whole = -(-need // self.extent) * self.extent
        everywhere = range(self.pages)
        for heed in (True, False):
            free = {p for p in everywhere if not self.holds[p] and not (heed and self.claimed(p))}

            def age(window):
                return max(self.used.get(page, 0) for page in window)

            for starts, size, end in (
                (everywhere[:: self.extent], whole, need),
                (everywhere, need, need),
                (everywhere, count, count),
            ):
                windows = [range(start, start + size) for start in starts]
                windows = [window for window in windows if free.issuperset(window)]
                if windows:
                    start = min(windows, key=lambda window: (age(window), window[0]))[0]
                    self.take(range(start, start + count))
                    claims = set(range(start, start + end))
                    for other in self.windows.values():
                        other[1] -= claims
                    self.windows[start + count - 1] = [start + end, claims]
                    return list(range(start, start + count))
            if len(free) >= count:
                oldest = sorted(free, key=lambda page: (self.used.get(page, 0), page))[:count]
                return self.take(sorted(oldest))
        raise AssertionError("there were enough pages")


class Pair:
    """Both accounts, driven with the same random requests and compared after every operation."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        size = self.random.choice([1, 2, 4])
        pages = self.random.choice([5, 12, 31, 48])
        extent = self.random.choice([1, 1, 3, 4, 8])
        self.fast = PagePool(pages, size, extent)
        self.slow = SlowPool(pages, size, extent)
        self.live = []  # (tokens, pages)

    def both(self, name, *args, **options):
        fast, slow = (getattr(pool, name)(*args, **options) for pool in (self.fast, self.slow))
        assert fast == slow, name
        return fast

    def compare(self):
        assert list(self.fast._kept) == self.slow.order_of_eviction
        for name in ("in_use", "available", "hit_tokens", "evictions"):
            assert getattr(self.fast, name) == getattr(self.slow, name), name
        self.fast.check({str(i): pages for i, (_, pages) in enumerate(self.live)})

    def new_tokens(self, most):
        return [self.random.randrange(2) for _ in range(self.random.randrange(most))]

    def join(self):
        size = self.fast.page_size
        tokens = [1, 0, 1, 1, 0, 0, 1, 0][: self.random.randrange(9)] + self.new_tokens(4 * size)
        if self.live and self.random.random() < 0.3:
            tokens = list(self.random.choice(self.live)[0]) + self.new_tokens(size)
        tokens = tokens or [1]
        total = -(-(len(tokens) + 1) // size)
        missing = total - self.fast.peek(tokens)
        possible = self.both("can_allocate", missing, tokens)
        shared = self.both("match", tokens)
        own = self.both("allocate", missing, room=self.random.choice([0, total, total + 3]))
        assert possible == (own is not None)
        if own is None:
            self.both("release", shared)
        else:
            self.live.append((tokens, [*shared, *own]))

    def grow(self):
        tokens, pages = self.random.choice(self.live)
        room = self.random.choice([0, 0, 4])
        new = self.both("allocate", self.random.randrange(4), after=pages[-1], room=room)
        pages += new or []
        space = len(pages) * self.fast.page_size - len(tokens)
        tokens += [self.random.randrange(2) for _ in range(self.random.randrange(space + 1))]

    def settle(self):
        tokens, pages = self.random.choice(self.live)
        self.both("register", tokens, pages)

    def cut(self):
        tokens, pages = self.random.choice(self.live)
        needed = max(-(-len(tokens) // self.fast.page_size), 1)
        self.both("release", pages[needed:])
        del pages[needed:]

    def leave(self):
        tokens, pages = self.live.pop(self.random.randrange(len(self.live)))
        if self.random.random() < 0.8:
            self.both("register", tokens, pages)
        self.both("release", pages)

    def run(self, operations):
        for _ in range(operations):
            choice = self.random.random()
            if not self.live or choice < 0.3:
                self.join()
            elif choice < 0.995:
                self.random.choice([self.grow, self.grow, self.settle, self.cut, self.leave])()
            else:
                self.both("evict_all")
            self.compare()


@pytest.mark.parametrize("seed", range(40))
def test_every_operation_does_what_the_slow_account_does(seed):
    pair = Pair(seed)
    pair.run(400)
    while pair.live:
        pair.leave()
        pair.compare()
    assert pair.fast.in_use == 0


def test_the_requests_above_come_to_all_that_can_happen():
    """Hits, evictions, refusals, shared pages and runs in pieces, each many times."""
    hits = evictions = full = shared = pieces = 0
    for seed in range(24):
        pair = Pair(seed)
        for _ in range(100):
            pair.run(1)
            holds = pair.fast._holds
            full += pair.fast.available == 0
            shared += max(holds) > 1
            runs = [pages for _, pages in pair.live]
            pieces += any(b != a + 1 for r in runs for a, b in itertools.pairwise(r))
        hits += pair.fast.hit_tokens > 0
        evictions += pair.fast.evictions > 0
    assert min(hits, evictions) >= 15
    assert min(full, shared, pieces) >= 100


@pytest.mark.parametrize(
    ("owner", "name", "wrong"),
    [
        (PrefixTree, "with_ancestors", lambda self, pages: [p for p in pages if p in self]),
        (PrefixTree, "cut", lambda self, page, cut=PrefixTree.cut: [*cut(self, page)[:1]]),
        (Windows, "lets", lambda self, page, tail: True),
        (Windows, "unclaimed", lambda self, ages_P: ages_P),
        (Windows, "close", lambda self, tail: 0),
    ],
)
def test_control_a_wrong_account_is_noticed(monkeypatch, owner, name, wrong):
    monkeypatch.setattr(owner, name, wrong)

    def drive():
        for seed in range(24):
            Pair(seed).run(250)

    with pytest.raises((AssertionError, KeyError)):
        drive()
