"""Every implementation of paged attention equals the plain one, on random tables."""

import random
from dataclasses import replace

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from dspark.attention import choice, varlen
from dspark.attention.backends import Rule, cached_attention
from dspark.attention.choice import PLAIN, choose_attention
from dspark.attention.flex import _block_mask, flex_attention
from dspark.attention.paged_cache import BlockTable, CacheShape, PagedCache
from dspark.attention.ragged_batch import RaggedBatch, with_trees
from dspark.attention.varlen import VarlenAttention
from dspark.errors import UsageError

PAGE, PAGES, DIM, HEADS = 16, 24, 16, 4
SHAPE = CacheShape(2, DIM, DIM)
CPU = torch.device("cpu")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
RULES = {
    "plain": {},
    "window": {"window": 20},
    "window of one": {"window": 1},
    "soft-cap": {"softcap": 1.5},
    "sinks": {"sinks": True},
    "first": {"first": 1},
    "all": {"window": 9, "softcap": 2.0, "sinks": True, "first": 1},
}


def random_batch(seed, device="cpu"):
    """Two to four requests of scattered pages that share their first, with rows behind them."""
    source = random.Random(seed)
    pages = source.sample(range(PAGES), PAGES)
    shared = [pages.pop() for _ in range(source.randrange(3))]
    parts = []
    for i in range(source.randrange(2, 5)):
        table = BlockTable([*shared, *(pages.pop() for _ in range(source.randrange(1, 5)))])
        length = source.choice((1, 1, 4, 23)) if i else source.choice((1, 7, 40))
        length = min(length, table.capacity - 1)
        start = source.randrange(1, table.capacity - length + 1)
        parts.append((table, start, range(length)))
    return RaggedBatch.build(parts, device)


def random_trees(seed, *, cached=False):
    """A random batch, the last rows of whose requests are trees; some have none.

    With `cached` all rows are nodes, and others were there before.
    """
    source, batch = random.Random(seed), random_batch(seed)
    trees = []
    for segment in batch.segments:
        nodes = source.randrange(segment.length)
        if cached:
            nodes = segment.length + source.randrange(min(segment.start, 9))
        trees.append(tuple(source.randrange(-1, node) for node in range(nodes)))
    return with_trees(batch, trees)


def filled(shape=SHAPE, dtype=torch.float32, device="cpu", *, by_token=True):
    cache = PagedCache([shape], PAGES, PAGE, dtype, device, by_token=by_token)
    keys = torch.randn(cache.rows, shape.kv_heads, shape.key_dim, dtype=dtype, device=device)
    values = torch.randn(cache.rows, shape.kv_heads, shape.value_dim, dtype=dtype, device=device)
    cache.write(0, torch.arange(cache.rows, device=device), keys, values)
    return cache


def compare(attend, seed, options, shape=SHAPE, dtype=torch.float32, device="cpu", batch=None):
    """The largest difference to plain attention."""
    torch.manual_seed(seed)
    cache, batch = filled(shape, dtype, device), batch or random_batch(seed, device)
    options = dict(options, sinks=torch.randn(HEADS).to(device)) if "sinks" in options else options
    query = torch.randn(1, HEADS, len(batch.rows_T), shape.key_dim, dtype=dtype, device=device)
    rule = Rule(0.3, **options)
    with torch.inference_mode():
        out = attend(query, cache, 0, batch, rule)
        expected = cached_attention(query, cache, 0, batch, rule)
    assert out.shape == expected.shape
    return float((out - expected).abs().max())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", [SHAPE, CacheShape(4, DIM, 8)], ids=["shared heads", "own"])
def test_flex_equals_plain(rule, shape):
    assert max(compare(flex_attention, seed, RULES[rule], shape) for seed in range(5)) < 2e-6


@pytest.mark.parametrize("rule", RULES)
def test_flex_knows_trees(rule, monkeypatch):
    monkeypatch.setattr("dspark.attention.flex._QUERY_BLOCK", 8)
    for seed in range(5):
        batch = random_trees(seed)
        assert compare(flex_attention, seed, RULES[rule], batch=batch) < 2e-6
        # Torch's kernel with a block table knows none, and hands them on.
        assert compare(VarlenAttention(), seed, RULES[rule], batch=batch) == 0
        if "window" not in RULES[rule]:
            batch = random_trees(seed, cached=True)
            assert compare(flex_attention, seed, RULES[rule], batch=batch) < 2e-6


