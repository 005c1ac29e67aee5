"""Short segments whose pages begin at equal distances, attended to in one padded call.

A decoding step of R requests would otherwise launch R small kernels per layer, and on small
models launching costs more than computing. What is derived from the layout (indices, mask) is
built once per step and shared by all layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dspark.attention.layout import RaggedBatch
from dspark.attention.pages import PagedCache

# Segments up to this long count as short.
SHORT_ROWS = 16
# Of the padded keys and rows at least this share must be real.
_MIN_FILL = 0.5


@dataclass(frozen=True)
class Padding:
    """How the rows of a batch spread over [spans, length]: spans of the pool at equal distances.

    Attributes:
        first_row: pool row of the first span's first key.
        step: pool rows from one span's beginning to the next one's.
        spans: number of spans; some may belong to nobody in the batch.
        length: rows per span, P.
        keys: keys of a span, S.
        spread_N: batch row of each padded row (any for padding), N = spans * length; None where
            the batch is laid out like that already.
        gather_T: padded row of each batch row; None likewise.
        mask_R1NS: additive mask [spans, 1, folded heads * length, S].
    """

    first_row: int
    step: int
    spans: int
    length: int
    keys: int
    spread_N: Tensor | None
    gather_T: Tensor | None
    mask_R1NS: Tensor


def plan_padding(
    batch: RaggedBatch, pool_rows: int, window: int | None, like: Tensor, shared: int
) -> Padding | None:
    """Decide whether padding pays, and lay it out.

    Args:
        batch: the rows.
        pool_rows: rows of the cache.
        window: number of keys that a row sees; None for all.
        like: a tensor of the mask's dtype and device.
        shared: query heads per key head.

    Returns:
        The layout, or None where segments are better attended to one by one.
    """
    name = ("padding", window, like.dtype, shared)
    if name not in batch.memo:
        batch.memo[name] = _plan(batch, pool_rows, window, like, shared)
    plan: Padding | None = batch.memo[name]
    return plan


def padded_attention(
    query_1ATD: Tensor, cache: PagedCache, layer: int, padding: Padding, scale: float
) -> Tensor:
    """Causal attention of all rows at once; returns [1, A, T, value_dim]."""
    key_RGSD, value_RGSD = cache.spread(
        layer, padding.first_row, padding.step, padding.spans, padding.keys
    )
    heads, groups = query_1ATD.shape[1], key_RGSD.shape[1]
    rows_NAD = query_1ATD[0].transpose(0, 1)
    if padding.spread_N is not None:
        rows_NAD = rows_NAD[padding.spread_N]
    rows_RPAD = rows_NAD.view(padding.spans, padding.length, heads, -1)
    query_RGND = rows_RPAD.transpose(1, 2).reshape(
        padding.spans, groups, heads // groups * padding.length, -1
    )
    out_RGND = scaled_dot_product_attention(
        query_RGND, key_RGSD, value_RGSD, padding.mask_R1NS, scale=scale
    )
    out_RAPD = out_RGND.reshape(padding.spans, heads, padding.length, -1)
    out_TAD = out_RAPD.transpose(1, 2).flatten(0, 1)
    if padding.gather_T is not None:
        out_TAD = out_TAD[padding.gather_T]
    return out_TAD.transpose(0, 1).unsqueeze(0)


def _plan(
    batch: RaggedBatch, pool_rows: int, window: int | None, like: Tensor, shared: int
) -> Padding | None:
    segments = batch.segments
    lengths = [segment.length for segment in segments]
    if min(lengths) < 1 or max(lengths) > SHORT_ROWS:
        return None
    if not all(segment.table.single_run for segment in segments):
        return None
    begins = [
        s.first if window is None else max(s.first, s.start + 1 - window) for s in segments
    ]
    begin, end, length = min(begins), max(s.end for s in segments), max(lengths)
    firsts = [s.table.pages[0] * s.table.page_size for s in segments]
    spacing = _spacing(firsts, end - begin)
    if spacing is None:
        return None
    first, step, spans = spacing
    keys = sum(s.end - low for s, low in zip(segments, begins, strict=True))
    if keys < _MIN_FILL * spans * (end - begin) or sum(lengths) < _MIN_FILL * spans * length:
        return None
    if first + (spans - 1) * step + end > pool_rows:
        return None
    owner = [(row - first) // step for row in firsts]
    gather: list[int] = []
    spread = [0] * (spans * length)
    for i, (segment, row) in enumerate(zip(segments, batch.offsets, strict=False)):
        for k in range(segment.length):
            gather.append(owner[i] * length + k)
            spread[gather[-1]] = row + k
    last = [[end - 1] * length for _ in range(spans)]  # padding sees a key, to stay finite
    for i, segment in enumerate(segments):
        last[owner[i]][: segment.length] = range(segment.start, segment.end)
    mask_RPS = _mask(torch.tensor(last), torch.arange(begin, end), window)
    mask_RPS = mask_RPS.to(like.device, like.dtype)
    plain = gather == list(range(spans * length))
    return Padding(
        first_row=first + begin,
        step=step,
        spans=spans,
        length=length,
        keys=end - begin,
        spread_N=None if plain else torch.tensor(spread, device=like.device),
        gather_T=None if plain else torch.tensor(gather, device=like.device),
        mask_R1NS=mask_RPS.repeat(1, shared, 1).unsqueeze(1),
    )


def _spacing(firsts: Sequence[int], least: int) -> tuple[int, int, int] | None:
    """First row, step and number of spans of which every one of `firsts` begins one.

    None where some are equal, or the step would be below `least`, so that spans overlap.
    """
    lowest = min(firsts)
    step = math.gcd(*(row - lowest for row in firsts))
    if step < least or len(set(firsts)) < len(firsts):
        return None
    return lowest, step, (max(firsts) - lowest) // step + 1


def _mask(positions_RP: Tensor, keys_S: Tensor, window: int | None) -> Tensor:
    """Additive causal mask [R, P, S]."""
    positions_RP1 = positions_RP.unsqueeze(-1)
    hidden_RPS = keys_S > positions_RP1
    if window is not None:
        hidden_RPS |= keys_S <= positions_RP1 - window
    return torch.zeros(hidden_RPS.shape).masked_fill_(hidden_RPS, float("-inf"))
