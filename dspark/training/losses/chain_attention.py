"""Attention of the training-time test: causal over the context, plus each row's own chain.

Row i of pass t attends to the rows <= i of its sample in pass 0 and to row i of the passes 1 .. t.
Each pass adds one key per query, so those scores are t products per row and no mask of all passes
exists: a pass costs one causal attention. Samples are concatenated.

On a CPU, query rows are processed in tiles of one sample, and the backward pass recomputes the
weights from the logarithm of their sum (as Dao et al. 2022), so memory is linear in T. On an
accelerator the context part is flex attention, whose mask is the same in all passes.

Letters: A query heads, G key heads, N = A / G, T rows of all samples, D per head, J = t extra keys
of a row; L rows of a tile, P context rows that they attend to.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from dspark.attention.flex import flex_kernel, range_mask

_TILE_ROWS = 128  # in larger tiles more is computed that the mask throws away


def chain_attention(
    query_ATD: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    *,
    lengths: tuple[int, ...],
    scale: float,
) -> Tensor:
    """Mixed values [A, T, D] of the pass that comes last.

    Args:
        query_ATD: its queries.
        keys: keys [G, T, D] of the passes 0 .. t.
        values: values, likewise.
        lengths: rows of each sample.
        scale: multiplies the scores.
    """
    attend = flex_chain if query_ATD.is_cuda else tiled_chain
    return attend(query_ATD, keys, values, lengths=lengths, scale=scale)


def tiled_chain(
    query_ATD: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    *,
    lengths: tuple[int, ...],
    scale: float,
) -> Tensor:
    """`chain_attention` by dense products per tile."""
    query_GNTD = torch.unflatten(query_ATD, 0, (keys[0].shape[0], -1))
    own_key, own_value = (
        torch.stack(tuple(x[1:])) if len(x) > 1 else x[0].new_empty(0, *x[0].shape)
        for x in (keys, values)
    )
    mixed_GNTD: Tensor = _ChainAttention.apply(  # type: ignore[no-untyped-call]
        query_GNTD, keys[0], values[0], own_key, own_value, lengths, scale
    )
    return mixed_GNTD.flatten(0, 1)


def flex_chain(
    query_ATD: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    *,
    lengths: tuple[int, ...],
    scale: float,
) -> Tensor:
    """`chain_attention` by flex attention over the context, weighed against the own chain."""
    groups = keys[0].shape[0]
    context_1ATD, log_sum_1AT = flex_kernel(query_ATD.device.type)(
        query_ATD.unsqueeze(0),
        keys[0].unsqueeze(0),
        values[0].unsqueeze(0),
        block_mask=_causal_mask(lengths, query_ATD.device),
        scale=scale,
        enable_gqa=query_ATD.shape[0] != groups,
        with_lse=len(keys) > 1,
    )
    if len(keys) == 1:
        return context_1ATD.squeeze(0)
    query, context = (
        torch.unflatten(x, 0, (groups, -1)) for x in (query_ATD, context_1ATD.squeeze(0))
    )
    own = _own_scores(query * scale, keys[1:])
    log_context = torch.unflatten(log_sum_1AT, 1, (groups, -1)).squeeze(0).unsqueeze(-1)
    log_sum = torch.logaddexp(log_context, own.logsumexp(0))
    mixed = context * (log_context - log_sum).exp().to(context.dtype)
    for weight, row in zip((own - log_sum).exp().to(context.dtype), values[1:], strict=True):
        mixed = mixed + weight * row.unsqueeze(1)
    return mixed.flatten(0, 1)


@lru_cache(maxsize=8)  # of the passes of a step, and of steps whose samples are cut to one length
def _causal_mask(lengths: tuple[int, ...], device: torch.device) -> BlockMask:
    rows_T, sizes = torch.arange(sum(lengths)), torch.tensor(lengths)
    first_T = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    first = first_T.to(device)

    def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key >= first[query]) & (key <= query)

    return range_mask(first_T, rows_T + 1, rows_T.numel(), visible, device)


class _ChainAttention(torch.autograd.Function):
    """The same, with queries [G, N, T, D] and extra keys and values [J, G, T, D].

    Context and own chain are mixed apart and then weighed by their sums of exponentials.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        own_key: Tensor,
        own_value: Tensor,
        lengths: tuple[int, ...],
        scale: float,
    ) -> Tensor:
        scaled, later = query * scale, _later(query.device)
        mixed = torch.empty_like(query)
        peak = query.new_empty((*query.shape[:-1], 1), dtype=_wide(query.dtype))
        total = torch.empty_like(peak)
        for rows, past in _tiles(lengths):
            weights = _scores(scaled, key, rows, past, later)
            tile_peak = weights.amax(-1, keepdim=True)
            weights.sub_(tile_peak).exp_()
            peak[..., rows, :] = tile_peak
            total[..., rows, :] = weights.sum(-1, keepdim=True)
            mixed[..., rows, :] = _over_context(weights.to(value.dtype), value[:, past])
        log_sum = peak + total.log()
        if own_key.shape[0]:
            own = _own_scores(scaled, own_key)
            log_sum = torch.logaddexp(log_sum, own.logsumexp(0))
        mixed *= (peak - log_sum).exp().to(mixed.dtype)
        if own_key.shape[0]:
            for weight, row in zip(own.sub_(log_sum).exp_(), own_value, strict=True):
                mixed += weight.to(mixed.dtype) * row.unsqueeze(1)
        ctx.save_for_backward(query, key, value, own_key, own_value, mixed, log_sum)
        ctx.lengths, ctx.scale = lengths, scale
        return mixed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, own_key, own_value, mixed, log_sum = ctx.saved_tensors
        d_query, d_key, d_value = (torch.zeros_like(x) for x in (query, key, value))
        d_own_key, d_own_value = torch.empty_like(own_key), torch.empty_like(own_value)
        scaled, later = query * ctx.scale, _later(query.device)
        lost = (grad * mixed).sum(-1, keepdim=True)
        for rows, past in _tiles(ctx.lengths):
            d_out = grad[..., rows, :]
            weights = _scores(scaled, key, rows, past, later).sub_(log_sum[..., rows, :]).exp_()
            d_value[:, past] += _into_context(weights.to(grad.dtype), d_out)
            d_weights = _over_context(d_out, value[:, past].mT)
            d_scores = weights.mul_(d_weights.sub_(lost[..., rows, :])).to(grad.dtype)
            d_query[..., rows, :] = _over_context(d_scores, key[:, past])
            d_key[:, past] += _into_context(d_scores, scaled[..., rows, :])
        if own_key.shape[0]:
            own = _own_scores(scaled, own_key).sub_(log_sum).exp_()
            for j, weight in enumerate(own.to(grad.dtype)):
                d_own_value[j] = (weight * grad).sum(1)
                d_weight = (grad * own_value[j].unsqueeze(1)).sum(-1, keepdim=True)
                d_score = weight * (d_weight - lost)
                d_query += d_score * own_key[j].unsqueeze(1)
                d_own_key[j] = (d_score * scaled).sum(1)
        d_query *= ctx.scale
        return d_query, d_key, d_value, d_own_key, d_own_value, None, None


