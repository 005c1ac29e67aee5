"""Attention whose result for a row depends on that row's own keys alone, to the last bit.

Kernels choose their blocks by the shapes of a call, so a row's sums are added up in another order
when it stands beside other rows, or when keys that it does not even see follow its own. Here the
shapes of the call in which a row is computed follow from its position alone: a fixed number of
query rows, and the key blocks from the first that it sees to its own.

The letters are those of `backends`; N = B * QUERY_ROWS folded query rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dspark.attention.backends import Rule
from dspark.attention.paged_cache import BlockTable, PagedCache
from dspark.attention.ragged_batch import RaggedBatch

# Query rows of a call: those of a round of speculation fit.
QUERY_ROWS = 16
# Keys are taken in blocks of this many, counted from position 0.
KEY_BLOCK = 64


@dataclass(frozen=True)
class _Group:
    """Up to QUERY_ROWS neighbouring rows of one request that see the same key blocks.

    Attributes:
        row: first row in the batch.
        position: its position.
        count: number of rows.
        table: pages of the request.
        begin: position of the first key of the first block.
        end: position after the last block.
        limit: number of keys that are there.
    """

    row: int
    position: int
    count: int
    table: BlockTable
    begin: int
    end: int
    limit: int


@dataclass(frozen=True)
class _Call:
    """Groups of equally many keys that one call of the kernel works on: R groups, S keys.

    Attributes:
        rows_RQ: batch row of each query row; padding takes the first.
        keys_RS: pool row of each key; those that are not there are replaced by the last that is.
        mask_R1NS: additive mask.
        real_M: which of the R * QUERY_ROWS query rows are real, in order.
        targets_M: batch row of each of these.
    """

    rows_RQ: Tensor
    keys_RS: Tensor
    mask_R1NS: Tensor
    real_M: Tensor
    targets_M: Tensor


def invariant_attention(
    query_1ATD: Tensor, cache: PagedCache, layer: int, batch: RaggedBatch, rule: Rule
) -> Tensor:
    """Causal attention of every row over its own request's rows, as `cached_attention`.

    Args:
        query_1ATD: queries after position encoding, [1, A, T, key_dim].
        cache: keys and values; those of this batch must have been written before.
        layer: index of the cache layer.
        batch: which rows belong to whom.
        rule: how scores become weights.

    Returns:
        [1, A, T, value_dim].
    """
    shape = cache.shapes[layer]
    folded = query_1ATD.shape[1] // shape.kv_heads
    query_TAD = query_1ATD[0].transpose(0, 1)
    out_TAD = query_TAD.new_zeros(*query_TAD.shape[:2], shape.value_dim)
    for call in _calls(batch, rule, query_TAD, folded):
        groups = len(call.keys_RS)
        key_RGSD, value_RGSD = cache.gather(layer, call.keys_RS)
        query_RQAD = query_TAD[call.rows_RQ]
        query_RGND = query_RQAD.transpose(1, 2).reshape(
            groups, shape.kv_heads, folded * QUERY_ROWS, -1
        )
        if not rule.explicit:
            out_RGND = scaled_dot_product_attention(
                query_RGND, key_RGSD, value_RGSD, call.mask_R1NS, scale=rule.scale
            )
        else:
            out_RGND = _written_out(query_RGND, key_RGSD, value_RGSD, call.mask_R1NS, rule)
        out_RAQD = out_RGND.reshape(groups, -1, QUERY_ROWS, shape.value_dim)
        out_XAD = out_RAQD.transpose(1, 2).flatten(0, 1)
        out_TAD[call.targets_M] = out_XAD[call.real_M]
    return out_TAD.transpose(0, 1).unsqueeze(0)


def _written_out(
    query_RGND: Tensor, key_RGSD: Tensor, value_RGSD: Tensor, mask_R1NS: Tensor, rule: Rule
) -> Tensor:
    """Attention for scores that the fused kernel cannot express; softmax in fp32."""
    scores_RGNS = torch.matmul(query_RGND, key_RGSD.mT).float() * rule.scale
    if rule.softcap is not None:
        scores_RGNS = torch.tanh(scores_RGNS / rule.softcap) * rule.softcap
    scores_RGNS = scores_RGNS + mask_R1NS
    if rule.sinks is not None:
        groups, kv_heads, rows, _ = scores_RGNS.shape
        sinks_GB1 = rule.sinks.float().view(kv_heads, -1, 1)
        sinks_GN1 = sinks_GB1.repeat_interleave(QUERY_ROWS, 1)
        sinks_RGN1 = sinks_GN1.expand(groups, kv_heads, rows, 1)
        scores_RGNS = torch.cat((scores_RGNS, sinks_RGN1), -1)
    weights_RGNS = scores_RGNS.softmax(-1)[..., : key_RGSD.shape[2]].to(value_RGSD.dtype)
    return torch.matmul(weights_RGNS, value_RGSD)


def _calls(batch: RaggedBatch, rule: Rule, like: Tensor, folded: int) -> list[_Call]:
    """The calls of a batch, laid out once for all layers of a step."""
    name = ("invariant", rule.window, rule.first, like.dtype, folded)
    if name not in batch.memo:
        together: dict[object, list[_Group]] = {}
        # Only the fused kernel of a CPU is known to work on each entry of a batch by itself.
        shareable = not rule.explicit and like.device.type == "cpu"
        for group in _groups(batch, rule):
            size = group.end - group.begin
            together.setdefault(size if shareable else group, []).append(group)
        batch.memo[name] = [_lay_out(groups, rule, like, folded) for groups in together.values()]
    calls: list[_Call] = batch.memo[name]
    return calls


def _groups(batch: RaggedBatch, rule: Rule) -> Iterator[_Group]:
    """Cut every segment where the key blocks that its rows see change."""
    for segment, offset in zip(batch.segments, batch.offsets, strict=False):
        position = segment.start
        while position < segment.end:
            blocks = _key_blocks(position, rule)
            most = min(segment.end, position + QUERY_ROWS)
            end = position + 1
            while end < most and _key_blocks(end, rule) == blocks:
                end += 1
            yield _Group(
                row=offset + position - segment.start,
                position=position,
                count=end - position,
                table=segment.table,
                begin=blocks[0],
                end=blocks[1],
                limit=min(segment.end, blocks[1]),
            )
            position = end


def _key_blocks(position: int, rule: Rule) -> tuple[int, int]:
    """Where the key blocks begin and end that the row of a position sees."""
    first = rule.begin(position)
    return first // KEY_BLOCK * KEY_BLOCK, (position // KEY_BLOCK + 1) * KEY_BLOCK


def _lay_out(groups: list[_Group], rule: Rule, like: Tensor, folded: int) -> _Call:
    rows: list[list[int]] = []
    real: list[int] = []
    positions: list[list[int]] = []
    keys: list[list[int]] = []
    for index, group in enumerate(groups):
        spare = QUERY_ROWS - group.count
        own = range(group.row, group.row + group.count)
        rows.append([*own, *[group.row] * spare])
        real += range(index * QUERY_ROWS, index * QUERY_ROWS + group.count)
        last = group.position + group.count
        positions.append([*range(group.position, last), *[group.position] * spare])
        there = group.table.rows(group.begin, group.limit)
        keys.append([*there, *[there[-1]] * (group.end - group.limit)])
    begins_R1 = torch.tensor([[group.begin] for group in groups])
    places_RS = begins_R1 + torch.arange(groups[0].end - groups[0].begin)
    positions_RQ1 = torch.tensor(positions).unsqueeze(-1)
    hidden_RQS = places_RS.unsqueeze(1) > positions_RQ1
    if rule.first > 0:
        hidden_RQS |= places_RS.unsqueeze(1) < rule.first
    if rule.window is not None:
        hidden_RQS |= places_RS.unsqueeze(1) <= positions_RQ1 - rule.window
    mask_RQS = torch.zeros(hidden_RQS.shape).masked_fill_(hidden_RQS, float("-inf"))
    device = like.device
    rows_RQ = torch.tensor(rows)
    real_M = torch.tensor(real)
    return _Call(
        rows_RQ=rows_RQ.to(device),
        keys_RS=torch.tensor(keys, device=device),
        mask_R1NS=mask_RQS.to(device, like.dtype).repeat(1, folded, 1).unsqueeze(1),
        real_M=real_M.to(device),
        targets_M=rows_RQ.flatten()[real_M].to(device),
    )
