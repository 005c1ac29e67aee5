import random

import pytest
import torch

from dspark.attention.paged_cache import BlockTable, CacheShape, PagedCache
from dspark.attention.ragged_batch import RaggedBatch

SHAPES = (CacheShape(2, 4, 4), CacheShape(1, 6, 3), CacheShape(1, 5, 0))
LAYOUTS = pytest.mark.parametrize("by_token", [False, True])


def obvious_rows(pages, page_size, begin, end):
    return [pages[p // page_size] * page_size + p % page_size for p in range(begin, end)]


def obvious_runs(rows):
    runs = []
    for row in rows:
        if runs and row == sum(runs[-1]):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((row, 1))
    return runs


def test_tables_follow_their_pages_through_any_changes():
    source, seen = random.Random(0), set()
    for page_size in (1, 3, 16) * 20:
        table, pages = BlockTable(page_size=page_size), []
        for _ in range(30):
            if pages and source.random() < 0.6:
                table.append(pages[-1] + 1)
                pages.append(pages[-1] + 1)
            else:
                new = [source.randrange(50) for _ in range(source.randrange(3))]
                table.extend(new)
                pages += new
            assert table.pages == pages
            assert table.capacity == len(pages) * page_size
            begin = source.randrange(table.capacity + 1)
            end = source.randrange(begin, table.capacity + 1)
            rows = obvious_rows(pages, page_size, begin, end)
            assert list(table.rows(begin, end)) == rows
            assert table.runs(begin, end) == obvious_runs(rows)
            seen.add(min(len(table.runs(begin, end)), 4))
        with pytest.raises(AssertionError, match="rows are asked"):
            table.rows(0, table.capacity + 1)
    assert seen == {0, 1, 2, 3, 4}


def test_a_table_starts_with_the_pages_it_is_given():
    table = BlockTable((4, 5, 9), page_size=8)
    assert table.runs(0, 24) == [(32, 16), (72, 8)]
    assert BlockTable().runs(0, 0) == []


def new_cache(pages=6, by_token=None):
    return PagedCache(SHAPES, pages, 4, by_token=by_token)


def rows(count, layer, seed=0):
    torch.manual_seed(seed)
    shape = SHAPES[layer]
    keys = torch.randn(count, shape.kv_heads, shape.key_dim)
    return keys, torch.randn(count, shape.kv_heads, shape.value_dim)


@LAYOUTS
@pytest.mark.parametrize("layer", range(len(SHAPES)))
def test_written_rows_are_seen_where_they_belong(layer, by_token):
    cache, (keys, values) = new_cache(by_token=by_token), rows(5, layer)
    written = torch.tensor([22, 3, 4, 12, 20])
    cache.write(layer, written, keys, values)
    back = torch.tensor([4, 1, 0])
    seen_keys, seen_values = cache.read(layer, written[back])
    assert torch.equal(seen_keys, keys[back])
    assert torch.equal(seen_values, values[back])
    others = torch.tensor([row for row in range(24) if row not in written.tolist()])
    assert not cache.read(layer, others)[0].any()
    assert not cache.read((layer + 1) % 3, torch.arange(24))[0].any()


def test_writing_again_replaces():
    cache, (keys, values) = new_cache(), rows(2, 0)
    where = torch.tensor([13, 4])
    cache.write(0, where, keys + 1, values + 1)
    cache.write(0, where, keys, values)
    assert torch.equal(cache.read(0, where)[0], keys)


@LAYOUTS
@pytest.mark.parametrize(
    ("begin", "end", "shares"), [(0, 8, True), (1, 7, True), (2, 11, False), (0, 12, False)]
)
def test_a_request_sees_its_own_rows(begin, end, shares, by_token):
    cache, table = new_cache(by_token=by_token), BlockTable((3, 4, 1), 4)
    cache.write(0, torch.arange(24), *rows(24, 0))
    expected = cache.read(0, torch.tensor(table.rows(begin, end)))
    before = cache.read(0, torch.arange(24))[0].clone()
    for seen, own in zip(cache.heads(0, table, begin, end), expected, strict=True):
        assert torch.equal(seen[0].transpose(0, 1), own)
        seen.add_(1.0)
    assert torch.equal(cache.read(0, torch.arange(24))[0], before) != shares
    keys, values = cache.pieces(0, table, begin, end)
    assert [piece.shape[2] for piece in keys] == [n for _, n in table.runs(begin, end)]
    assert len(keys) == len(values)


@LAYOUTS
@pytest.mark.parametrize("layer", range(len(SHAPES)))
def test_spans_and_gathered_rows_are_rows_of_the_pool(layer, by_token):
    cache = new_cache(by_token=by_token)
    cache.write(layer, torch.arange(24), *rows(24, layer))
    index = torch.tensor([[2, 3, 4], [9, 10, 11], [16, 17, 18]])
    both = cache.spans(layer, 2, 7, 3, 3), cache.gather(layer, index)
    for seen in both:
        for r in range(3):
            for mine, own in zip(seen, cache.read(layer, index[r]), strict=True):
                assert torch.equal(mine[r].transpose(0, 1), own)


@LAYOUTS
@pytest.mark.parametrize(
    "parts",
    [
        [((1,), 1, 3)],
        [((2, 0), 0, 2), ((3, 9), 3, 3)],
        [((2,), 0, 2), ((0, 4), 5, 1), ((1,), 1, 3)],
        [(range(40, 80), 0, 130), ((0, 2, 4), 0, 9), ((9,), 3, 1), (range(100, 140), 0, 140)],
    ],
    ids=["one", "two", "scattered", "long"],
)
def test_writing_runs_equals_writing_rows(parts, by_token):
    parts = [(BlockTable(pages, 4), start, range(n)) for pages, start, n in parts]
    batch = RaggedBatch.build(parts)
    keys, values = rows(len(batch.input_ids_T), 1)
    one, other = new_cache(140, by_token), new_cache(140, by_token)
    one.write(1, batch.rows_T, keys, values)
    by_head = (keys.transpose(0, 1).unsqueeze(0), values.transpose(0, 1).unsqueeze(0))
    other.write_runs(1, batch.rows_T, batch.runs, *by_head)
    for a, b in zip(one.pool(1), other.pool(1), strict=True):
        assert a.any()
        assert torch.equal(a, b)


def test_properties():
    cache = new_cache()
    assert (cache.pages, cache.page_size, cache.rows) == (6, 4, 24)
    assert cache.bytes == 24 * 4 * (2 * 8 + 1 * 9 + 1 * 5)
    assert [memory.shape for memory in cache.pool(1)] == [(1, 1, 24, 6), (1, 1, 24, 3)]
    assert new_cache(by_token=False).pool(0)[0][0, 0].is_contiguous()
    assert new_cache(by_token=True).pool(0)[0][0, :, 0].is_contiguous()


def test_pages_lie_as_kernels_with_a_block_table_read_them():
    cache = new_cache(by_token=True)
    cache.write(1, torch.arange(24), *rows(24, 1))
    for paged, flat in zip(cache.by_page(1), cache.read(1, torch.arange(24)), strict=True):
        assert paged.is_contiguous()
        assert torch.equal(paged.flatten(0, 1), flat)
