"""Attention of packed blocks: every way of computing it equals one dense mask."""

import pytest
import torch
from torch.nn.attention import flex_attention as flex

from dspark.attention import packed as room
from dspark.attention.packed import (
    BlockLayout,
    PackedRows,
    flex_blocks,
    packed_attention,
    tiled_blocks,
)

SLOTS, HEADS, GROUPS, WIDTH, SCALE = 3, 4, 2, 16, 0.3
LENGTHS = (9, 17, 4, 12)
ANCHORS = ([0, 3, 8], [1, 2, 5, 6, 9, 11, 16], [], [4, 5])


def layout(lengths=LENGTHS, anchors=ANCHORS):
    first, firsts, reach = 0, [], []
    for length, own in zip(lengths, anchors, strict=True):
        firsts += [first] * len(own)
        reach += [first + a for a in own]
        first += length
    return BlockLayout(torch.tensor(firsts), torch.tensor(reach), SLOTS)


def rows_of(context, blocks, dtype=torch.float64, trained=True):
    source = torch.Generator().manual_seed(0)

    def draw(rows, heads):
        x = torch.randn(rows, heads, WIDTH, generator=source, dtype=torch.float64)
        return x.to(dtype).requires_grad_(trained)

    q = blocks * SLOTS
    return PackedRows(
        draw(q, HEADS), draw(context, GROUPS), draw(context, GROUPS), draw(q, GROUPS),
        draw(q, GROUPS),
    )  # fmt: skip


def dense(rows, layout, *, scale, window, causal):
    """One mask over all contexts and all blocks, cell by cell."""
    context, q = rows.context_key_TGD.shape[0], rows.query_QAD.shape[0]
    seen = torch.zeros(q, context + q, dtype=torch.bool)
    for i in range(q):
        block, slot = divmod(i, SLOTS)
        first, reach = int(layout.first_M[block]), int(layout.reach_M[block])
        for c in range(first, reach):
            seen[i, c] = window is None or c >= reach - window
        for other in range(SLOTS):
            seen[i, context + block * SLOTS + other] = not causal or other <= slot
    repeat = HEADS // GROUPS
    key = torch.cat((rows.context_key_TGD, rows.key_QGD)).repeat_interleave(repeat, 1)
    value = torch.cat((rows.context_value_TGD, rows.value_QGD)).repeat_interleave(repeat, 1)
    scores = torch.einsum("qad,kad->aqk", rows.query_QAD, key) * scale
    return torch.einsum("aqk,kad->qad", scores.masked_fill(~seen, -torch.inf).softmax(-1), value)


@pytest.mark.parametrize(("window", "causal"), [(None, False), (4, False), (2, True), (None, True)])
@pytest.mark.parametrize("tile", [1, 2, 16])
def test_tiles_equal_a_dense_mask(window, causal, tile, monkeypatch):
    monkeypatch.setattr(room, "_TILE_BLOCKS", tile)
    blocks = layout()
    rows = rows_of(sum(LENGTHS), blocks.reach_M.numel())
    found, wanted = (
        attend(rows, blocks, scale=SCALE, window=window, causal=causal)
        for attend in (tiled_blocks, dense)
    )
    torch.testing.assert_close(found, wanted)
    leaves = [getattr(rows, name) for name in PackedRows.__dataclass_fields__]
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).double()
    grads = [torch.autograd.grad((out * weight).sum(), leaves) for out in (found, wanted)]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs)


def long_layout():
    """More rows than a stretch of flex holds, so that whole stretches are left out.

    The slots begin where a stretch of keys does, and a block crosses the end of theirs.
    """
    lengths, source = (150, 201, 33), torch.Generator().manual_seed(4)
    anchors = [sorted(torch.randperm(n, generator=source)[:50].tolist()) for n in lengths]
    return layout(lengths, anchors), sum(lengths)


