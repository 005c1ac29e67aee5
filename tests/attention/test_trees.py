"""A tree in a batch: every node as if its own path alone had been read."""

from __future__ import annotations

import pytest
import torch

from dspark.attention import backends
from dspark.attention.backends import Rule, cached_attention
from dspark.attention.padding import plan_padding
from dspark.attention.paged_cache import BlockTable, CacheShape, PagedCache
from dspark.attention.ragged_batch import RaggedBatch, depths, with_trees

PARENTS = (-1, 0, -1, 0, 1, 2, 1)
HEADS, GROUPS, DIM = 4, 2, 8


def path_of(node):
    path = [node]
    while PARENTS[path[0]] >= 0:
        path.insert(0, PARENTS[path[0]])
    return path


def test_positions_are_depths():
    assert depths(PARENTS) == [1, 2, 1, 2, 3, 2, 3]
    table, other = BlockTable((0, 1)), BlockTable((2,))
    batch = RaggedBatch.build([(table, 3, range(9)), (other, 5, range(2))])
    found = with_trees(batch, [PARENTS, ()])
    assert found.positions_T.tolist() == [3, 4, 5, 6, 5, 6, 7, 6, 7, 5, 6]
    assert found.rows_T.tolist() == batch.rows_T.tolist()


@pytest.mark.parametrize(
    "rule",
    [
        Rule(0.3),
        Rule(0.3, window=4),
        Rule(0.3, sinks=torch.linspace(-1, 1, HEADS)),
        Rule(0.3, window=3, softcap=2.0),
    ],
    ids=["plain", "window", "sinks", "softcap"],
)
def test_a_node_attends_like_the_end_of_its_own_path(rule):
    generator = torch.Generator().manual_seed(0)
    stem, nodes, before = 2, len(PARENTS), 5
    count = before + stem + nodes
    keys, values = torch.randn(2, count, GROUPS, DIM, generator=generator)
    query = torch.randn(1, HEADS, stem + nodes, DIM, generator=generator)

    def attend(rows, queries, start, parents=()):
        """Attention of the last queries over these rows, two requests at once."""
        tables = BlockTable((1, 0)), BlockTable((2,))
        cache = PagedCache([CacheShape(GROUPS, DIM, DIM)], 4)
        own = tables[0].rows(0, len(rows))
        cache.write(0, torch.tensor(list(own)), keys[rows], values[rows])
        length = queries.shape[2]
        batch = RaggedBatch.build([(tables[1], 0, [0]), (tables[0], start, range(length))])
        if parents:
            batch = with_trees(batch, [(), parents])
        both = torch.cat((torch.zeros(1, HEADS, 1, DIM), queries), 2)
        return cached_attention(both, cache, 0, batch, rule)[:, :, 1:]

    found = attend(list(range(count)), query, before, PARENTS)
    for node in range(nodes):
        path = path_of(node)
        rows = [*range(before + stem), *(before + stem + n for n in path)]
        places = [*range(stem), *(stem + n for n in path)]
        alone = attend(rows, query[:, :, places], before)
        assert torch.allclose(found[:, :, stem + node], alone[:, :, -1], atol=1e-6)


@pytest.mark.parametrize("cached", [0, 1, 3, 6])
def test_nodes_may_be_in_the_cache_already(cached):
    """The last nodes of a tree, alone and beside another request, are what they are all at once."""
    generator, begin, nodes = torch.Generator().manual_seed(3), 9, len(PARENTS)
    tables = BlockTable((1,)), BlockTable((2,))
    cache = PagedCache([CacheShape(GROUPS, DIM, DIM)], 3)
    cache.write(0, torch.arange(48), *torch.randn(2, 48, GROUPS, DIM, generator=generator))
    query = torch.randn(1, HEADS, nodes, DIM, generator=generator)
    other = torch.randn(1, HEADS, 4, DIM, generator=generator)

    def attend(first, *, alone):
        parts = [(tables[0], begin + first, range(nodes - first)), (tables[1], 8, range(4))]
        count = 1 if alone else 2
        batch = with_trees(RaggedBatch.build(parts[:count]), (PARENTS, ())[:count])
        assert batch.positions_T.tolist()[: nodes - first] == [
            begin - 1 + depth for depth in depths(PARENTS)[first:]
        ]
        rows = query[:, :, first:] if alone else torch.cat((query[:, :, first:], other), 2)
        return cached_attention(rows, cache, 0, batch, Rule(0.3, first=1))[:, :, : nodes - first]

    whole = attend(0, alone=True)
    for alone in (True, False):
        assert torch.allclose(attend(cached, alone=alone), whole[:, :, cached:], atol=1e-6)


def test_rows_move_together():
    cache = PagedCache([CacheShape(1, 2, 2)] * 2, 1)
    rows = torch.arange(16)
    for layer in (0, 1):
        numbers = (rows + 100 * layer).float()[:, None, None].expand(-1, 1, 2)
        cache.write(layer, rows, numbers, -numbers)
    cache.move(torch.tensor([5, 4]), torch.tensor([4, 3]))
    keys, values = cache.read(1, rows)
    assert keys[:, 0, 0].tolist()[:7] == [100, 101, 102, 104, 105, 105, 106]
    assert values[:, 0, 0].tolist()[3:5] == [-104, -105]


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("scattered", [False, True])
def test_trees_of_several_requests_are_attended_to_at_once(window, scattered, monkeypatch):
    generator = torch.Generator().manual_seed(1)
    first = BlockTable((3, 0) if scattered else (0, 1))
    tables = (first, BlockTable((2,)), BlockTable((4,)))
    trees = (PARENTS, (-1, 0, 0), ())
    lengths = (len(PARENTS) + 1, 4, 2)
    starts = (12, 9, 11)
    parts = [(t, s, range(n)) for t, s, n in zip(tables, starts, lengths, strict=True)]
    cache = PagedCache([CacheShape(GROUPS, DIM, DIM)], 6)
    every = torch.arange(cache.rows)
    cache.write(0, every, *torch.randn(2, cache.rows, GROUPS, DIM, generator=generator))
    query = torch.randn(1, HEADS, sum(lengths), DIM, generator=generator)
    batch = with_trees(RaggedBatch.build(parts), trees)
    rule = Rule(0.3, window=window)
    assert plan_padding(batch, window, 0, query, cache, 0) is not None
    found = cached_attention(query, cache, 0, batch, rule)
    monkeypatch.setattr(backends, "plan_padding", lambda *_: None)
    assert torch.allclose(found, cached_attention(query, cache, 0, batch, rule), atol=1e-6)
