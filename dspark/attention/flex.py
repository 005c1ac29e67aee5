"""Attention over the whole pool by torch's flex attention: a mask made of the block tables.

All rows of a batch are the queries and all rows of the pool the keys; a block mask names, for every
stretch of queries, the pages that its requests hold, so that no other page is read. On an
accelerator the kernel is compiled; on a CPU it runs unfused, which is for tests only.

`range_mask` serves where every query sees a range of keys, and maybe others: queries and keys are
taken in stretches of 128 rows, as the kernels take them, and the ranges tell which stretches of
keys a stretch of queries reads at all, and which of them need no mask because every query of the
stretch sees every key. Letters there: Q queries, S stretches of queries, C stretches of keys.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache as once
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import BlockMask

from dspark.attention.backends import Rule
from dspark.attention.paged_cache import PagedCache
from dspark.attention.ragged_batch import Parents, RaggedBatch, ancestors, depths

# Rows of a batch that share a list of pages.
_QUERY_BLOCK = 128


def flex_attention(
    query_1ATD: Tensor, cache: PagedCache, layer: int, batch: RaggedBatch, rule: Rule
) -> Tensor:
    """`backends.cached_attention` by flex attention; returns [1, A, T, value_dim]."""
    key_1GND, value_1GND = cache.pool(layer)
    name = ("flex", rule.window, rule.first, cache.rows, query_1ATD.device)
    if name not in batch.memo:
        batch.memo[name] = _block_mask(batch, cache, rule)
    out_1ATD, lse_1AT = flex_kernel(query_1ATD.device.type)(
        query_1ATD,
        key_1GND,
        value_1GND,
        score_mod=None if rule.softcap is None else _capped(rule.softcap),
        block_mask=batch.memo[name],
        scale=rule.scale,
        enable_gqa=query_1ATD.shape[1] != key_1GND.shape[1],
        kernel_options={"BLOCK_N": cache.page_size} if query_1ATD.is_cuda else None,
        with_lse=rule.sinks is not None,
    )
    if rule.sinks is not None:  # they only take weight away from the others
        kept_1AT = torch.sigmoid(lse_1AT - rule.sinks.float().view(1, -1, 1))
        out_1ATD = out_1ATD * kept_1AT.unsqueeze(-1).to(out_1ATD.dtype)
    return out_1ATD


def _block_mask(batch: RaggedBatch, cache: PagedCache, rule: Rule) -> flex.BlockMask:
    """Which pages every stretch of rows reads, and which of their rows every row sees."""
    device, size = batch.rows_T.device, cache.page_size
    # Per request and page of the pool: which page of the request it is, or -1.
    places_RP = torch.full((len(batch.segments), cache.pages), -1, device=device)
    own: list[int] = []  # where the requests' pages stand there
    order: list[int] = []
    owners: list[int] = []
    blocks: list[dict[int, None]] = [{} for _ in range(-(-len(batch.rows_T) // _QUERY_BLOCK))]
    for r, (segment, offset) in enumerate(zip(batch.segments, batch.offsets, strict=False)):
        owners += [r] * segment.length
        if not segment.length:
            continue
        used = range(rule.begin(segment.start) // size, (segment.end - 1) // size + 1)
        pages = segment.table.pages[used.start : used.stop]
        own += [r * cache.pages + page for page in pages]
        order += used
        last = (offset + segment.length - 1) // _QUERY_BLOCK
        for block in blocks[offset // _QUERY_BLOCK : last + 1]:
            block.update(dict.fromkeys(pages))
    places_RP.view(-1)[torch.tensor(own, device=device)] = torch.tensor(order, device=device)
    widest = max(map(len, blocks))
    indices = [[*block, *[0] * (widest - len(block))] for block in blocks]
    counts = torch.tensor([len(block) for block in blocks], dtype=torch.int32, device=device)
    return flex.BlockMask.from_kv_blocks(
        counts.view(1, 1, -1),
        torch.tensor(indices, dtype=torch.int32, device=device).view(1, 1, len(blocks), widest),
        BLOCK_SIZE=(_QUERY_BLOCK, size),
        mask_mod=_visible(torch.tensor(owners, device=device), places_RP, batch, size, rule),
        seq_lengths=(len(owners), cache.rows),
        compute_q_blocks=False,
    )


def _visible(
    owners_T: Tensor, places_RP: Tensor, batch: RaggedBatch, page_size: int, rule: Rule
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Whether a row of the batch sees a row of the pool."""
    first, window, positions_T = rule.first, rule.window, batch.positions_T

    def visible(_batch: Tensor, _head: Tensor, query: Tensor, row: Tensor) -> Tensor:
        place = places_RP[owners_T[query], row // page_size]
        position, own = place * page_size + row % page_size, positions_T[query]
        seen = (place >= 0) & (position >= first) & (position <= own)
        return seen if window is None else seen & (position > own - window)

    if batch.trees is None:
        return visible
    roots_T, sees_TN, depths_TN = _nodes(batch, batch.trees)

    def visible_in_trees(_batch: Tensor, _head: Tensor, query: Tensor, row: Tensor) -> Tensor:
        place, root = places_RP[owners_T[query], row // page_size], roots_T[query]
        at, own = place * page_size + row % page_size, positions_T[query]
        node = (at - root - 1).clamp(0, sees_TN.shape[1] - 1)
        is_node = at > root
        position = torch.where(is_node, root + depths_TN[query, node], at)
        inside = at - root <= sees_TN.shape[1]
        seen = torch.where(is_node, inside & sees_TN[query, node], position <= own)
        seen &= (place >= 0) & (position >= first)
        return seen if window is None else seen & (position > own - window)

    return visible_in_trees


def _nodes(batch: RaggedBatch, trees: Sequence[Parents]) -> tuple[Tensor, Tensor, Tensor]:
    """Per row: the position of its request's root, the nodes that it sees, and their depths."""
    rows, most = batch.offsets[-1], max(1, *map(len, trees))
    roots_T = np.zeros(rows, dtype=np.int64)
    sees_TN, depths_TN = np.zeros((rows, most), dtype=bool), np.zeros((rows, most), dtype=np.int64)
    for segment, begin, parents in zip(batch.segments, batch.offsets, trees, strict=False):
        nodes, end = len(parents), begin + segment.length
        new = min(nodes, segment.length)
        roots_T[begin:end] = segment.end - 1 - nodes
        sees_TN[end - new : end, :nodes] = ancestors(parents)[nodes - new :]
        depths_TN[begin:end, :nodes] = depths(parents)
    device = batch.rows_T.device
    roots, sees, deep = (torch.from_numpy(x).to(device) for x in (roots_T, sees_TN, depths_TN))
    return roots, sees, deep


def _capped(softcap: float) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    def capped(score: Tensor, *_where: Tensor) -> Tensor:
        return torch.tanh(score / softcap) * softcap

    return capped


@once
def flex_kernel(device_type: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """Flex attention, compiled on an accelerator.

    It gives the output, and the logarithm of the sum of exponentials, or anything if not asked for.
    """

    def call(*tensors: Tensor, with_lse: bool, **options: Any) -> tuple[Tensor, Tensor]:
        attend: Any = flex.flex_attention
        if not with_lse:
            out: Tensor = attend(*tensors, **options)
            return out, out
        out, aux = attend(*tensors, return_aux=flex.AuxRequest(lse=True), **options)
        return out, aux.lse

    if device_type != "cpu":
        compiled: Callable[..., tuple[Tensor, Tensor]] = torch.compile(call, dynamic=True)
        return compiled

    def unfused(*tensors: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is unfused is known
            return call(*tensors, **options)

    return unfused


STRETCH = 128

Visible = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(batch, head, query, key) -> whether the query sees the key; they are indices of any shape."""


def range_mask(
    low_Q: Tensor,
    high_Q: Tensor,
    keys: int,
    visible: Visible,
    device: torch.device,
    *,
    others_SC: Tensor | None = None,
) -> BlockMask:
    """The mask of queries that see the keys low .. high - 1.

    Args:
        low_Q: the first key of each query's range, on the CPU.
        high_Q: the key behind its last.
        keys: how many there are.
        visible: which pairs count, for the stretches that are seen in part; its tables lie on the
            device.
        device: where attention is to run.
        others_SC: stretches that are read beside the ranges.
    """
    rows = low_Q.numel()
    index = torch.arange(-(-rows // STRETCH) * STRETCH).view(-1, STRETCH)
    low_S1, low_most_S1 = _extremes(low_Q[index.clamp(max=rows - 1)])
    high_least_S1, high_S1 = _extremes(high_Q[index.clamp(max=rows - 1)])
    begin_C = torch.arange(-(-keys // STRETCH)) * STRETCH
    end_C = begin_C + STRETCH
    read_SC = (begin_C < high_S1) & (end_C > low_S1)
    whole_SC = (begin_C >= low_most_S1) & (end_C <= high_least_S1) & (index[:, -1:] < rows)
    if others_SC is not None:
        read_SC = read_SC | others_SC
    counts, indices = _listed(read_SC & ~whole_SC, device)
    whole_counts, whole_indices = _listed(whole_SC, device)
    return BlockMask.from_kv_blocks(
        counts,
        indices,
        whole_counts,
        whole_indices,
        BLOCK_SIZE=STRETCH,
        mask_mod=visible,
        seq_lengths=(rows, keys),
    )


def _extremes(table: Tensor) -> tuple[Tensor, Tensor]:
    return table.amin(1, keepdim=True), table.amax(1, keepdim=True)


def _listed(chosen_SC: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """How many are chosen in each row, and which: [1, 1, S] and [1, 1, S, C], the chosen first."""
    indices = chosen_SC.int().argsort(dim=1, descending=True, stable=True).int()
    counts = chosen_SC.sum(1, dtype=torch.int32)
    return counts[None, None].to(device), indices[None, None].to(device)