@pytest.mark.parametrize(("window", "causal"), [(None, False), (4, False), (2, True)])
def test_flex_equals_a_dense_mask(window, causal, monkeypatch):
    """With its gradients, which torch has on a CPU but does not offer."""
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)
    blocks, context = long_layout()
    rows = rows_of(context, blocks.reach_M.numel())
    found, wanted = (
        attend(rows, blocks, scale=SCALE, window=window, causal=causal)
        for attend in (flex_blocks, dense)
    )
    torch.testing.assert_close(found, wanted)
    leaves = [getattr(rows, name) for name in PackedRows.__dataclass_fields__]
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).double()
    grads = [torch.autograd.grad((out * weight).sum(), leaves) for out in (found, wanted)]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(("window", "causal"), [(None, False), (4, False), (2, True)])
def test_the_stretches_of_flex_hold_what_is_seen(window, causal):
    """A CPU looks at every pair; a kernel at none but those of the stretches that are listed."""
    blocks, context = long_layout()
    rows = blocks.reach_M.numel() * SLOTS
    mask = room._flex_mask(blocks, window, causal, context, torch.device("cpu"))
    needed = flex.create_block_mask(mask.mask_mod, None, None, rows, context + rows, device="cpu")
    read, least = mask.to_dense().bool(), needed.to_dense().bool()
    assert (read | least).equal(read)
    assert read.sum() < read.numel()
    wholes = [listed(m.full_kv_num_blocks, m.full_kv_indices) for m in (mask, needed)]
    assert wholes[0] == wholes[1]
    assert not set(listed(mask.kv_num_blocks, mask.kv_indices)) & set(wholes[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("window", "causal"), [(None, False), (4, False), (2, True)])
def test_gpu_flex_equals_a_dense_mask(window, causal):
    blocks, context = long_layout()
    found = []
    for device, attend in (("cuda", flex_blocks), ("cpu", dense)):
        leaves = rows_of(context, blocks.reach_M.numel(), torch.float32)
        rows = PackedRows(*(x.to(device) for x in vars(leaves).values()))
        out = attend(rows, blocks, scale=SCALE, window=window, causal=causal)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(device)
        (out * weight).sum().backward()
        found.append([out.detach().cpu(), *(x.grad for x in vars(leaves).values())])
    for mine, theirs in zip(*found, strict=True):
        assert (mine - theirs).norm() < 5e-3 * theirs.norm()


def listed(counts, indices):
    """Pairs of stretches, of queries and of keys."""
    return [
        (s, c)
        for s, n in enumerate(counts.flatten().tolist())
        for c in sorted(indices[0, 0, s, :n].tolist())
    ]


def test_a_batch_is_its_sequences_one_at_a_time():
    blocks = layout()
    rows = rows_of(sum(LENGTHS), blocks.reach_M.numel())
    whole = packed_attention(rows, blocks, scale=SCALE)
    first, start = 0, 0
    for length, own in zip(LENGTHS, ANCHORS, strict=True):
        context, q = slice(first, first + length), slice(start, start + len(own) * SLOTS)
        first, start = context.stop, q.stop
        if not own:
            continue
        alone = PackedRows(
            rows.query_QAD[q], rows.context_key_TGD[context], rows.context_value_TGD[context],
            rows.key_QGD[q], rows.value_QGD[q],
        )  # fmt: skip
        single = packed_attention(alone, layout((length,), (own,)), scale=SCALE)
        torch.testing.assert_close(whole[q], single)


def test_no_scores_are_computed_for_what_does_not_exist():
    """The work of a short sequence beside a long one is what it is alone."""
    anchors = ([5], list(range(10, 90)))
    tiles = room._tiles(layout((10, 100), anchors), None, False, torch.zeros(1))
    own = (SLOTS, 5 + SLOTS)
    others = [(16 * SLOTS, 10 + i + 15 + 16 * SLOTS) for i in range(0, 80, 16)]
    assert [tuple(tile.mask_qp.shape) for tile in tiles] == [own, *others]


def test_without_blocks_everything_has_a_gradient_of_zero():
    rows = rows_of(9, 0)
    out = packed_attention(rows, layout((9,), ([],)), scale=SCALE)
    assert out.shape == (0, HEADS, WIDTH)
    leaves = [getattr(rows, name) for name in PackedRows.__dataclass_fields__]
    assert all(not grad.any() for grad in torch.autograd.grad(out.sum(), leaves))
