"""Who holds which pages: neighbours, sharing, the order of eviction, and a check that can fail."""

from __future__ import annotations

import random
import subprocess
import sys
import time

import pytest

from dspark.engine.kv.page_allocator import BUSY
from dspark.engine.kv.page_manager import PagePool, PoolFault
from dspark.errors import UsageError


def one_run(pages):
    return pages == list(range(pages[0], pages[0] + len(pages)))


def ended(pool, tokens):
    """A request that has come and gone, its full pages kept; they are returned."""
    shared = pool.match(tokens)
    pages = shared + pool.allocate(-(-len(tokens) // pool.page_size) - len(shared))
    pool.register(tokens, pages)
    pool.release(pages)
    return pages


def test_requests_one_after_the_other_get_one_run_at_multiples_of_the_extent():
    pool, generator = PagePool(4 * 25 + 7, extent=25), random.Random(0)
    for name in range(300):
        length = generator.randrange(1, 26)
        pages = pool.allocate(generator.randrange(1, length + 1), room=length)
        while len(pages) < length:
            pages += pool.allocate(min(generator.randrange(1, 4), length - len(pages)), pages[-1])
        assert one_run(pages)
        assert pages[0] % 25 == 0
        tokens = [name, *(generator.randrange(9) for _ in range(length * 16 - 1))]
        pool.register(tokens, pages)
        pool.release(pages)
        pool.check({})
    assert pool.evictions > 100


def test_requests_side_by_side_keep_their_runs_while_they_grow():
    """As many as there are extents, in random order, never in each other's way."""
    generator = random.Random(1)
    for _ in range(20):
        pool = PagePool(6 * 10, extent=10)
        runs = [pool.allocate(generator.randrange(1, 10), room=10) for _ in range(6)]
        while pool.available:
            run = generator.choice([run for run in runs if len(run) < 10])
            run += pool.allocate(1, after=run[-1])
        assert all(one_run(run) and run[0] % 10 == 0 for run in runs)


def test_extents_are_taken_empty_ones_first_then_the_longest_unused():
    pool = PagePool(12, page_size=1, extent=4)
    kept = [ended(pool, [i, i]) for i in (1, 2, 3)]
    assert kept == [[0, 1], [4, 5], [8, 9]]
    pool.release(pool.match([1, 1, 1]))  # the first is used again
    assert pool.allocate(1, room=4) == [4]
    assert pool.allocate(2, room=4) == [8, 9]
    assert pool.allocate(3, room=4) == [0, 1, 2]
    pool.release([4])
    assert pool.allocate(4, room=4) == [4, 5, 6, 7]


def test_without_a_free_extent_neighbours_are_found_anywhere():
    pool = PagePool(12, page_size=1, extent=4)
    for begin in (0, 4, 8):
        assert pool.allocate(4) == list(range(begin, begin + 4))
    pool.release([2, 3, 4, 5, 9, 11])
    assert pool.allocate(2, room=4) == [2, 3]
    assert pool.allocate(3) == [4, 5, 9]  # scattered, in order
    assert pool.allocate(2) is None
    assert pool.allocate(1) == [11]
    assert pool.available == 0


def test_a_window_is_left_to_its_run_while_there_is_another_choice():
    pool = PagePool(8, page_size=1, extent=8)
    first = pool.allocate(1, room=4)
    assert pool.allocate(2) == [4, 5]  # not 1, 2: the first may grow there
    assert pool.allocate(1, after=5) == [6]
    assert pool.allocate(1, after=first[-1]) == [1]
    assert pool.allocate(2) == [2, 3]  # 7 alone would not do
    assert pool.allocate(1, after=1) == [7]
    pool.check({"all": range(8)})


def test_a_window_ends_with_its_run():
    pool = PagePool(8, page_size=1, extent=8)
    first, second = pool.allocate(1, room=4), pool.allocate(1)
    assert (first, second) == ([0], [4])
    pool.release(first)
    assert pool.allocate(3) == [0, 1, 2]


def test_a_growing_run_evicts_what_is_kept_in_its_way_and_goes_around_what_is_held():
    pool = PagePool(8, page_size=1, extent=8)
    ended(pool, [5, 6, 7])
    held = pool.match([5, 9])
    assert held == [0]
    assert pool.allocate(1, after=0) == [1]
    assert (pool.evictions, pool.kept) == (2, 0)  # 7 is worth nothing without 6
    other = pool.allocate(1)
    assert other == [2]
    assert pool.allocate(2, after=1) == [3, 4]


def test_a_prefix_is_shared_by_full_pages_and_one_token_stays_to_be_read():
    pool = PagePool(20, page_size=4)
    tokens = list(range(10, 23))
    first = pool.allocate(4)
    pool.register(tokens, first)
    for length, count in ((4, 0), (5, 1), (8, 1), (9, 2), (12, 2), (13, 3), (14, 3)):
        asked = [*tokens, 99][:length]
        assert pool.peek(asked) == count
        assert pool.match(asked) == first[:count]
        pool.release(first[:count])
    assert pool.peek([10, 11, 12, 99, 14]) == 0
    assert pool.peek([*tokens[:4], 99, *tokens[5:]]) == 1
    assert pool.peek(tokens[4:]) == 0  # the same page behind other tokens is another page
    assert (pool.lookups, pool.hit_tokens) == (7, 4 * 12)
    pool.check({"first": first})


def test_shared_pages_stay_until_the_last_has_gone():
    pool = PagePool(6, page_size=2)
    first = pool.allocate(3)
    pool.register([1, 2, 3, 4, 5], first)
    second = pool.match([1, 2, 3, 4, 5])
    assert second == first[:2]
    pool.release(first)
    assert (pool.in_use, pool.kept, pool.available) == (2, 0, 4)
    assert pool.allocate(5) is None
    pool.check({"second": second})
    pool.release(second)
    assert (pool.in_use, pool.kept, pool.available) == (0, 2, 6)
    assert len(pool.allocate(6)) == 6


def test_an_equal_page_is_not_findable_twice():
    pool = PagePool(8, page_size=2)
    first, second = pool.allocate(2), pool.allocate(3)
    pool.register([1, 2, 3, 4], first)
    pool.register([1, 2, 3, 4, 5, 6], second)
    assert pool.match([1, 2, 3, 4, 5, 6, 7]) == [*first, second[2]]
    pool.release([*first, second[2]])
    pool.release(first)
    pool.release(second)
    assert pool.kept == 3  # two of the second's pages were nobody's
    # The second's last page stands on the first's, which count as used with it.
    assert list(pool._kept) == [second[2], first[1], first[0]]
    pool.check({})


def test_equal_hashes_keep_pages_apart():
    assert hash((-1,)) == hash((-2,))
    pool = PagePool(8, page_size=1)
    pages = pool.allocate(1)
    pool.register([-1], pages)
    assert pool.peek([-1, 0]) == 1
    assert pool.peek([-2, 0]) == 0


def test_the_longest_unused_goes_first_and_leaves_before_what_they_stand_on():
    pool = PagePool(6, page_size=1, extent=1)
    root = ended(pool, [1])[0]
    left = ended(pool, [1, 2])[1]
    right = ended(pool, [1, 3])[1]
    alone = ended(pool, [9])[0]
    pool.release(pool.match([1, 2, 0]))
    assert list(pool._kept) == [right, alone, left, root]
    free = pool.allocate(2)
    assert sorted([root, left, right, alone, *free]) == list(range(6))
    assert [pool.allocate(1)[0] for _ in range(4)] == [right, alone, left, root]
    assert pool.evictions == 4


def test_what_could_be_allocated_beside_a_prefix_that_is_kept():
    pool = PagePool(4, page_size=1)
    ended(pool, [1, 2, 3])
    assert pool.available == 4
    assert pool.can_allocate(4)
    assert pool.can_allocate(2, beside=[1, 2, 9])
    assert not pool.can_allocate(3, beside=[1, 2, 9])
    assert not pool.can_allocate(4, beside=[1, 9])
    held = pool.match([1, 2, 9])
    assert pool.can_allocate(2, beside=[1, 2, 9])
    assert pool.allocate(3) is None
    assert len(pool.allocate(2)) == 2
    pool.check({"held": [*held, 2, 3]})


def test_without_reuse_nothing_is_found_or_kept():
    pool = PagePool(4, page_size=1, reuse=False)
    assert ended(pool, [1, 2]) == [0, 1]
    assert (pool.peek([1, 2, 3]), pool.match([1, 2, 3]), pool.kept) == (0, [], 0)
    pool.check({})


def test_everything_can_be_forgotten_at_once():
    pool = PagePool(6, page_size=1)
    held = pool.allocate(2)
    pool.register([7, 8], held)
    ended(pool, [1, 2])
    pool.evict_all()
    assert (pool.kept, pool.evictions, pool.available) == (0, 2, 4)
    assert pool.peek([7, 8, 9]) == pool.peek([1, 2, 3]) == 0
    pool.check({"held": held})
    pool.release(held)
    assert pool.kept == 0


def test_wrong_use_is_a_fault_and_changes_nothing():
    pool = PagePool(4, page_size=1)
    pages = pool.allocate(2)
    pool.register([1, 2], pages)
    for wrong in ([3], [0, 1, 1], [0, 0]):
        with pytest.raises(PoolFault, match=r"Page [013] is released [12] times, but held"):
            pool.release(wrong)
    with pytest.raises(PoolFault, match="Page 3 is to be findable, but nobody holds it"):
        pool.register([5, 6], [0, 3])
    with pytest.raises(PoolFault, match="Page 0 is findable already, by other tokens"):
        pool.register([5], [0])
    with pytest.raises(PoolFault, match="grow behind page 3, which nobody holds"):
        pool.allocate(1, after=3)
    pool.check({"one": pages})
    pool.release(pages)
    with pytest.raises(PoolFault, match="Page 0 is released 1 times, but held 0 times"):
        pool.release(pages)
    pool.check({})


@pytest.mark.parametrize("name", ["pages", "page_size", "extent"])
def test_sizes_that_cannot_be_are_refused(name):
    with pytest.raises(UsageError, match=f"{name} of the cache is 0, but must be at least 1"):
        PagePool(**{"pages": 4, name: 0})


def planted():
    """A pool in every state: pages 0 to 3 held, four kept (two of them behind one), four free."""
    pool = PagePool(12, page_size=1, extent=2)
    held = pool.allocate(4, room=4)
    pool.register([1, 2], held)
    for tokens in ([5], [5, 6], [5, 7], [8]):
        ended(pool, tokens)
    assert list(pool._kept) == [6, 8, 4, 10]  # 5 6, then 5 7, then 5, then 8
    pool.check({"held": held})
    return pool, held


def swap_order(pool):
    """The root of a prefix would be evicted before its leaf."""
    root, leaf = pool._tree.find([5], 1)[0], pool._tree.find([5, 6], 2)[1]
    pool._age[root], pool._age[leaf] = pool._age[leaf], pool._age[root]
    for page in sorted(pool._kept, key=pool._age.__getitem__):
        pool._kept.move_to_end(page)


def shorten(pool):
    """A page would be found by fewer tokens than it holds."""
    node = leaf_node(pool)
    page = pool._tree._index.pop(node.key)
    node.key = (node.parent, ())
    pool._tree._index[node.key] = page


def kept_page(pool):
    return next(iter(pool._kept))


def free_page(pool):
    return next(page for page in range(pool.pages) if not pool._age[page])


def leaf_node(pool):
    return pool._tree._nodes[pool._tree.find([5, 6], 2)[1]]


CORRUPTIONS = {
    "a hold too many": lambda p: p._holds.__setitem__(0, 2),
    "a hold lost": lambda p: p._holds.__setitem__(0, 0),
    "a negative hold": lambda p: p._holds.__setitem__(free_page(p), -1),
    "a held page that counts as free": lambda p: p._age.__setitem__(3, 0),
    "a free page that counts as held": lambda p: p._age.__setitem__(free_page(p), BUSY),
    "a free page that counts as kept": lambda p: p._age.__setitem__(free_page(p), 1),
    "a kept page that counts as free": lambda p: p._age.__setitem__(kept_page(p), 0),
    "a kept page without its turn": lambda p: p._kept.pop(kept_page(p)),
    "a free page with a turn": lambda p: p._kept.__setitem__(free_page(p), None),
    "a turn in the wrong place": lambda p: p._kept.move_to_end(kept_page(p)),
    "a root before its leaf": swap_order,
    "a wrong number of held pages": lambda p: setattr(p, "_in_use", 3),
    "a kept page that nothing finds": lambda p: p._tree.cut(kept_page(p)),
    "a free page that is findable": lambda p: p._tree.add([3], [free_page(p)]),
    "a child without its parent": lambda p: p._tree._nodes.pop(p._tree.find([5], 1)[0]),
    "a key that finds nothing": lambda p: p._tree._index.pop(leaf_node(p).key),
    "a key too many": lambda p: p._tree._index.__setitem__((-1, (77,)), 0),
    "a key of another page": lambda p: p._tree._index.__setitem__(leaf_node(p).key, 0),
    "a child that is missing": lambda p: p._tree._nodes[p._tree.find([5], 1)[0]].children.pop(),
    "a child too many": lambda p: p._tree._nodes[0].children.add(kept_page(p)),
    "a key of too few tokens": shorten,
    "a wrong depth": lambda p: setattr(leaf_node(p), "depth", 5),
    "a window of nobody": lambda p: p._windows.open(10, 10, 12),
    "a window beyond the pool": lambda p: setattr(p._windows._by_tail[3], "end", 13),
    "a claim of no window": lambda p: p._windows._claims.__setitem__(11, 99),
    "a claim outside its window": lambda p: p._windows._claims.__setitem__(
        11, p._windows._by_tail[3].number
    ),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_check_finds_every_planted_fault(name):
    pool, held = planted()
    CORRUPTIONS[name](pool)
    with pytest.raises(PoolFault, match="The cache is inconsistent: "):
        pool.check({"held": held})


@pytest.mark.parametrize(
    ("holders", "said"),
    [
        ({}, "page 0 is held 1 times, but is in the tables of nobody 0 times"),
        ({"a": [0, 1, 2]}, "page 3 is held 1 times"),
        ({"a": [0, 1, 2, 3], "b": [3]}, "page 3 is held 1 times, but is in the tables of a, b 2"),
        ({"a": [0, 1, 2, 3, 11]}, "page 11 is held 0 times, but is in the tables of a 1 times"),
        ({"a": [0, 1, 2, 3], "b": [12]}, "page 12 is held 0 times, but is in the tables of b 1"),
    ],
)
def test_the_check_compares_tables(holders, said):
    pool, _ = planted()
    pool.check()
    with pytest.raises(PoolFault, match=said):
        pool.check(holders)


def test_a_hundred_thousand_operations_take_a_moment():
    """With 10,000 pages; about a second of CPU time, so five mean that something is quadratic."""
    pool, generator = PagePool(10_000, extent=64), random.Random(0)
    live, operations, begin = [], 0, time.process_time()
    while operations < 100_000:
        choice = generator.random()
        if len(live) < 150 and (choice < 0.5 or not live):
            tokens = [1] * generator.randrange(320) + [generator.randrange(50)] * 100
            pages = pool.match(tokens)
            pages += pool.allocate(len(tokens) // 16 + 1 - len(pages), room=64)
            live.append((tokens, pages))
        elif choice < 0.93:
            tokens, pages = generator.choice(live)
            pages += pool.allocate(1, after=pages[-1]) or []
            tokens += [generator.randrange(50)] * (len(pages) * 16 - len(tokens))
        else:
            tokens, pages = live.pop(generator.randrange(len(live)))
            pool.register(tokens, pages)
            pool.release(pages)
        operations += 1 if 0.5 <= choice < 0.93 else 2
    assert time.process_time() - begin < 5
    assert pool.evictions > 1000
    assert pool.hit_tokens > 100_000
    pool.check({str(name): pages for name, (_, pages) in enumerate(live)})


def test_no_torch_is_needed():
    code = "import dspark.engine.kv.page_manager, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
