import pytest
import torch

from dspark.attention import blocks, padding
from dspark.attention.backends import Rule, fresh_attention, ragged_attention
from dspark.attention.blocks import BlockContext, block_attention
from dspark.attention.padding import plan_padding
from dspark.attention.paged_cache import BlockTable, CacheShape, PagedCache
from dspark.attention.ragged_batch import RaggedBatch

HEADS, DIM, SCALE = 4, 8, 0.3
PAGE, PAGES = 4, 40
STEPS = {
    "decode one": [(1, 6, 1)],
    "decode many": [(0, 6, 1), (1, 9, 1), (2, 7, 1)],
    "verify one": [(0, 5, 4)],
    "verify many": [(0, 6, 4), (1, 8, 4), (2, 7, 4)],
    "verify ragged": [(2, 6, 4), (0, 8, 1), (1, 7, 3)],
    "with a gap": [(3, 6, 2), (0, 8, 2), (1, 7, 2)],
    "prefill": [(0, 0, 7)],
    "prefill long": [(0, 0, 20), (1, 0, 18)],
    "later piece": [(0, 3, 5)],
    "later long piece": [(0, 3, 19)],
    "mixed": [(0, 0, 6), (2, 5, 1), (1, 9, 4)],
    "mixed long": [(0, 0, 20), (2, 5, 1), (1, 4, 18)],
    "beside a prompt": [(0, 6, 1), (1, 9, 1), (2, 7, 1), (3, 0, 20)],
    "beside a short prompt": [(0, 6, 2), (1, 9, 1), (2, 7, 2), (3, 4, 12)],
    "very uneven": [(0, 25, 1), (1, 1, 1), (2, 0, 1)],
    "one request twice": [(0, 2, 2), (0, 4, 2), (1, 5, 2)],
    "an empty part": [(0, 2, 2), (1, 0, 0), (2, 5, 1)],
}
# The pages of four requests of up to 32 tokens.
TABLES = {
    "equal distances": [range(8 * i, 8 * i + 8) for i in range(4)],
    "multiples of a distance": [range(8, 16), range(24, 32), range(8), range(32, 40)],
    "unequal distances": [range(8), range(20, 28), range(8, 16), range(31, 39)],
    "scattered": [range(36, 4, -4), range(37, 5, -4), range(1, 9), (0, 39, 9, 35, 31, 34, 30, 10)],
    "shared first pages": [(7, 20, *range(1 + 8 * i, 7 + 8 * i)) for i in range(4)],
}


def filled(shape=(2, DIM, DIM), dtype=torch.float32, *, by_token=False):
    cache = PagedCache([CacheShape(*shape)], PAGES, PAGE, dtype, by_token=by_token)
    keys = torch.randn(cache.rows, shape[0], shape[1], dtype=dtype)
    values = torch.randn(cache.rows, shape[0], shape[2], dtype=dtype)
    cache.write(0, torch.arange(cache.rows), keys, values)
    return cache


def tables_of(name="equal distances"):
    return [BlockTable(pages, PAGE) for pages in TABLES[name]]


def batch_of(step, tables):
    return RaggedBatch.build([(tables[i], start, range(length)) for i, start, length in step])


def rows_of(cache, table, begin, end):
    return cache.read(0, torch.tensor([*table.rows(begin, end)], dtype=torch.int64))


def close(out, expected, limit=2e-6):
    assert out.shape == expected.shape
    assert (out.double() - expected).abs().max() <= limit


def check(causal_reference, cache, batch, *, first=0, **rule):
    """Attention of a batch against that over explicit copies of every request's keys."""
    query = torch.randn(len(batch.input_ids_T), HEADS, DIM)
    out = ragged_attention(query, cache, 0, batch, Rule(scale=SCALE, first=first, **rule))
    for i, segment in enumerate(batch.segments):
        rows = slice(*batch.offsets[i : i + 2])
        keys, values = rows_of(cache, segment.table, first, segment.end)
        start = segment.start - first
        expected = causal_reference(query[rows], keys, values, start, scale=SCALE, **rule)
        if segment.length:
            close(out[rows], expected)


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("tables", TABLES)
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS.keys())
def test_ragged_attention(causal_reference, step, tables, window):
    torch.manual_seed(0)
    check(causal_reference, filled(), batch_of(step, tables_of(tables)), window=window)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("tables", TABLES)
def test_rows_before_the_first_are_hidden(causal_reference, tables, window):
    torch.manual_seed(7)
    for step in ("decode many", "verify one", "verify ragged", "later long piece"):
        batch = batch_of(STEPS[step], tables_of(tables))
        for by_token in (False, True):
            check(causal_reference, filled(by_token=by_token), batch, window=window, first=1)


