"""Attention of the training-time test: causal over the context, and each row its own chain.

Row i of pass t sees the rows <= i of pass 0 and row i of the passes 1 .. t. The extra keys are one
per pass for each query, so their scores are t products per row and no [S, t S] mask exists: a pass
costs one causal attention. Query rows are worked on in tiles, and the backward pass computes the
weights again from the logarithm of their sum (as Dao et al. 2022), so memory is linear in S.
Letters: B sequences, A query heads, G key heads, N = A / G, S rows, D per head, J = t extra keys
of a row; L rows of a tile, P context rows that they see.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

_TILE_ROWS = 128


def chain_attention(
    query_BASD: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], *, scale: float
) -> Tensor:
    """Mixed values [B, A, S, D] of the pass that comes last.

    Args:
        query_BASD: its queries.
        keys: keys [B, G, S, D] of the passes 0 .. t.
        values: values, likewise.
        scale: multiplies the scores.
    """
    groups = keys[0].shape[1]
    if len(keys) == 1:
        return scaled_dot_product_attention(
            query_BASD,
            keys[0],
            values[0],
            is_causal=True,
            scale=scale,
            enable_gqa=query_BASD.shape[1] != groups,
        )
    query_BGNSD = torch.unflatten(query_BASD, 1, (groups, -1))
    own_key, own_value = torch.stack(tuple(keys[1:])), torch.stack(tuple(values[1:]))
    mixed_BGNSD: Tensor = _ChainAttention.apply(  # type: ignore[no-untyped-call]
        query_BGNSD, keys[0], values[0], own_key, own_value, scale
    )
    return mixed_BGNSD.flatten(1, 2)


class _ChainAttention(torch.autograd.Function):
    """The same for J >= 1, with queries [B, G, N, S, D] and extra keys [J, B, G, S, D]."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        own_key: Tensor,
        own_value: Tensor,
        scale: float,
    ) -> Tensor:
        mixed = torch.empty_like(query)
        log_sum = query.new_empty(query.shape[:-1], dtype=_wide(query.dtype))
        for rows, past in _tiles(query.shape[3]):
            scores = _scores(query, key, rows, past, scale)
            own = _own_scores(query, own_key, rows, scale)
            peak = torch.maximum(scores.amax(-1, keepdim=True), own.amax(-1, keepdim=True))
            weights, own = scores.sub_(peak).exp_(), own.sub_(peak).exp_()
            total = weights.sum(-1, keepdim=True) + own.sum(-1, keepdim=True)
            log_sum[..., rows] = (peak + total.log()).squeeze(-1)
            out = _over_context(weights.to(value.dtype), value[:, :, past])
            own = own.to(value.dtype)
            for j in range(own.shape[-1]):
                out = out + own[..., j, None] * own_value[j, :, :, None, rows]
            mixed[..., rows, :] = out / total
        ctx.save_for_backward(query, key, value, own_key, own_value, mixed, log_sum)
        ctx.scale = scale
        return mixed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, own_key, own_value, mixed, log_sum = ctx.saved_tensors
        d_query, d_key, d_value = (torch.zeros_like(x) for x in (query, key, value))
        d_own_key, d_own_value = torch.zeros_like(own_key), torch.zeros_like(own_value)
        for rows, past in _tiles(query.shape[3]):
            here, d_out = query[..., rows, :], grad[..., rows, :]
            lost = (d_out * mixed[..., rows, :]).sum(-1, keepdim=True)
            tile_log = log_sum[..., rows].unsqueeze(-1)
            weights = _scores(query, key, rows, past, ctx.scale).sub_(tile_log).exp_()
            d_value[:, :, past] += _into_context(weights.to(grad.dtype), d_out)
            d_weights = _over_context(d_out, value[:, :, past].mT)
            d_scores = (weights * (d_weights - lost)).mul_(ctx.scale).to(grad.dtype)
            d_here = _over_context(d_scores, key[:, :, past])
            d_key[:, :, past] += _into_context(d_scores, here)
            own = _own_scores(query, own_key, rows, ctx.scale).sub_(tile_log).exp_()
            for j in range(own.shape[-1]):
                weight = own[..., j, None]
                d_own_value[j, :, :, rows] = (weight * d_out).sum(2)
                d_weight = (d_out * own_value[j, :, :, None, rows]).sum(-1, keepdim=True)
                d_score = (weight * (d_weight - lost) * ctx.scale).to(grad.dtype)
                d_here = d_here + d_score * own_key[j, :, :, None, rows]
                d_own_key[j, :, :, rows] = (d_score * here).sum(2)
            d_query[..., rows, :] = d_here
        return d_query, d_key, d_value, d_own_key, d_own_value, None


def _tiles(length: int) -> Iterator[tuple[slice, slice]]:
    """Rows of each tile, and the context rows that any of them sees."""
    for start in range(0, length, _TILE_ROWS):
        stop = min(start + _TILE_ROWS, length)
        yield slice(start, stop), slice(0, stop)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _scores(query: Tensor, key: Tensor, rows: slice, past: slice, scale: float) -> Tensor:
    """Scores [B, G, N, L, P] over the context, minus infinity where a row may not look."""
    scores = _over_context(query[..., rows, :] * scale, key[:, :, past].mT)
    scores = scores.to(_wide(scores.dtype))
    size = rows.stop - rows.start
    later = torch.ones(size, size, dtype=torch.bool, device=query.device).triu_(1)
    scores[..., rows].masked_fill_(later, float("-inf"))
    return scores


def _own_scores(query: Tensor, own_key: Tensor, rows: slice, scale: float) -> Tensor:
    """Scores [B, G, N, L, J] over the rows' own chains."""
    here = query[..., rows, :] * scale
    own = [(here * key[:, :, None, rows]).sum(-1) for key in own_key]
    return torch.stack(own, dim=-1).to(_wide(query.dtype))


def _over_context(rows: Tensor, table: Tensor) -> Tensor:
    """[B, G, N, L, x] times [B, G, x, y]: the heads of a group are rows of one product."""
    return torch.unflatten(rows.flatten(2, 3) @ table, 2, rows.shape[2:4])


def _into_context(weights: Tensor, rows: Tensor) -> Tensor:
    """[B, G, P, D]: what each context row gets from all rows [B, G, N, L, D] of a tile."""
    return weights.flatten(2, 3).mT @ rows.flatten(2, 3)
