import pytest
import torch

from dspark.attention.paged_cache import BlockTable
from dspark.attention.ragged_batch import RaggedBatch, Segment


def test_build_flattens_requests_in_order():
    first, second, third = BlockTable((7,), 4), BlockTable((2, 0, 1), 4), BlockTable((3, 5), 4)
    batch = RaggedBatch.build([(first, 0, [5, 6, 7]), (second, 8, (1,)), (third, 3, [8, 9])])
    assert batch.input_ids_T.tolist() == [5, 6, 7, 1, 8, 9]
    assert batch.positions_T.tolist() == [0, 1, 2, 8, 3, 4]
    assert batch.rows_T.tolist() == [28, 29, 30, 4, 15, 20]
    assert batch.segments == (Segment(first, 0, 3), Segment(second, 8, 1), Segment(third, 3, 2))
    assert batch.offsets == (0, 3, 4, 6)
    assert batch.runs == ((28, 0, 3), (4, 3, 1), (15, 4, 1), (20, 5, 1))
    assert batch.input_ids_T.dtype == torch.int64
    assert [segment.end for segment in batch.segments] == [3, 9, 5]
    assert batch.longest == 9
    assert batch.shifted(1).rows_T.tolist() == [29, 30, 31, 5, 20, 21]


def test_build_without_requests_is_empty():
    batch = RaggedBatch.build([])
    assert batch.input_ids_T.shape == (0,)
    assert (batch.segments, batch.runs, batch.offsets, batch.longest) == ((), (), (0,), 0)


def test_fresh_sequences_fill_a_pool_of_their_own():
    batch = RaggedBatch.fresh([[1] * 17, [2], [3, 4]])
    assert [list(segment.table.pages) for segment in batch.segments] == [[0, 1], [2], [3]]
    assert batch.positions_T.tolist() == [*range(17), 0, 0, 1]
    assert batch.rows_T.tolist() == [*range(17), 32, 48, 49]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_hand_over_beside_other_work():
    tables = [BlockTable((2, 5)), BlockTable((0,))]
    parts = [(tables[0], 14, [4, 5, 6]), (tables[1], 0, [7])]
    busy = torch.randn(4096, 4096, device="cuda")
    for _ in range(20):
        busy = busy @ busy.T / 4096
    ours, expected = RaggedBatch.build(parts, "cuda"), RaggedBatch.build(parts)
    for name in ("input_ids_T", "positions_T", "rows_T"):
        assert torch.equal(getattr(ours, name).cpu(), getattr(expected, name))
