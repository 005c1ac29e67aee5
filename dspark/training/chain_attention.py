"""Attention of the training-time test: causal over the context, and each row its own chain.

Row i of pass t sees the rows <= i of its own sample in pass 0 and row i of the passes 1 .. t. The
extra keys are one per pass for each query, so their scores are t products per row and no mask of
all passes exists: a pass costs one causal attention. Samples lie one after the other; query rows
are worked on in tiles of one sample, and the backward pass computes the weights again from the
logarithm of their sum (as Dao et al. 2022), so memory is linear in T.
Letters: A query heads, G key heads, N = A / G, T rows of all samples, D per head, J = t extra keys
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
    groups = keys[0].shape[0]
    if len(keys) == 1:
        all_rows = (query_ATD, keys[0], values[0])
        parts = (torch.split(x.unsqueeze(0), list(lengths), dim=2) for x in all_rows)
        shared = query_ATD.shape[0] != groups
        mixed = [
            scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=scale, enable_gqa=shared
            )
            for query, key, value in zip(*parts, strict=True)
        ]
        return torch.cat(mixed, dim=2).squeeze(0)
    query_GNTD = torch.unflatten(query_ATD, 0, (groups, -1))
    own_key, own_value = torch.stack(tuple(keys[1:])), torch.stack(tuple(values[1:]))
    mixed_GNTD: Tensor = _ChainAttention.apply(  # type: ignore[no-untyped-call]
        query_GNTD, keys[0], values[0], own_key, own_value, lengths, scale
    )
    return mixed_GNTD.flatten(0, 1)


class _ChainAttention(torch.autograd.Function):
    """The same for J >= 1, with queries [G, N, T, D] and extra keys [J, G, T, D]."""

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
        mixed = torch.empty_like(query)
        log_sum = query.new_empty(query.shape[:-1], dtype=_wide(query.dtype))
        for rows, past in _tiles(lengths):
            scores = _scores(query, key, rows, past, scale)
            own = _own_scores(query, own_key, rows, scale)
            peak = torch.maximum(scores.amax(-1, keepdim=True), own.amax(-1, keepdim=True))
            weights, own = scores.sub_(peak).exp_(), own.sub_(peak).exp_()
            total = weights.sum(-1, keepdim=True) + own.sum(-1, keepdim=True)
            log_sum[..., rows] = (peak + total.log()).squeeze(-1)
            out = _over_context(weights.to(value.dtype), value[:, past])
            own = own.to(value.dtype)
            for j in range(own.shape[-1]):
                out = out + own[..., j, None] * own_value[j, :, None, rows]
            mixed[..., rows, :] = out / total
        ctx.save_for_backward(query, key, value, own_key, own_value, mixed, log_sum)
        ctx.lengths, ctx.scale = lengths, scale
        return mixed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, own_key, own_value, mixed, log_sum = ctx.saved_tensors
        d_query, d_key, d_value = (torch.zeros_like(x) for x in (query, key, value))
        d_own_key, d_own_value = torch.zeros_like(own_key), torch.zeros_like(own_value)
        for rows, past in _tiles(ctx.lengths):
            here, d_out = query[..., rows, :], grad[..., rows, :]
            lost = (d_out * mixed[..., rows, :]).sum(-1, keepdim=True)
            tile_log = log_sum[..., rows].unsqueeze(-1)
            weights = _scores(query, key, rows, past, ctx.scale).sub_(tile_log).exp_()
            d_value[:, past] += _into_context(weights.to(grad.dtype), d_out)
            d_weights = _over_context(d_out, value[:, past].mT)
            d_scores = (weights * (d_weights - lost)).mul_(ctx.scale).to(grad.dtype)
            d_here = _over_context(d_scores, key[:, past])
            d_key[:, past] += _into_context(d_scores, here)
            own = _own_scores(query, own_key, rows, ctx.scale).sub_(tile_log).exp_()
            for j in range(own.shape[-1]):
                weight = own[..., j, None]
                d_own_value[j, :, rows] = (weight * d_out).sum(1)
                d_weight = (d_out * own_value[j, :, None, rows]).sum(-1, keepdim=True)
                d_score = (weight * (d_weight - lost) * ctx.scale).to(grad.dtype)
                d_here = d_here + d_score * own_key[j, :, None, rows]
                d_own_key[j, :, rows] = (d_score * here).sum(1)
            d_query[..., rows, :] = d_here
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


def _scores(query: Tensor, key: Tensor, rows: slice, past: slice, scale: float) -> Tensor:
    """Scores [G, N, L, P] over the context, minus infinity where a row may not look."""
    scores = _over_context(query[..., rows, :] * scale, key[:, past].mT)
    scores = scores.to(_wide(scores.dtype))
    size = rows.stop - rows.start
    later = torch.ones(size, size, dtype=torch.bool, device=query.device).triu_(1)
    scores[..., -size:].masked_fill_(later, float("-inf"))
    return scores


def _own_scores(query: Tensor, own_key: Tensor, rows: slice, scale: float) -> Tensor:
    """Scores [G, N, L, J] over the rows' own chains."""
    here = query[..., rows, :] * scale
    own = [(here * key[:, None, rows]).sum(-1) for key in own_key]
    return torch.stack(own, dim=-1).to(_wide(query.dtype))


def _over_context(rows: Tensor, table: Tensor) -> Tensor:
    """[G, N, L, x] times [G, x, y]: the heads of a group are rows of one product."""
    return torch.unflatten(rows.flatten(1, 2) @ table, 1, rows.shape[1:3])


def _into_context(weights: Tensor, rows: Tensor) -> Tensor:
    """[G, P, D]: what each context row gets from all rows [G, N, L, D] of a tile."""
    return weights.flatten(1, 2).mT @ rows.flatten(1, 2)
