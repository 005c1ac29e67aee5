import torch

from dspark.data.samples import Sample, SampleBatch
from dspark.training.losses.blocks import AnchorBlocks, sample_anchors


def generators(count, seed=0):
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


def packed(*samples):
    """Samples of (ids, mask)."""
    return SampleBatch.of([Sample(tuple(ids), tuple(map(bool, mask))) for ids, mask in samples])


def random_batch(lengths=(20, 7, 13), share=0.8, seed=1):
    source = torch.Generator().manual_seed(seed)
    samples = []
    for length in lengths:
        ids = torch.randint(50, (length,), generator=source).tolist()
        samples.append((ids, (torch.rand(length, generator=source) < share).tolist()))
    return packed(*samples)


def test_the_documented_example():
    batch = packed((range(100, 112), [0] * 4 + [1] * 5 + [0] * 3))
    anchors = sample_anchors(batch, 512, generators(1))
    assert anchors.tolist() == [4, 5, 6, 7]
    blocks = AnchorBlocks.build(batch, anchors, 3)
    assert blocks.supervised_MK.int().tolist() == [[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 0, 0]]
    assert blocks.tokens_M.tolist() == [104, 105, 106, 107]
    assert blocks.positions_MK[1].tolist() == [5, 6, 7]
    assert blocks.labels_MK[1].tolist() == [106, 107, 108]
    assert blocks.previous_MK[1].tolist() == [105, 106, 107]


def test_blocks_equal_a_loop_over_cells():
    batch = random_batch()
    anchors = sample_anchors(batch, 9, generators(3))
    blocks = AnchorBlocks.build(batch, anchors, 4)
    firsts = [0, 20, 27]
    seen = []
    for m, row in enumerate(anchors.tolist()):
        own = max(i for i in range(3) if firsts[i] <= row)
        first, end, alive = firsts[own], firsts[own] + batch.lengths[own], True
        assert blocks.first_M[m] == first
        for k in range(4):
            label = row + k + 1
            alive = alive and label < end and bool(batch.loss_mask_T[label])
            assert bool(blocks.supervised_MK[m, k]) == alive
            assert blocks.positions_MK[m, k] == row - first + k
            if alive:
                assert blocks.labels_MK[m, k] == batch.input_ids_T[label]
                assert blocks.previous_MK[m, k] == batch.input_ids_T[label - 1]
                seen.append((row + k, m * 4 + k))
    rows = blocks.rows
    assert list(zip(rows.teacher_U[rows.owner_N].tolist(), rows.slots_N.tolist(), strict=True)) == (
        sorted(seen)
    )
    assert rows.teacher_U.tolist() == sorted({row for row, _ in seen})
    assert rows.counts == tuple(rows.owner_N.bincount().tolist())
    assert len(rows.counts) < rows.slots_N.numel()  # neighbouring anchors look at the same row


def test_a_hole_in_the_mask_ends_supervision_for_good():
    batch = packed((range(10), [1] * 5 + [0] + [1] * 4))
    blocks = AnchorBlocks.build(batch, torch.tensor([3]), 4)
    assert blocks.supervised_MK.tolist() == [[True, False, False, False]]


def test_only_anchors_that_exist_are_made():
    none, short, long = [0] * 40, [0] * 10 + [1] * 4 + [0] * 26, [0] * 5 + [1] * 35
    batch = packed(*((range(40), mask) for mask in (short, long, none)))
    anchors = sample_anchors(batch, 16, generators(3))
    assert anchors[:3].tolist() == [10, 11, 12]
    rest = anchors[3:] - 40
    assert rest.numel() == 16
    assert (rest[1:] > rest[:-1]).all()
    assert rest[0] >= 5
    assert rest[-1] <= 38
    assert sample_anchors(packed((range(40), none)), 16, generators(1)).numel() == 0


def test_a_samples_anchors_do_not_depend_on_its_neighbours():
    batch = random_batch()
    whole = sample_anchors(batch, 4, generators(3))
    first = 0
    for i, length in enumerate(batch.lengths):
        rows = slice(first, first + length)
        alone = packed((batch.input_ids_T[rows].tolist(), batch.loss_mask_T[rows].tolist()))
        own = whole[(whole >= first) & (whole < first + length)] - first
        assert torch.equal(own, sample_anchors(alone, 4, generators(1, seed=i)))
        first += length


def test_sampling_is_uniform_and_uses_only_its_generator():
    batch = packed((range(11), [1] * 11))
    state = torch.get_rng_state()
    source, counts = generators(1, 5), torch.zeros(11)
    for _ in range(2000):
        counts[sample_anchors(batch, 3, source)] += 1
    assert torch.equal(torch.get_rng_state(), state)
    assert counts[10] == 0
    expected = 2000 * 3 / 10
    chi_squared = ((counts[:10] - expected) ** 2 / expected).sum()
    assert chi_squared < 27.9  # 9 degrees of freedom, p = .001
    again = sample_anchors(batch, 3, generators(1, 6))
    assert torch.equal(again, sample_anchors(batch, 3, generators(1, 6)))
