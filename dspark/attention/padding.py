"""Short segments of neighbouring slots, attended to in one padded call.

A decoding step of R requests would otherwise launch R small kernels per layer, and on small
models launching costs more than computing. What is derived from the layout (indices, mask) is
built once per step and shared by all layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dspark.attention.layout import RaggedBatch
from dspark.attention.slots import SlotCache

# Segments up to this long count as short.
SHORT_ROWS = 16
# Of the padded keys and rows at least this share must be real.
_MIN_FILL = 0.5


@dataclass(frozen=True)
class Padding:
    """How the rows of a batch spread over [spans, length], one span per slot of a range.

    Attributes:
        first_slot: first slot of the range.
        spans: number of slots in the range.
        length: rows per span, P.
        begin: first key position of the range.
        end: position after the last key.
        spread_N: batch row of each padded row (any for padding), N = spans * length; None where
            the batch is laid out like that already.
        gather_T: padded row of each batch row; None likewise.
        mask_R1NS: additive mask [spans, 1, folded heads * length, end - begin].
    """

    first_slot: int
    spans: int
    length: int
    begin: int
    end: int
    spread_N: Tensor | None
    gather_T: Tensor | None
    mask_R1NS: Tensor


def plan_padding(
    batch: RaggedBatch, window: int | None, like: Tensor, shared: int
) -> Padding | None:
    """Decide whether padding pays, and lay it out.

    Args:
        batch: the rows.
        window: number of keys that a row sees; None for all.
        like: a tensor of the mask's dtype and device.
        shared: query heads per key head.

    Returns:
        The layout, or None where segments are better attended to one by one.
    """
    name = ("padding", window, like.dtype, shared)
    if name not in batch.memo:
        batch.memo[name] = _plan(batch, window, like, shared)
    plan: Padding | None = batch.memo[name]
    return plan


def padded_attention(
    query_1ATD: Tensor, cache: SlotCache, layer: int, padding: Padding, scale: float
) -> Tensor:
    """Causal attention of all rows at once; returns [1, A, T, value_dim]."""
    key_RGSD, value_RGSD = cache.heads(
        layer, padding.first_slot, padding.begin, padding.end, padding.spans
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


def _plan(batch: RaggedBatch, window: int | None, like: Tensor, shared: int) -> Padding | None:
    segments = batch.segments
    lengths = [segment.length for segment in segments]
    slots = [segment.slot for segment in segments]
    first, spans = min(slots), max(slots) - min(slots) + 1
    if min(lengths) < 1 or max(lengths) > SHORT_ROWS or len(set(slots)) < len(slots):
        return None
    begins = [0 if window is None else max(0, s.start + 1 - window) for s in segments]
    begin, end, length = min(begins), max(s.end for s in segments), max(lengths)
    keys = sum(s.end - low for s, low in zip(segments, begins, strict=True))
    if keys < _MIN_FILL * spans * (end - begin) or sum(lengths) < _MIN_FILL * spans * length:
        return None
    gather: list[int] = []
    spread = [0] * (spans * length)
    for segment, row in zip(segments, batch.offsets, strict=False):
        for i in range(segment.length):
            gather.append((segment.slot - first) * length + i)
            spread[gather[-1]] = row + i
    last = [[end - 1] * length for _ in range(spans)]  # padding sees a key, to stay finite
    for segment in segments:
        last[segment.slot - first][: segment.length] = range(segment.start, segment.end)
    mask_RPS = _mask(torch.tensor(last), torch.arange(begin, end), window)
    mask_RPS = mask_RPS.to(like.device, like.dtype)
    plain = gather == list(range(spans * length))
    return Padding(
        first_slot=first,
        spans=spans,
        length=length,
        begin=begin,
        end=end,
        spread_N=None if plain else torch.tensor(spread, device=like.device),
        gather_T=None if plain else torch.tensor(gather, device=like.device),
        mask_R1NS=mask_RPS.repeat(1, shared, 1).unsqueeze(1),
    )


def _mask(positions_RP: Tensor, keys_S: Tensor, window: int | None) -> Tensor:
    """Additive causal mask [R, P, S]."""
    positions_RP1 = positions_RP.unsqueeze(-1)
    hidden_RPS = keys_S > positions_RP1
    if window is not None:
        hidden_RPS |= keys_S <= positions_RP1 - window
    return torch.zeros(hidden_RPS.shape).masked_fill_(hidden_RPS, float("-inf"))