@pytest.mark.parametrize("shape", [(4, DIM, DIM), (1, DIM, DIM), (2, DIM, 5)])
@pytest.mark.parametrize("options", [{}, {"sinks": True}, {"softcap": 1.5}])
@pytest.mark.parametrize("step", ["verify ragged", "mixed long", "decode many"])
def test_shapes_sinks_and_softcap(causal_reference, shape, options, step):
    torch.manual_seed(1)
    options = dict(options, sinks=torch.randn(HEADS)) if "sinks" in options else options
    for tables in TABLES:
        batch = batch_of(STEPS[step], tables_of(tables))
        check(causal_reference, filled(shape), batch, window=5, **options)


def test_rows_after_the_end_have_no_influence():
    torch.manual_seed(2)
    cache, batch = filled(), batch_of(STEPS["verify many"], tables_of())
    query = torch.randn(12, HEADS, DIM)
    before = ragged_attention(query, cache, 0, batch, Rule(scale=SCALE))
    for segment in batch.segments:
        cache.heads(0, segment.table, segment.end, 32)[0].add_(7.0)
    assert torch.equal(ragged_attention(query, cache, 0, batch, Rule(scale=SCALE)), before)
    cache.heads(0, batch.segments[1].table, 11, 12)[0].add_(7.0)  # its last visible key
    changed = ragged_attention(query, cache, 0, batch, Rule(scale=SCALE)) != before
    assert changed.any(-1).any(-1).nonzero().flatten().tolist() == [7]


@pytest.mark.parametrize(
    ("step", "tables", "keys"),
    [("verify many", "equal distances", "a view"), ("with a gap", "equal distances", "a view"),
     ("verify many", "multiples of a distance", "a view"),
     ("verify many", "unequal distances", "gathered"), ("verify many", "scattered", "gathered"),
     ("one request twice", "equal distances", "gathered"),
     ("mixed long", "equal distances", None), ("very uneven", "equal distances", None)],
)  # fmt: skip
def test_padding_is_used_where_it_pays(step, tables, keys, monkeypatch):
    monkeypatch.setattr(padding, "_WASTE_BYTES", 0)
    batch = batch_of(STEPS[step], tables_of(tables))
    plan = plan_padding(batch, None, 0, torch.zeros(1, HEADS, 1, DIM), filled(), 0)
    found = plan and ("a view" if plan.rows_RS is None else "gathered")
    assert found == keys


@pytest.mark.parametrize(("wasted", "used"), [(16, False), (17, True)])
def test_a_few_padded_keys_cost_less_than_a_call_each(monkeypatch, wasted, used):
    """Requests of 26, 2 and 1 keys are padded to 26: 49 in vain, 16.3 of each."""
    key = 2 * 2 * DIM * 4
    monkeypatch.setattr(padding, "_WASTE_BYTES", wasted * key)
    batch = batch_of(STEPS["very uneven"], tables_of())
    plan = plan_padding(batch, None, 0, torch.zeros(1, HEADS, 1, DIM), filled(), 0)
    assert (plan is not None) == used


@pytest.mark.parametrize("tables", ["equal distances", "scattered"])
@pytest.mark.parametrize("step", ["beside a prompt", "beside a short prompt"])
def test_who_decodes_beside_a_prompt_is_padded_without_it(step, tables):
    batch = batch_of(STEPS[step], tables_of(tables))
    plan = plan_padding(batch, None, 0, torch.zeros(1, HEADS, 1, DIM), filled(), 0)
    assert (plan.count, plan.spans) == (3, 3)


def test_a_view_never_leaves_the_pool():
    """The last request is the shortest, and its pages are the pool's last."""
    tables = [BlockTable(range(4), PAGE), BlockTable(range(4, 6), PAGE)]
    batch = batch_of([(0, 9, 1), (1, 7, 1)], tables)
    gathered = []
    for pages in (6, 7):
        cache = PagedCache([CacheShape(2, DIM, DIM)], pages, PAGE)
        plan = plan_padding(batch, None, 0, torch.zeros(1, HEADS, 1, DIM), cache, 0)
        gathered.append(plan.rows_RS is not None)
    assert gathered == [True, False]


def test_large_spans_are_not_gathered(monkeypatch, causal_reference):
    torch.manual_seed(8)
    batch, cache = batch_of(STEPS["verify many"], tables_of("scattered")), filled()
    monkeypatch.setattr(padding, "_GATHER_BYTES", 100)
    assert plan_padding(batch, None, 0, torch.zeros(1, HEADS, 1, DIM), cache, 0) is None
    check(causal_reference, cache, batch)