def test_control_flex_on_trees_as_if_they_were_lines():
    def lines(query, cache, layer, batch, rule):
        return flex_attention(query, cache, layer, replace(batch, trees=None, memo={}), rule)

    assert max(compare(lines, seed, {}, batch=random_trees(seed)) for seed in range(5)) > 1e-2


def test_flex_takes_many_rows(monkeypatch):
    monkeypatch.setattr("dspark.attention.flex._QUERY_BLOCK", 8)
    assert max(compare(flex_attention, seed, {"window": 20}) for seed in range(5)) < 2e-6


@pytest.mark.parametrize("rule", ["plain", "window", "window of one", "first"])
def test_the_pages_that_flex_reads_hold_what_is_seen(rule, monkeypatch):
    """A CPU looks at every pair, a kernel at the pages that are listed alone."""
    monkeypatch.setattr("dspark.attention.flex._QUERY_BLOCK", 8)
    for seed in range(5):
        cache, batch = filled(), random_batch(seed)
        mask, rows = _block_mask(batch, cache, Rule(0.3, **RULES[rule])), len(batch.rows_T)
        needed = create_block_mask(
            mask.mask_mod, None, None, rows, cache.rows, device="cpu", BLOCK_SIZE=(8, PAGE)
        )
        least = needed.to_dense().bool()[0, 0]
        read, counts = torch.zeros_like(least), mask.kv_num_blocks.flatten().tolist()
        for listed, indices, count in zip(read, mask.kv_indices[0, 0], counts, strict=True):
            listed[indices[:count]] = True
        assert (read | least).equal(read)
        assert read.sum() < read.numel()


def test_control_a_wrong_window_is_seen():
    def wrong(query, cache, layer, batch, rule):
        return flex_attention(query, cache, layer, batch, rule._replace(window=21))

    assert max(compare(wrong, seed, {"window": 20}) for seed in range(5)) > 1e-2


def slow_kernel(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *,
    scale, window_size, enable_gqa, seqused_k, block_table, num_splits=None,
):  # fmt: skip
    """What torch documents of the kernel, request by request and row by row."""
    assert enable_gqa == (query.shape[1] != key.shape[2])
    assert cu_seq_k is None
    assert block_table.dtype == seqused_k.dtype == cu_seq_q.dtype == torch.int32
    left, right = window_size
    assert right == 0
    out = torch.empty(query.shape[0], query.shape[1], value.shape[3])
    lengths = cu_seq_q.diff().tolist()
    assert (max(lengths), int(seqused_k.max())) == (max_q, max_k)
    for r, length in enumerate(lengths):
        used = int(seqused_k[r])
        keys, values = (pool[block_table[r].long()].flatten(0, 1)[:used] for pool in (key, value))
        for i in range(length):
            row = int(cu_seq_q[r]) + i
            own = used - length + i  # rows stand at the end of their keys
            seen = slice(0 if left < 0 else max(0, own - left), own + 1)
            for a in range(query.shape[1]):
                g = a * key.shape[2] // query.shape[1]
                weights = (keys[seen, g] @ query[row, a] * scale).softmax(0)
                out[row, a] = weights @ values[seen, g]
    return out


@pytest.mark.parametrize("rule", RULES)
def test_varlen_asks_for_what_plain_computes(rule, monkeypatch):
    monkeypatch.setattr(varlen, "varlen_attn", slow_kernel)
    assert max(compare(VarlenAttention(), seed, RULES[rule]) for seed in range(3)) < 2e-6


@pytest.mark.parametrize("num_splits", [None, 1])
def test_varlen_splits_keys_as_told(num_splits, monkeypatch):
    seen = []

    def kernel(*tensors, **options):
        seen.append(options.get("num_splits"))
        return slow_kernel(*tensors, **options)

    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    compare(VarlenAttention(num_splits), 0, {})
    assert seen == [num_splits]


def choose(name, shapes=(SHAPE,), device=CPU, **options):
    return choose_attention(name, shapes, dtype=torch.float32, device=device, **options)


def test_a_cpu_attends_plainly_unless_told_otherwise():
    assert choose("auto") is choose("plain") is PLAIN
    assert (choose("flex").name, choose("flex").attend) == ("flex", flex_attention)


