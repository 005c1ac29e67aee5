import pytest
import torch

from dspark.attention.layout import RaggedBatch
from dspark.attention.slots import CacheShape, SlotCache

SHAPES = (CacheShape(2, 4, 4), CacheShape(1, 6, 3))


def new_cache(slots=3, capacity=8):
    return SlotCache(SHAPES, slots, capacity, torch.float32, "cpu")


def rows(count, layer, seed=0):
    torch.manual_seed(seed)
    shape = SHAPES[layer]
    keys = torch.randn(count, shape.kv_heads, shape.key_dim)
    return keys, torch.randn(count, shape.kv_heads, shape.value_dim)


@pytest.mark.parametrize("layer", [0, 1])
def test_written_rows_are_seen_where_they_belong(layer):
    cache, (keys, values) = new_cache(), rows(4, layer)
    cache.write(layer, torch.tensor([2, 0, 2, 2]), torch.tensor([1, 0, 0, 2]), keys, values)
    seen_keys, seen_values = cache.view(layer, 2, 3)
    assert torch.equal(seen_keys, keys[[2, 0, 3]])
    assert torch.equal(seen_values, values[[2, 0, 3]])
    assert torch.equal(cache.view(layer, 0, 1)[0], keys[[1]])
    assert not cache.view(layer, 1, 8)[0].any()
    assert not cache.view(1 - layer, 2, 8)[0].any()


def test_rows_are_read_where_they_were_written():
    cache, (keys, values) = new_cache(), rows(3, 1)
    slots, positions = torch.tensor([2, 0, 2]), torch.tensor([1, 0, 4])
    cache.write(1, slots, positions, keys, values)
    back = torch.tensor([1, 2, 0])
    seen_keys, seen_values = cache.read(1, slots[back], positions[back])
    assert torch.equal(seen_keys, keys[back])
    assert torch.equal(seen_values, values[back])


def test_writing_again_replaces():
    cache, (keys, values) = new_cache(), rows(2, 0)
    where = (torch.tensor([1, 1]), torch.tensor([3, 4]))
    cache.write(0, *where, keys + 1, values + 1)
    cache.write(0, *where, keys, values)
    assert torch.equal(cache.view(0, 1, 5)[0][3:], keys)


@pytest.mark.parametrize(
    "parts",
    [
        [(1, 2, [1, 2, 3])],
        [(2, 0, [1, 2]), (0, 5, [3])],
        [(2, 0, [1, 2]), (0, 5, [3]), (1, 1, [4, 5, 6])],
        [(0, 0, range(130)), (1, 0, range(130)), (2, 3, [1])],
    ],
    ids=["one", "two", "scattered", "long"],
)
def test_batch_write_equals_write(parts):
    batch = RaggedBatch.build(parts)
    keys, values = rows(len(batch.input_ids_T), 0)
    one, other = new_cache(capacity=140), new_cache(capacity=140)
    one.write(0, batch.slots_T, batch.positions_T, keys, values)
    other.write_batch(
        0, batch, keys.transpose(0, 1).unsqueeze(0), values.transpose(0, 1).unsqueeze(0)
    )
    assert keys.any()
    for slot in range(3):
        for a, b in zip(one.view(0, slot, 140), other.view(0, slot, 140), strict=True):
            assert torch.equal(a, b)


def test_properties():
    cache = new_cache(slots=3, capacity=8)
    assert (cache.slots, cache.capacity) == (3, 8)
    assert cache.bytes == 3 * 8 * 4 * (2 * 8 + 1 * 9)
