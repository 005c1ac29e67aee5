"""Rows of the draft context wait until they are needed, and arrive as if they had not waited."""

from __future__ import annotations

import torch

from dspark.attention.slots import SlotCache
from dspark.engine import context as context_module
from dspark.engine.context import DraftContext


def rows(generator, slots, positions, width):
    features = torch.randn(len(slots), width, generator=generator)
    next_tokens = torch.randint(64, (len(slots),), generator=generator)
    return torch.tensor(slots), torch.tensor(positions), features, next_tokens


def rounds(drafter, target):
    """Three rounds of two requests, in slots 2 and 0."""
    width = target.parts().hidden_size * len(drafter.taps)
    generator = torch.Generator().manual_seed(0)
    return [
        rows(generator, [2, 2, 0], [0, 1, 0], width),
        rows(generator, [2, 0, 0], [2, 1, 2], width),
        rows(generator, [2, 0], [3, 3], width),
    ]


def new_context(drafter, target):
    cache = SlotCache(drafter.context_shapes, 3, 12, target.dtype, target.device)
    return DraftContext(drafter, cache)


def contents(context, slot, length):
    shapes = context.drafter.context_shapes
    return [x for layer in range(len(shapes)) for x in context.cache.view(layer, slot, length)]


def test_rows_of_many_rounds_written_at_once_equal_rows_written_at_each(tiny, target):
    for drafter in (tiny.make_drafter(target), tiny.make_eagle3(target)):
        late, prompt = new_context(drafter, target), new_context(drafter, target)
        for part in rounds(drafter, target):
            late.hold(*part)
            prompt.hold(*part)
            prompt.flush()
        assert not any(x.any() for x in contents(late, 2, 4) if x.numel())
        late.flush()
        for slot in (0, 2):
            pairs = zip(contents(late, slot, 4), contents(prompt, slot, 4), strict=True)
            for mine, theirs in pairs:
                torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


def test_a_slot_given_back_leaves_nothing_for_its_next_owner(tiny, target):
    drafter = tiny.make_drafter(target)
    late = new_context(drafter, target)
    for part in rounds(drafter, target):
        late.hold(*part)
    late.forget(2)
    late.flush()
    assert not any(x.any() for x in contents(late, 2, 4) if x.numel())
    assert all(x.any() for x in contents(late, 0, 4) if x.numel())


def test_waiting_rows_are_bounded(tiny, target, monkeypatch):
    monkeypatch.setattr(context_module, "_MOST_ROWS", 4)
    drafter, sizes = tiny.make_drafter(target), []
    observe = drafter.observe
    drafter.observe = lambda cache, slots_T, *rest: (
        sizes.append(len(slots_T)) or observe(cache, slots_T, *rest)
    )
    late = new_context(drafter, target)
    for part in rounds(drafter, target):
        late.hold(*part)
    assert sizes == [6]
    late.flush()
    assert sizes == [6, 2]
    late.flush()
    assert sizes == [6, 2]