@pytest.mark.parametrize("window", [None, 3])
def test_fresh_attention_equals_a_cache_that_starts_empty(window):
    torch.manual_seed(3)
    batch = batch_of([(0, 0, 7), (1, 0, 1), (2, 0, 18)], tables_of("scattered"))
    query, keys = torch.randn(26, HEADS, DIM), torch.randn(26, 2, DIM)
    values = torch.randn(26, 2, DIM)
    cache = PagedCache([CacheShape(2, DIM, DIM)], PAGES, PAGE)
    cache.write(0, batch.rows_T, keys, values)
    expected = ragged_attention(query, cache, 0, batch, Rule(scale=SCALE, window=window))
    by_head = [rows.transpose(0, 1).unsqueeze(0) for rows in (query, keys, values)]
    out = fresh_attention(*by_head, batch, Rule(SCALE, window))[0].transpose(0, 1)
    close(out, expected.double())


@pytest.mark.parametrize("window", [None, 1, 5, 100])
@pytest.mark.parametrize("shape", [(2, DIM, DIM), (4, DIM, DIM)])
@pytest.mark.parametrize(
    ("requests", "lengths"),
    [((2,), (9,)), ((0,), (0,)), ((3, 0, 1), (4, 0, 30)), ((3, 0, 1), (9, 7, 6))],
)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tables", ["equal distances", "scattered"])
def test_block_attention(reference, requests, lengths, shape, window, causal, tables):
    torch.manual_seed(4)
    cache, rows = filled(shape), 4
    own = [tables_of(tables)[i] for i in requests]
    query = torch.randn(len(own), rows, HEADS, DIM)
    keys, values = torch.randn(2, len(own), rows, shape[0], DIM)
    limits = {"window": window, "causal": causal}
    out = block_attention(
        query, keys, values, cache, 0, BlockContext(own, lengths), scale=SCALE, **limits
    )
    for r, (table, length) in enumerate(zip(own, lengths, strict=True)):
        context_keys, context_values = rows_of(cache, table, 0, length)
        visible = [
            [window is None or j >= length - window for j in range(length)]
            + [not causal or other <= k for other in range(rows)]
            for k in range(rows)
        ]
        all_keys = torch.cat((context_keys, keys[r]))
        all_values = torch.cat((context_values, values[r]))
        close(out[r], reference(query[r], all_keys, all_values, visible, scale=SCALE))


def test_block_attention_leaves_the_cache_alone():
    torch.manual_seed(5)
    cache = filled()
    before = [rows.clone() for rows in cache.pool(0)]
    block = torch.randn(1, 3, 2, DIM)
    query = torch.randn(1, 3, HEADS, DIM)
    block_attention(query, block, block, cache, 0, BlockContext(tables_of()[1:2], [5]), scale=SCALE)
    assert all(torch.equal(a, b) for a, b in zip(before, cache.pool(0), strict=True))


def test_bfloat16_is_close(causal_reference):
    torch.manual_seed(6)
    cache, batch = filled(dtype=torch.bfloat16), batch_of(STEPS["verify ragged"], tables_of())
    query = torch.randn(8, HEADS, DIM, dtype=torch.bfloat16)
    out = ragged_attention(query, cache, 0, batch, Rule(scale=SCALE))
    assert out.dtype == torch.bfloat16
    keys, values = rows_of(cache, batch.segments[0].table, 0, 10)
    close(out[:4], causal_reference(query[:4], keys, values, 6, scale=SCALE), 2e-2)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("lengths", "together"), [((9, 7, 6), True), ((9, 0, 6), False), ((30, 1, 2), False)]
)
def test_blocks_run_together_where_that_pays(lengths, together, window, causal, monkeypatch):
    torch.manual_seed(9)
    cache, tables = filled(), tables_of("scattered")[:3]
    block, query = torch.randn(3, 4, 2, DIM), torch.randn(3, 4, HEADS, DIM)
    outs = []
    for gathers in (False, True):
        monkeypatch.setattr(blocks, "_gathers", lambda _device, answer=gathers: answer)
        context = BlockContext(tables, lengths)
        limits = {"scale": SCALE, "window": window, "causal": causal}
        outs.append(block_attention(query, block, block, cache, 0, context, **limits))
    if window is None:
        assert [plan is not None for plan in context.memo.values()] == [together]
    close(outs[0], outs[1].double())
