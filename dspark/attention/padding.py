"""Short segments of several requests, attended to in one padded call.

A decoding step of R requests would otherwise launch R small kernels per layer, and on small
models launching costs more than computing. Prompts that ride along stand behind those, and are
attended to one by one. Where the requests' rows start at equal distances in
the pool, their keys are one strided view; else they are gathered. What is derived from the layout
(indices, mask) is built once per step and shared by all layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dspark.attention.paged_cache import BlockTable, CacheShape, PagedCache
from dspark.attention.ragged_batch import RaggedBatch, Segment, tree_mask

# Segments up to this long count as short; where there are trees, up to the second.
SHORT_ROWS, SHORT_TREES = 16, 64
# Of the padded keys and rows at least this share must be real; of keys less, where so many bytes
# of keys and values per request and layer are padding: a call of its own would cost as much.
MIN_FILL = 0.5
_WASTE_BYTES = 256 * 1024
# Keys and values of a request's span, per layer, up to which gathering them beats a call each on a
# CPU (docs/LOG.md); elsewhere it always does.
_GATHER_BYTES = 256 * 1024


@dataclass(frozen=True)
class Padding:
    """How the first rows of a batch spread over [spans, length], one span per request or gap.

    Attributes:
        count: segments of the batch that these rows are.
        spans: number of spans.
        length: rows per span, P.
        keys: keys per span, S.
        row: pool row of the first key of the first span.
        distance: pool rows from one span's first key to the next one's.
        rows_RS: pool row of each key, where they are at no common distance; else None.
        spread_N: batch row of each padded row (any for padding), N = spans * length; None where
            the batch is laid out like that already.
        gather_T: padded row of each batch row; None likewise.
        mask_R1NS: additive mask [spans, 1, folded heads * length, keys].
    """

    count: int
    spans: int
    length: int
    keys: int
    row: int
    distance: int
    rows_RS: Tensor | None
    spread_N: Tensor | None
    gather_T: Tensor | None
    mask_R1NS: Tensor


@dataclass(frozen=True)
class _Keys:
    """Where the keys of a batch's segments are: positions begin:end of each, span by span.

    Attributes:
        begin, end: positions.
        spans: number of spans.
        places: span of each segment.
        row, distance, rows_RS: as in `Padding`.
    """

    begin: int
    end: int
    spans: int
    places: tuple[int, ...]
    row: int = 0
    distance: int = 0
    rows_RS: Tensor | None = None


def plan_padding(
    batch: RaggedBatch,
    window: int | None,
    first: int,
    query_1ATD: Tensor,
    cache: PagedCache,
    layer: int,
) -> Padding | None:
    """Decide which of the first segments are padded together, and lay these out.

    Args:
        batch: the rows.
        window: number of keys that a row sees; None for all.
        first: position of the first key that any row sees.
        query_1ATD: their queries.
        cache: where their keys are.
        layer: of the cache.

    Returns:
        The layout, or None where segments are better attended to one by one.
    """
    shape = cache.shapes[layer]
    name = ("padding", window, first, query_1ATD.dtype, query_1ATD.shape[1], shape, cache.rows)
    if name not in batch.memo:
        lengths = [segment.length for segment in batch.segments]
        short = SHORT_ROWS if batch.trees is None else SHORT_TREES
        count = next((i for i, n in enumerate(lengths) if not 1 <= n <= short), len(lengths))
        keys = None
        while count > 1 and keys is None:
            keys = _find_keys(batch.segments[:count], window, first, cache, shape)
            if keys is None:  # the longest may be what is left of a prompt, behind all that decode
                count = lengths.index(max(lengths[:count]))
        shared = query_1ATD.shape[1] // shape.kv_heads
        batch.memo[name] = keys and _lay_out(batch, keys, window, query_1ATD, shared)
    plan: Padding | None = batch.memo[name]
    return plan


def padded_attention(
    query_1ATD: Tensor, cache: PagedCache, layer: int, padding: Padding, scale: float
) -> Tensor:
    """Causal attention of all rows at once; returns [1, A, T, value_dim]."""
    if padding.rows_RS is None:
        key_RGSD, value_RGSD = cache.spans(
            layer, padding.row, padding.distance, padding.spans, padding.keys
        )
    else:
        key_RGSD, value_RGSD = cache.gather(layer, padding.rows_RS)
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


def _find_keys(
    segments: tuple[Segment, ...],
    window: int | None,
    first: int,
    cache: PagedCache,
    shape: CacheShape,
) -> _Keys | None:
    """The places of some short segments' keys, if few rows and keys would be padding."""
    lengths = [segment.length for segment in segments]
    begins = [first if window is None else max(first, s.start + 1 - window) for s in segments]
    begin, end = min(begins), max(s.end for s in segments)
    real = sum(s.end - low for s, low in zip(segments, begins, strict=True))
    waste = len(segments) * (_WASTE_BYTES // _key_bytes(cache, shape))
    most_spans = min(
        int(max(real / MIN_FILL, real + waste) / (end - begin)),
        int(sum(lengths) / (MIN_FILL * max(lengths))),
    )
    if len(segments) > most_spans:
        return None
    if strided := _strided(segments, begin, end, most_spans, cache.rows):
        return strided
    if not pays_to_gather(cache, shape, end - begin):
        return None
    spans = [(segment.table, begin, segment.end) for segment in segments]
    rows_RS = gathered_rows(spans, end - begin, cache.device)
    return _Keys(begin, end, len(spans), tuple(range(len(spans))), rows_RS=rows_RS)


def pays_to_gather(cache: PagedCache, shape: CacheShape, keys: int) -> bool:
    """Whether requests of so many keys are better gathered than attended to one by one."""
    return cache.device.type != "cpu" or keys * _key_bytes(cache, shape) <= _GATHER_BYTES


def _key_bytes(cache: PagedCache, shape: CacheShape) -> int:
    """Bytes of a position's key and value in a layer."""
    return shape.kv_heads * (shape.key_dim + shape.value_dim) * cache.dtype.itemsize


def gathered_rows(
    spans: Sequence[tuple[BlockTable, int, int]], width: int, device: torch.device
) -> Tensor:
    """The pool row of each key, [R, width]; behind a request's end its last row stands in.

    Args:
        spans: per request its table and the positions of its first key and after its last.
        width: the most keys of any.
        device: where the rows go.
    """
    ahead: list[int] = []  # per run, how far its rows are ahead of their positions
    counts: list[int] = []
    for table, begin, end in spans:
        position = begin
        for row, count in table.runs(begin, end):
            ahead.append(row - position)
            counts.append(count)
            position += count
        counts[-1] += width - (end - begin)
    begins_R1, ends_R1 = (
        torch.tensor([span[i] for span in spans], device=device).unsqueeze(1) for i in (1, 2)
    )
    positions_RS = (begins_R1 + torch.arange(width, device=device)).minimum(ends_R1 - 1)
    ahead_N = torch.tensor(ahead, device=device).repeat_interleave(
        torch.tensor(counts, device=device), output_size=len(spans) * width
    )
    return positions_RS + ahead_N.view(len(spans), width)


def _strided(
    segments: tuple[Segment, ...], begin: int, end: int, most_spans: int, pool_rows: int
) -> _Keys | None:
    """Spans at a common distance, so far apart that none reaches into the next."""
    starts: list[int] = []
    for segment in segments:
        runs = segment.table.runs(begin, segment.end)
        if len(runs) != 1:
            return None
        starts.append(runs[0][0])
    row = min(starts)
    distance = math.gcd(*(start - row for start in starts))
    spans = (max(starts) - row) // distance + 1 if distance else 0
    apart = len(set(starts)) == len(starts) and distance >= end - begin
    if not apart or spans > most_spans or max(starts) + end - begin > pool_rows:
        return None
    places = tuple((start - row) // distance for start in starts)
    return _Keys(begin, end, spans, places, row, distance)


def _lay_out(
    batch: RaggedBatch, keys: _Keys, window: int | None, like: Tensor, shared: int
) -> Padding:
    count, spans, device = len(keys.places), keys.spans, like.device
    segments = batch.segments[:count]
    length = max(segment.length for segment in segments)
    gather: list[int] = []
    spread = [0] * (spans * length)
    last = [[keys.end - 1] * length for _ in range(spans)]  # padding sees a key, to stay finite
    for segment, place, row in zip(segments, keys.places, batch.offsets, strict=False):
        last[place][: segment.length] = range(segment.start, segment.end)
        for i in range(segment.length):
            gather.append(place * length + i)
            spread[gather[-1]] = row + i
    mask_RPS = _mask(torch.tensor(last), torch.arange(keys.begin, keys.end), window)
    for segment, parents, place in zip(segments, batch.trees or (), keys.places, strict=False):
        if parents:
            own_LS = tree_mask(segment, parents, keys.begin, window, mask_RPS)
            mask_RPS[place, : segment.length, : own_LS.shape[1]] = own_LS
    mask_RPS = mask_RPS.to(device, like.dtype)
    plain = gather == list(range(spans * length))
    return Padding(
        count=count,
        spans=spans,
        length=length,
        keys=keys.end - keys.begin,
        row=keys.row,
        distance=keys.distance,
        rows_RS=keys.rows_RS,
        spread_N=None if plain else torch.tensor(spread, device=device),
        gather_T=None if plain else torch.tensor(gather, device=device),
        mask_R1NS=mask_RPS.repeat(1, shared, 1).unsqueeze(1),
    )


def _mask(positions_RP: Tensor, keys_S: Tensor, window: int | None) -> Tensor:
    """Additive causal mask [R, P, S]."""
    positions_RP1 = positions_RP.unsqueeze(-1)
    hidden_RPS = keys_S > positions_RP1
    if window is not None:
        hidden_RPS |= keys_S <= positions_RP1 - window
    return torch.zeros(hidden_RPS.shape).masked_fill_(hidden_RPS, float("-inf"))