def test_what_cannot_run_is_refused_in_one_sentence(monkeypatch):
    with pytest.raises(UsageError, match="'fast', but must be one of auto, plain, flex, varlen"):
        choose("fast")
    with pytest.raises(UsageError, match=r"'varlen' cannot run on cpu: .* a CUDA device; use"):
        choose("varlen")

    def broken(*_):
        raise RuntimeError("no kernel for this page size.\nDetails follow.")

    monkeypatch.setattr(choice, "flex_attention", broken)
    with pytest.raises(UsageError, match=r"\(no kernel for this page size\); use 'auto'"):
        choose("flex")
    monkeypatch.setattr(choice, "flex_attention", lambda query, *_: torch.zeros_like(query))
    with pytest.raises(UsageError, match="differs from plain attention by 1;"):
        choose("flex")
    monkeypatch.setattr(choice, "flex_attention", lambda query, *_: query * torch.nan)
    with pytest.raises(UsageError, match="differs from plain attention by nan"):
        choose("flex")


def test_auto_takes_the_first_that_runs(monkeypatch):
    """As if this were a GPU whose kernels fail one after the other."""
    failing: set[str] = set()
    monkeypatch.setattr(
        choice, "_reason_against", lambda backend, *_: "bad" if backend.name in failing else None
    )
    for name in ("varlen", "flex", "plain"):
        assert choose("auto", device=torch.device("cuda")).name == name
        failing.add(name)


def test_an_old_kernel_is_known_by_its_signature(monkeypatch):
    monkeypatch.setattr(varlen, "varlen_attn", lambda query, scale, window_size, enable_gqa: query)
    assert "has no block_table, seqused_k" in varlen.missing_from_torch(None)
    monkeypatch.setattr(varlen, "varlen_attn", lambda *, scale, window_size, enable_gqa, seqused_k,
                        block_table: None)  # fmt: skip
    assert varlen.missing_from_torch(None) is None
    assert "has no num_splits" in varlen.missing_from_torch(1)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["varlen", "flex"])
def test_gpu_kernels_equal_plain(name, rule):
    shape, device = CacheShape(2, 64, 64), torch.device("cuda")
    try:
        backend = choose_attention(name, [shape], dtype=torch.bfloat16, device=device)
    except UsageError as error:
        pytest.skip(str(error))
    for seed in range(4):
        options = RULES[rule]
        assert compare(backend.attend, seed, options, shape, torch.bfloat16, "cuda") < 3e-2


@pytest.mark.gpu
@needs_cuda
def test_gpu_plain_equals_cpu():
    for seed in range(4):
        torch.manual_seed(seed)
        cache, query = filled(), torch.randn(1, HEADS, 200, DIM)
        for options in ({}, {"window": 20}, {"softcap": 1.5}, {"first": 1}):
            outs = []
            for device in ("cpu", "cuda"):
                own = PagedCache([SHAPE], PAGES, PAGE, torch.float32, device)
                rows = torch.arange(own.rows)
                own.write(0, rows.to(device), *(x.to(device) for x in cache.read(0, rows)))
                batch = random_batch(seed, device)
                rows_1ATD = query[:, :, : len(batch.rows_T)].to(device)
                outs.append(cached_attention(rows_1ATD, own, 0, batch, Rule(0.3, **options)).cpu())
            assert (outs[0] - outs[1]).abs().max() < 1e-4


@pytest.mark.gpu
@needs_cuda
def test_one_split_makes_a_request_independent_of_its_batch():
    shape, device = CacheShape(2, 64, 64), torch.device("cuda")
    try:
        backend = choose_attention(
            "varlen", [shape], dtype=torch.bfloat16, device=device, batch_invariant=True
        )
    except UsageError as error:
        pytest.skip(str(error))
    torch.manual_seed(0)
    cache, batch = filled(shape, torch.bfloat16, "cuda"), random_batch(1, "cuda")
    query = torch.randn(1, HEADS, len(batch.rows_T), 64, dtype=torch.bfloat16, device=device)
    together = backend.attend(query, cache, 0, batch, Rule(0.3))
    for i, segment in enumerate(batch.segments):
        rows = slice(*batch.offsets[i : i + 2])
        alone = RaggedBatch.build([(segment.table, segment.start, range(segment.length))], device)
        out = backend.attend(query[:, :, rows], cache, 0, alone, Rule(0.3))
        assert torch.equal(out, together[:, :, rows])
