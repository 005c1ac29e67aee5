import torch

from dspark.attention.layout import RaggedBatch, Segment


def test_build_flattens_requests_in_order():
    batch = RaggedBatch.build([(2, 0, [5, 6, 7]), (0, 9, (1,)), (1, 4, [8, 9])])
    assert batch.input_ids_T.tolist() == [5, 6, 7, 1, 8, 9]
    assert batch.positions_T.tolist() == [0, 1, 2, 9, 4, 5]
    assert batch.slots_T.tolist() == [2, 2, 2, 0, 1, 1]
    assert batch.segments == (Segment(2, 0, 3), Segment(0, 9, 1), Segment(1, 4, 2))
    assert batch.offsets == (0, 3, 4, 6)
    assert batch.input_ids_T.dtype == torch.int64
    assert [segment.end for segment in batch.segments] == [3, 10, 6]


def test_build_without_requests_is_empty():
    batch = RaggedBatch.build([])
    assert batch.input_ids_T.shape == (0,)
    assert batch.segments == ()
    assert batch.offsets == (0,)
