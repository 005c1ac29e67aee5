"""Attention of draft blocks: context from the cache, the block itself in both directions.

On an accelerator the blocks of all requests run in one call where their contexts are about equally
long; else, and on a CPU, request by request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dspark.attention.backends import folded_heads, fused
from dspark.attention.padding import MIN_FILL, gathered_rows
from dspark.attention.paged_cache import BlockTable, PagedCache


@dataclass(frozen=True)
class BlockContext:
    """Which cached rows the blocks of a round see.

    Attributes:
        tables: block table of each request.
        lengths: number of context rows of each request.
        memo: what is derived from them once and used in every layer.
    """

    tables: Sequence[BlockTable]
    lengths: Sequence[int]
    memo: dict[tuple[object, ...], Any] = field(default_factory=dict, compare=False, repr=False)

    def begins(self, window: int | None) -> list[int]:
        """Position of the first context row that each block sees."""
        return [0 if window is None else max(0, length - window) for length in self.lengths]

    def positions_RK(self, slots: int, device: torch.device) -> Tensor:
        """Positions [R, slots] of the blocks' rows."""
        lengths_R1 = torch.tensor(self.lengths, device=device).unsqueeze(1)
        return lengths_R1 + torch.arange(slots, device=device)


def block_attention(
    query_RKAD: Tensor,
    key_RKGD: Tensor,
    value_RKGD: Tensor,
    cache: PagedCache,
    layer: int,
    context: BlockContext,
    *,
    scale: float,
    window: int | None = None,
    causal: bool = False,
) -> Tensor:
    """Attention of one block per request.

    Every row of request r sees the first `lengths[r]` cached rows of `tables[r]` and all K rows
    of its own block. With a window, all rows of a block see the last `window` of those cached rows
    and still their whole block.

    Args:
        query_RKAD: queries [R, K, A, D].
        key_RKGD: keys of the blocks [R, K, G, D]; they are not written to the cache.
        value_RKGD: values of the blocks [R, K, G, D].
        cache: keys and values of the context.
        layer: index of the cache layer.
        context: tables and lengths of the requests.
        scale: multiplies the scores.
        window: see above; None for no limit.
        causal: whether a row sees no later row of its own block.

    Returns:
        [R, K, A, D].
    """
    query_RAKD = query_RKAD.transpose(1, 2)
    key_RGKD, value_RGKD = key_RKGD.transpose(1, 2), value_RKGD.transpose(1, 2)
    together = _together(context, cache, layer, query_RAKD, window, causal=causal)
    if together is not None:
        rows_RS, mask_R1NP = together
        context_key, context_value = cache.gather(layer, rows_RS)
        key_RGPD = torch.cat((context_key, key_RGKD), 2)
        value_RGPD = torch.cat((context_value, value_RGKD), 2)
        return fused(query_RAKD, key_RGPD, value_RGPD, mask_R1NP, scale).transpose(1, 2)
    outs: list[Tensor] = []
    begins = context.begins(window)
    for r, (table, begin, end) in enumerate(
        zip(context.tables, begins, context.lengths, strict=True)
    ):
        context_keys, context_values = cache.pieces(layer, table, begin, end)
        key_1GPD = torch.cat((*context_keys, key_RGKD[r : r + 1]), 2)
        value_1GPD = torch.cat((*context_values, value_RGKD[r : r + 1]), 2)
        mask_NP = None
        if causal:
            mask_KP = _causal_block(query_RAKD, end - begin)
            mask_NP = mask_KP.repeat(folded_heads(query_RAKD, key_RGKD), 1)
        outs.append(fused(query_RAKD[r : r + 1], key_1GPD, value_1GPD, mask_NP, scale))
    return (outs[0] if len(outs) == 1 else torch.cat(outs)).transpose(1, 2)


def _together(
    context: BlockContext,
    cache: PagedCache,
    layer: int,
    query_RAKD: Tensor,
    window: int | None,
    *,
    causal: bool,
) -> tuple[Tensor, Tensor] | None:
    """Pool rows [R, S] of all contexts and a mask over them and the block; None if not worth it."""
    shape = cache.shapes[layer]
    name = (window, causal, query_RAKD.dtype, query_RAKD.shape[1:], shape)
    if name not in context.memo:
        begins = context.begins(window)
        sizes = [end - begin for begin, end in zip(begins, context.lengths, strict=True)]
        most, requests = max(sizes), len(sizes)
        pays = requests > 1 and min(sizes) > 0 and sum(sizes) >= MIN_FILL * requests * most
        context.memo[name] = None
        if pays and _gathers(cache.device):
            spans = list(zip(context.tables, begins, context.lengths, strict=True))
            copies = query_RAKD.shape[1] // shape.kv_heads
            mask_R1NP = _mask(query_RAKD, sizes, copies if causal else 1, causal=causal)
            context.memo[name] = gathered_rows(spans, most, cache.device), mask_R1NP
    found: tuple[Tensor, Tensor] | None = context.memo[name]
    return found


def _gathers(device: torch.device) -> bool:
    """Gathering costs a CPU more than the calls that it saves (docs/LOG.md)."""
    return device.type != "cpu"


def _mask(query_RAKD: Tensor, sizes: Sequence[int], copies: int, *, causal: bool) -> Tensor:
    """Additive mask [R, 1, rows, S + K]; one row for all where all see the same."""
    block, most = query_RAKD.shape[2], max(sizes)
    sizes_R1 = torch.tensor(sizes, device=query_RAKD.device).unsqueeze(1)
    columns_P = torch.arange(most + block, device=query_RAKD.device)
    hidden_RP = (columns_P >= sizes_R1) & (columns_P < most)
    mask_RP = query_RAKD.new_zeros(hidden_RP.shape).masked_fill_(hidden_RP, float("-inf"))
    if not causal:
        return mask_RP[:, None, None]
    mask_RKP = mask_RP.unsqueeze(1) + _causal_block(query_RAKD, most)
    return mask_RKP.repeat(1, copies, 1).unsqueeze(1)


def _causal_block(query_RAKD: Tensor, context: int) -> Tensor:
    """Additive mask [K, context + K] of a causal block behind a number of context rows."""
    block = query_RAKD.shape[2]
    hidden_KP = query_RAKD.new_full((block, context + block), float("-inf"))
    return hidden_KP.triu(context + 1)
