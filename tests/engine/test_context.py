"""Rows of the draft context wait until they are needed, and arrive as if they had not waited."""

from __future__ import annotations

import pytest
import torch

from dspark.attention.paged_cache import BlockTable, PagedCache
from dspark.attention.ragged_batch import RaggedBatch
from dspark.engine.speculation import draft_context as context_module
from dspark.engine.speculation.draft_context import DraftContext

# The pages of two requests, four tokens each.
TABLES = {2: BlockTable((2, 5, 0), 4), 0: BlockTable((3, 4, 1), 4)}


def rows(generator, parts, width):
    """What the target has read, of which one row less than that stays of every request."""
    batch = RaggedBatch.build([(TABLES[name], start, [0] * n) for name, start, n in parts])
    lengths = [n - 1 for _, _, n in parts]
    features = torch.randn(len(batch.rows_T), width, generator=generator)
    return (
        batch,
        lengths,
        features,
        torch.randint(64, (sum(lengths),), generator=generator).tolist(),
    )


def rounds(drafter, target):
    """Three rounds of two requests."""
    width = target.parts().hidden_size * len(drafter.taps)
    generator = torch.Generator().manual_seed(0)
    return [
        rows(generator, [(2, 0, 3), (0, 0, 2)], width),
        rows(generator, [(2, 2, 2), (0, 1, 3)], width),
        rows(generator, [(2, 3, 2), (0, 3, 2)], width),
    ]


def new_context(drafter, target):
    cache = PagedCache(drafter.context_shapes, 6, 4, target.dtype, target.device)
    return DraftContext(drafter, cache)


def contents(context, name, length):
    first = int(context.drafter.reads_next_token)
    layers = range(len(context.drafter.context_shapes))
    cache = context.cache
    return [x for n in layers for x in cache.heads(n, TABLES[name], first, first + length)]


def test_rows_of_many_rounds_written_at_once_equal_rows_written_at_each(tiny, target):
    for drafter in (tiny.make_drafter(target), tiny.make_eagle3(target)):
        late, prompt = new_context(drafter, target), new_context(drafter, target)
        for part in rounds(drafter, target):
            late.hold(*part)
            prompt.hold(*part)
            prompt.flush()
        assert not any(x.any() for x in contents(late, 2, 4) if x.numel())
        late.flush()
        for name in (0, 2):
            pairs = zip(contents(late, name, 4), contents(prompt, name, 4), strict=True)
            for mine, theirs in pairs:
                assert mine.any() or not mine.numel()
                torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


def test_pages_given_back_leave_nothing_for_its_next_owner(tiny, target):
    drafter = tiny.make_drafter(target)
    late = new_context(drafter, target)
    for part in rounds(drafter, target):
        late.hold(*part)
    assert late.forget(TABLES[2]) == 0
    assert late.forget(TABLES[2]) is None
    late.flush()
    assert not any(x.any() for x in contents(late, 2, 4) if x.numel())
    assert all(x.any() for x in contents(late, 0, 4) if x.numel())


def test_rows_beyond_those_of_a_round_are_caught_up_with(tiny, target, monkeypatch):
    """What a flush takes beyond the usual, on a clock that counts rows."""
    drafter = tiny.make_drafter(target)
    context, now = new_context(drafter, target), [0.0]
    monkeypatch.setattr(context_module.time, "perf_counter", lambda: now[0])
    observe = drafter.observe

    def timed(cache, batch, *rest):
        now[0] += (5 + len(batch.input_ids_T)) / 1e3  # 5 ms, and 1 of each row
        observe(cache, batch, *rest)

    monkeypatch.setattr(drafter, "observe", timed)
    first, second, third = rounds(drafter, target)  # of 3, 3 and 2 rows
    caught_up = []
    for held in ((first, second), (third,), (first, second), ()):
        for part in held:
            context.hold(*part)
        caught_up.append(context.catch_up(usual=3))
    # At first by the share of rows; later against what a usual flush took.
    assert caught_up == pytest.approx([(5 + 6) * (1 - 3 / 6), 0.0, (5 + 6) - (5 + 2), 0.0])


def test_waiting_rows_are_bounded(tiny, target, monkeypatch):
    monkeypatch.setattr(context_module, "_MOST_ROWS", 4)
    drafter, sizes = tiny.make_drafter(target), []
    observe = drafter.observe
    drafter.observe = lambda cache, batch, *rest: (
        sizes.append(len(batch.rows_T)) or observe(cache, batch, *rest)
    )
    late = new_context(drafter, target)
    for part in rounds(drafter, target):
        late.hold(*part)
    assert sizes == [6]
    late.flush()
    assert sizes == [6, 2]
    late.flush()
    assert sizes == [6, 2]
