import pytest
import torch

from dspark.attention.backends import Rule, block_attention, fresh_attention, ragged_attention
from dspark.attention.layout import RaggedBatch
from dspark.attention.padding import plan_padding
from dspark.attention.slots import CacheShape, SlotCache

HEADS, DIM, SCALE = 4, 8, 0.3
STEPS = {
    "decode one": [(1, 6, 1)],
    "decode many": [(0, 6, 1), (1, 9, 1), (2, 7, 1)],
    "verify one": [(0, 5, 4)],
    "verify many": [(0, 6, 4), (1, 8, 4), (2, 7, 4)],
    "verify ragged": [(2, 6, 4), (0, 8, 1), (1, 7, 3)],
    "slots with a gap": [(3, 6, 2), (0, 8, 2), (1, 7, 2)],
    "prefill": [(0, 0, 7)],
    "prefill long": [(0, 0, 20), (1, 0, 18)],
    "later piece": [(0, 3, 5)],
    "later long piece": [(0, 3, 19)],
    "mixed": [(0, 0, 6), (2, 5, 1), (1, 9, 4)],
    "mixed long": [(0, 0, 20), (2, 5, 1), (1, 4, 18)],
    "very uneven": [(0, 25, 1), (1, 1, 1), (2, 0, 1)],
    "one slot twice": [(0, 2, 2), (0, 4, 2), (1, 5, 2)],
}


def filled(shape=(2, DIM, DIM), slots=4, capacity=32, dtype=torch.float32):
    cache = SlotCache([CacheShape(*shape)], slots, capacity, dtype, "cpu")
    for slot in range(slots):
        keys = torch.randn(capacity, shape[0], shape[1], dtype=dtype)
        values = torch.randn(capacity, shape[0], shape[2], dtype=dtype)
        where = torch.full((capacity,), slot), torch.arange(capacity)
        cache.write(0, *where, keys, values)
    return cache


def batch_of(step):
    return RaggedBatch.build([(slot, start, range(length)) for slot, start, length in step])


def close(out, expected, limit=2e-6):
    assert out.shape == expected.shape
    assert (out.double() - expected).abs().max() <= limit


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS.keys())
def test_ragged_attention(causal_reference, step, window):
    torch.manual_seed(0)
    cache, batch = filled(), batch_of(step)
    query = torch.randn(len(batch.input_ids_T), HEADS, DIM)
    out = ragged_attention(query, cache, 0, batch, scale=SCALE, window=window)
    for i, segment in enumerate(batch.segments):
        rows = slice(*batch.offsets[i : i + 2])
        keys, values = cache.view(0, segment.slot, segment.end)
        expected = causal_reference(
            query[rows], keys, values, segment.start, scale=SCALE, window=window
        )
        close(out[rows], expected)


@pytest.mark.parametrize("shape", [(4, DIM, DIM), (1, DIM, DIM), (2, DIM, 5)])
@pytest.mark.parametrize("options", [{}, {"sinks": True}, {"softcap": 1.5}])
@pytest.mark.parametrize("step", ["verify ragged", "mixed long", "decode many"])
def test_shapes_sinks_and_softcap(causal_reference, shape, options, step):
    torch.manual_seed(1)
    cache, batch = filled(shape), batch_of(STEPS[step])
    options = dict(options, sinks=torch.randn(HEADS)) if "sinks" in options else options
    query = torch.randn(len(batch.input_ids_T), HEADS, DIM)
    out = ragged_attention(query, cache, 0, batch, scale=SCALE, window=5, **options)
    for i, segment in enumerate(batch.segments):
        rows = slice(*batch.offsets[i : i + 2])
        keys, values = cache.view(0, segment.slot, segment.end)
        expected = causal_reference(
            query[rows], keys, values, segment.start, scale=SCALE, window=5, **options
        )
        close(out[rows], expected)


