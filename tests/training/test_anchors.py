import torch

from dspark.training.anchors import AnchorBlocks, attention_tiles, sample_anchors


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_documented_example():
    ids = torch.arange(100, 112)[None]
    loss_mask = torch.zeros(1, 12, dtype=torch.int64)
    loss_mask[0, 4:9] = 1
    anchors, keep = sample_anchors(loss_mask, 512, generator())
    assert anchors.tolist() == [[4, 5, 6, 7]]
    assert keep.all()
    blocks = AnchorBlocks.build(ids, loss_mask, anchors, keep, 3)
    assert blocks.supervised_BNK[0].int().tolist() == [[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 0, 0]]
    assert blocks.tokens_BN[0].tolist() == [104, 105, 106, 107]
    assert blocks.positions_BNK[0, 1].tolist() == [5, 6, 7]
    assert blocks.labels_BNK[0, 1].tolist() == [106, 107, 108]
    assert blocks.previous_BNK[0, 1].tolist() == [105, 106, 107]


def test_blocks_equal_a_loop_over_cells():
    ids = torch.randint(50, (3, 20), generator=generator(1))
    loss_mask = (torch.rand(3, 20, generator=generator(2)) < 0.8).long()
    anchors, keep = sample_anchors(loss_mask, 30, generator(3))
    blocks = AnchorBlocks.build(ids, loss_mask, anchors, keep, 4)
    assert blocks.supervised_BNK[..., 0].equal(keep)
    for b in range(3):
        for n, anchor in enumerate(anchors[b].tolist()):
            alive = bool(keep[b, n])
            for k in range(4):
                label = anchor + k + 1
                alive = alive and label < 20 and bool(loss_mask[b, label])
                assert bool(blocks.supervised_BNK[b, n, k]) == alive
                if alive:
                    assert blocks.labels_BNK[b, n, k] == ids[b, label]
                    assert blocks.previous_BNK[b, n, k] == ids[b, label - 1]


def test_a_hole_in_the_mask_ends_supervision_for_good():
    ids, loss_mask = torch.arange(10)[None], torch.ones(1, 10, dtype=torch.int64)
    loss_mask[0, 5] = 0
    one, kept = torch.tensor([[3]]), torch.tensor([[True]])
    blocks = AnchorBlocks.build(ids, loss_mask, one, kept, 4)
    assert blocks.supervised_BNK.tolist() == [[[True, False, False, False]]]


def test_anchors_are_distinct_candidates_and_padded_to_the_longest():
    loss_mask = torch.zeros(3, 40, dtype=torch.int64)
    loss_mask[0, 10:14] = 1
    loss_mask[1, 5:40] = 1
    anchors, keep = sample_anchors(loss_mask, 16, generator())
    assert anchors.shape == (3, 16)
    assert keep.sum(1).tolist() == [3, 16, 0]
    assert anchors[0][keep[0]].tolist() == [10, 11, 12]
    assert not anchors[~keep].any()
    real = anchors[1]
    assert (real[1:] > real[:-1]).all()
    assert real[0] >= 5
    assert real[-1] <= 38
    short, _ = sample_anchors(loss_mask[:1], 16, generator())
    assert short.shape == (1, 3)
    none, kept = sample_anchors(loss_mask[2:], 16, generator())
    assert (none.tolist(), kept.tolist()) == ([[0]], [[False]])


def test_sampling_is_uniform_and_uses_only_its_generator():
    loss_mask = torch.ones(1, 11, dtype=torch.int64)
    state = torch.get_rng_state()
    source, counts = generator(5), torch.zeros(11)
    for _ in range(2000):
        anchors, _ = sample_anchors(loss_mask, 3, source)
        counts[anchors[0]] += 1
    assert torch.equal(torch.get_rng_state(), state)
    assert counts[10] == 0
    expected = 2000 * 3 / 10
    chi_squared = ((counts[:10] - expected) ** 2 / expected).sum()
    assert chi_squared < 27.9  # 9 degrees of freedom, p = .001
    again, _ = sample_anchors(loss_mask, 3, generator(6))
    assert torch.equal(again, sample_anchors(loss_mask, 3, generator(6))[0])


def test_tiles_say_what_each_slot_sees():
    loss_mask = torch.ones(2, 15, dtype=torch.int64)
    loss_mask[1, :9] = 0
    anchors, keep = sample_anchors(loss_mask, 8, generator(7))
    block, context = 3, 15
    blocks = AnchorBlocks.build(torch.zeros(2, 15).long(), loss_mask, anchors, keep, block)
    assert keep.sum(1).tolist() == [8, 5]
    for size in (1, 3, 8, 20):
        tiles = attention_tiles(blocks, context, anchors_per_tile=size)
        assert [t.start for t in tiles] == list(range(0, 24, size * block))
        assert tiles[-1].stop == 24
        for tile in tiles:
            for b in range(2):
                for row in range(tile.start, tile.stop):
                    own, cells = row // block, tile.mask_BQP[b, row - tile.start]
                    reach = int(anchors[b, own]) if keep[b, own] else 0
                    assert cells[: tile.context].sum() == cells[:reach].sum() == reach
                    seen = cells[tile.context :].nonzero().flatten() + tile.start
                    assert seen.tolist() == list(range(own * block, own * block + block))
