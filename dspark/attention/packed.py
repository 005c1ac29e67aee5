"""Attention of packed blocks: the slots of many blocks over many contexts, one call per layer.

The contexts of all sequences lie one after the other, and so do the blocks. A slot sees the context
rows of its own sequence before its anchor (strictly: the target's state at the anchor does not
exist yet when decoding) and the slots of its own block (docs/method.md, 2.1); nothing is padded.

On a CPU blocks are worked on in tiles of neighbours, which need no context but their own
sequence's up to their last anchor; on an accelerator by flex attention, whose block mask skips the
same. Letters: T context rows, M blocks, Q = M slots rows, A query heads, G key heads, D per head;
q and p are the queries and keys of a tile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from dspark.attention.flex import STRETCH, flex_kernel, range_mask

_TILE_BLOCKS = 16


@dataclass(frozen=True)
class BlockLayout:
    """Where blocks stand over their contexts.

    Attributes:
        first_M: the first context row of each block's sequence, on the CPU, ascending.
        reach_M: the row behind the last that a block sees, its anchor's own; on the CPU, ascending.
        slots: rows of a block.
    """

    first_M: Tensor
    reach_M: Tensor
    slots: int
    _memo: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def once(self, name: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """What `make` gives, made once for all layers that ask for it."""
        if name not in self._memo:
            self._memo[name] = make()
        return self._memo[name]

    def lowest_M(self, window: int | None) -> Tensor:
        """The first context row that each block sees."""
        if window is None:
            return self.first_M
        return torch.maximum(self.first_M, self.reach_M - window)


@dataclass(frozen=True)
class PackedRows:
    """What a layer gives: queries [Q, A, D], keys and values [.., G, D] of contexts and blocks."""

    query_QAD: Tensor
    context_key_TGD: Tensor
    context_value_TGD: Tensor
    key_QGD: Tensor
    value_QGD: Tensor


def packed_attention(
    rows: PackedRows,
    layout: BlockLayout,
    *,
    scale: float,
    window: int | None = None,
    causal: bool = False,
) -> Tensor:
    """Mixed values [Q, A, D] of all slots.

    Args:
        rows: queries, keys and values.
        layout: who sees whom.
        scale: multiplies the scores.
        window: context rows that a block sees at most, its anchor's nearest; None for all.
        causal: whether a slot sees only those before it, and itself, of its block.
    """
    if not rows.query_QAD.shape[0]:
        # Nothing to mix, yet all that was read gets a gradient, as it does on other ranks.
        unused = rows.context_key_TGD, rows.context_value_TGD, rows.key_QGD, rows.value_QGD
        return rows.query_QAD + 0 * sum(x.sum() for x in unused)
    attend = flex_blocks if rows.query_QAD.is_cuda else tiled_blocks
    return attend(rows, layout, scale=scale, window=window, causal=causal)


def tiled_blocks(
    rows: PackedRows, layout: BlockLayout, *, scale: float, window: int | None, causal: bool
) -> Tensor:
    """`packed_attention` by dense products per tile."""
    device, dtype = rows.query_QAD.device, rows.query_QAD.dtype
    tiles: list[_Tile] = layout.once(
        ("tiles", window, causal, device, dtype),
        lambda: _tiles(layout, window, causal, rows.query_QAD),
    )
    # Cut once where the tiles' ranges end: slices would each send back a gradient of all rows.
    cuts = [tile.blocks * layout.slots for tile in tiles]
    spans = [(tile.low, tile.high) for tile in tiles]
    queries, keys, values = (
        torch.split(x.transpose(0, 1), cuts, dim=1)
        for x in (rows.query_QAD, rows.key_QGD, rows.value_QGD)
    )
    past_keys, past_values = (
        _spans(x.transpose(0, 1), spans) for x in (rows.context_key_TGD, rows.context_value_TGD)
    )
    mixed = []
    for tile, query, past_key, key, past_value, value in zip(
        tiles, queries, past_keys, keys, past_values, values, strict=True
    ):
        tile_key, tile_value = torch.cat((past_key, key), 1), torch.cat((past_value, value), 1)
        # Products and a mask that is added: 2 to 4 times faster here than the fused kernel. The
        # query heads of a group are rows of one product.
        scores = (query * scale).reshape(len(tile_key), -1, query.shape[-1]) @ tile_key.mT
        shape = (query.shape[0], query.shape[1], tile_key.shape[1])
        weights = (scores.view(shape) + tile.mask_qp).softmax(-1)
        mixed.append((weights.view_as(scores) @ tile_value).view(*query.shape[:2], -1))
    return torch.cat(mixed, dim=1).transpose(0, 1)


@dataclass(frozen=True)
class _Tile:
    """Neighbouring blocks of one sequence.

    Attributes:
        blocks: how many.
        low, high: the context rows low .. high - 1 are those that any of them sees.
        mask_qp: minus infinity where a slot may not look, over these rows and the tile's own.
    """

    blocks: int
    low: int
    high: int
    mask_qp: Tensor


def _tiles(layout: BlockLayout, window: int | None, causal: bool, like: Tensor) -> list[_Tile]:
    _, counts = torch.unique_consecutive(layout.first_M, return_counts=True)
    sizes = [
        min(_TILE_BLOCKS, count - start)
        for count in counts.tolist()
        for start in range(0, count, _TILE_BLOCKS)
    ]
    lows, highs = torch.split(layout.lowest_M(window), sizes), torch.split(layout.reach_M, sizes)
    owners = torch.arange(_TILE_BLOCKS).repeat_interleave(layout.slots)
    own = owners.unsqueeze(0) == owners.unsqueeze(1)
    if causal:
        own = own.tril()
    tiles = []
    for size, low, high in zip(sizes, lows, highs, strict=True):
        begin, end = int(low[0]), int(high[-1])
        columns = torch.arange(begin, end)
        before = (columns >= low.unsqueeze(1)) & (columns < high.unsqueeze(1))
        width = size * layout.slots
        mask = torch.cat((before.repeat_interleave(layout.slots, 0), own[:width, :width]), dim=1)
        hidden = torch.zeros(mask.shape).masked_fill_(~mask, float("-inf"))
        tiles.append(_Tile(size, begin, end, hidden.to(like)))
    return tiles


def _spans(rows: Tensor, spans: list[tuple[int, int]]) -> list[Tensor]:
    """Rows low .. high - 1 of dimension 1 for each span; those that overlap are cut together."""
    groups: list[list[int]] = []  # begin, end, number of spans
    for low, high in spans:
        if groups and low < groups[-1][1]:
            groups[-1][1] = max(groups[-1][1], high)
            groups[-1][2] += 1
        else:
            groups.append([low, high, 1])
    sizes, done = list[int](), 0
    for begin, end, _ in groups:
        sizes += [begin - done, end - begin]
        done = end
    pieces = torch.split(rows, [*sizes, rows.shape[1] - done], dim=1)[1::2]
    found, shares = list[Tensor](), iter(spans)
    for piece, (begin, _, count) in zip(pieces, groups, strict=True):
        for _ in range(count):
            low, high = next(shares)
            whole = (low, high) == (begin, begin + piece.shape[1])
            found.append(piece if whole else piece[:, low - begin : high - begin])
    return found


def flex_blocks(
    rows: PackedRows, layout: BlockLayout, *, scale: float, window: int | None, causal: bool
) -> Tensor:
    """`packed_attention` by flex attention: the keys are all contexts, then all blocks."""
    query, context = rows.query_QAD, rows.context_key_TGD.shape[0]
    mask: BlockMask = layout.once(
        ("flex", window, causal, context, query.device),
        lambda: _flex_mask(layout, window, causal, context, query.device),
    )
    query_1AQD, key_1GND, value_1GND = (
        x.transpose(0, 1).unsqueeze(0)
        for x in (
            query,
            torch.cat((rows.context_key_TGD, rows.key_QGD)),
            torch.cat((rows.context_value_TGD, rows.value_QGD)),
        )
    )
    out_1AQD, _ = flex_kernel(query.device.type)(
        query_1AQD,
        key_1GND,
        value_1GND,
        block_mask=mask,
        scale=scale,
        enable_gqa=query_1AQD.shape[1] != key_1GND.shape[1],
        with_lse=False,
    )
    return out_1AQD.squeeze(0).transpose(0, 1)


def _flex_mask(
    layout: BlockLayout, window: int | None, causal: bool, context: int, device: torch.device
) -> BlockMask:
    # Tables in place of numbers: the kernel is compiled once, whatever the numbers of rows.
    blocks, slots = layout.reach_M.numel(), layout.slots
    block_Q = torch.arange(blocks).repeat_interleave(slots)
    slot_Q = torch.arange(slots).repeat(blocks)
    owner_N = torch.cat((torch.full((context,), -1), block_Q)).to(device)
    slot_N = torch.cat((torch.zeros(context, dtype=torch.long), slot_Q)).to(device)
    low_Q = layout.lowest_M(window).repeat_interleave(slots)
    high_Q = layout.reach_M.repeat_interleave(slots)
    block_Q, slot_Q, low, high = (x.to(device) for x in (block_Q, slot_Q, low_Q, high_Q))

    def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        owner = owner_N[key]
        own = owner == block_Q[query]
        if causal:
            own = own & (slot_N[key] <= slot_Q[query])
        return own | ((owner < 0) & (key >= low[query]) & (key < high[query]))

    rows = low_Q.numel()
    return range_mask(
        low_Q,
        high_Q,
        context + rows,
        visible,
        device,
        others_SC=_own_stretches(rows, slots, context),
    )


def _own_stretches(rows: int, slots: int, context: int) -> Tensor:
    """Which stretches of keys hold the blocks of a stretch of slots.

    A block that begins in one stretch and ends in the next is seen from both.
    """
    starts = torch.arange(-(-rows // STRETCH)).unsqueeze(1) * STRETCH
    ends = (starts + STRETCH).clamp(max=rows)
    first, behind = starts // slots * slots, -(-ends // slots) * slots
    begin = torch.arange(-(-(context + rows) // STRETCH)) * STRETCH
    return (begin + STRETCH > context + first) & (begin < context + behind)