def _tiles(lengths: tuple[int, ...]) -> Iterator[tuple[slice, slice]]:
    """Rows of each tile, and the context rows that any of them sees."""
    first = 0
    for length in lengths:
        for start in range(first, first + length, _TILE_ROWS):
            stop = min(start + _TILE_ROWS, first + length)
            yield slice(start, stop), slice(first, stop)
        first += length


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _later(device: torch.device) -> Tensor:
    """True where a row of a tile may not look at another."""
    return torch.ones(_TILE_ROWS, _TILE_ROWS, dtype=torch.bool, device=device).triu_(1)


def _scores(scaled: Tensor, key: Tensor, rows: slice, past: slice, later: Tensor) -> Tensor:
    """Scores [G, N, L, P] over the context, minus infinity where a row may not look."""
    scores = _over_context(scaled[..., rows, :], key[:, past].mT)
    scores = scores.to(_wide(scores.dtype))
    size = rows.stop - rows.start
    scores[..., -size:].masked_fill_(later[:size, :size], float("-inf"))
    return scores


def _own_scores(scaled: Tensor, own_key: Iterable[Tensor]) -> Tensor:
    """Scores [J, G, N, T, 1] over the rows' own chains."""
    own = [(scaled * key.unsqueeze(1)).sum(-1, keepdim=True) for key in own_key]
    return torch.stack(own).to(_wide(scaled.dtype))


def _over_context(rows: Tensor, table: Tensor) -> Tensor:
    """[G, N, L, x] times [G, x, y]: the heads of a group are rows of one product."""
    return torch.unflatten(rows.flatten(1, 2) @ table, 1, rows.shape[1:3])


def _into_context(weights: Tensor, rows: Tensor) -> Tensor:
    """[G, P, D]: what each context row gets from all rows [G, N, L, D] of a tile."""
    return weights.flatten(1, 2).mT @ rows.flatten(1, 2)