def test_rows_after_the_end_have_no_influence():
    torch.manual_seed(2)
    cache, batch = filled(), batch_of(STEPS["verify many"])
    query = torch.randn(12, HEADS, DIM)
    before = ragged_attention(query, cache, 0, batch, scale=SCALE)
    for segment in batch.segments:
        cache.view(0, segment.slot, 32)[0][segment.end :] += 7.0
    assert torch.equal(ragged_attention(query, cache, 0, batch, scale=SCALE), before)
    cache.view(0, 1, 32)[0][11] += 7.0  # the last visible key of slot 1
    changed = ragged_attention(query, cache, 0, batch, scale=SCALE) != before
    assert changed.any(-1).any(-1).nonzero().flatten().tolist() == [7]


@pytest.mark.parametrize(
    ("step", "padded"),
    [("verify many", True), ("slots with a gap", True), ("mixed long", False),
     ("very uneven", False), ("one slot twice", False)],
)  # fmt: skip
def test_padding_is_used_where_it_pays(step, padded):
    plan = plan_padding(batch_of(STEPS[step]), None, torch.zeros(1), 2)
    assert (plan is not None) == padded


@pytest.mark.parametrize("window", [None, 3])
def test_fresh_attention_equals_a_cache_that_starts_empty(window):
    torch.manual_seed(3)
    batch = batch_of([(0, 0, 7), (1, 0, 1), (2, 0, 18)])
    query, keys = torch.randn(26, HEADS, DIM), torch.randn(26, 2, DIM)
    values = torch.randn(26, 2, DIM)
    cache = SlotCache([CacheShape(2, DIM, DIM)], 3, 18, torch.float32, "cpu")
    cache.write(0, batch.slots_T, batch.positions_T, keys, values)
    expected = ragged_attention(query, cache, 0, batch, scale=SCALE, window=window)
    by_head = [rows.transpose(0, 1).unsqueeze(0) for rows in (query, keys, values)]
    out = fresh_attention(*by_head, batch, Rule(SCALE, window))[0].transpose(0, 1)
    close(out, expected.double())


@pytest.mark.parametrize("window", [None, 1, 5, 100])
@pytest.mark.parametrize("shape", [(2, DIM, DIM), (4, DIM, DIM)])
@pytest.mark.parametrize(
    ("slots", "lengths"), [((2,), (9,)), ((0,), (0,)), ((3, 0, 1), (4, 0, 30))]
)
@pytest.mark.parametrize("causal", [False, True])
def test_block_attention(reference, slots, lengths, shape, window, causal):
    torch.manual_seed(4)
    cache, rows = filled(shape), 4
    query = torch.randn(len(slots), rows, HEADS, DIM)
    keys, values = torch.randn(2, len(slots), rows, shape[0], DIM)
    limits = {"window": window, "causal": causal}
    out = block_attention(query, keys, values, cache, 0, slots, lengths, scale=SCALE, **limits)
    for r, (slot, length) in enumerate(zip(slots, lengths, strict=True)):
        context_keys, context_values = cache.view(0, slot, length)
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
    before = [rows.clone() for rows in cache.view(0, 1, 32)]
    block = torch.randn(1, 3, 2, DIM)
    query = torch.randn(1, 3, HEADS, DIM)
    block_attention(query, block, block, cache, 0, [1], [5], scale=SCALE)
    assert all(torch.equal(a, b) for a, b in zip(before, cache.view(0, 1, 32), strict=True))


def test_bfloat16_is_close(causal_reference):
    torch.manual_seed(6)
    cache, batch = filled(dtype=torch.bfloat16), batch_of(STEPS["verify ragged"])
    query = torch.randn(8, HEADS, DIM, dtype=torch.bfloat16)
    out = ragged_attention(query, cache, 0, batch, scale=SCALE)
    assert out.dtype == torch.bfloat16
    keys, values = cache.view(0, 2, 10)
    close(out[:4], causal_reference(query[:4], keys, values, 6, scale=SCALE), 2e-2)
