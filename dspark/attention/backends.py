"""Attention of ragged rows over cached keys and values.

Letters: T rows of a batch, A query heads, G key and value heads, D numbers per head, L rows and
S keys of one segment, B = A / G query heads that share a key head, R requests, K rows of a block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dspark.attention.padding import SHORT_ROWS, padded_attention, plan_padding
from dspark.attention.paged_cache import PagedCache
from dspark.attention.ragged_batch import RaggedBatch, tree_mask


class Rule(NamedTuple):
    """How scores become weights.

    Attributes:
        scale: multiplies the scores.
        window: number of keys that a row sees, its own included; None for all.
        sinks: one score per query head [A] that takes part in the softmax and adds no value
            (attention sinks of GPT-OSS).
        softcap: scores become `softcap * tanh(scores / softcap)` (Gemma 2).
        first: position of the first key that any row sees.
    """

    scale: float
    window: int | None = None
    sinks: Tensor | None = None
    softcap: float | None = None
    first: int = 0

    @property
    def explicit(self) -> bool:
        """Whether the fused kernel cannot express it."""
        return self.sinks is not None or self.softcap is not None

    def begin(self, position: int) -> int:
        """The first key that the row at a position sees."""
        if self.window is None:
            return self.first
        return max(self.first, position + 1 - self.window)


def ragged_attention(
    query_TAD: Tensor, cache: PagedCache, layer: int, batch: RaggedBatch, rule: Rule
) -> Tensor:
    """Causal attention of every row over its own request's cached rows.

    The row at position p sees the cached keys at positions first..p, and only those > p - window
    where the rule has a window. The keys of this batch must have been written before.

    Args:
        query_TAD: queries after position encoding, [T, A, key_dim].
        cache: keys and values.
        layer: index of the cache layer.
        batch: which rows belong to whom.
        rule: which keys a row sees, and how they are scored.

    Returns:
        [T, A, value_dim].
    """
    query_1ATD = query_TAD.transpose(0, 1).unsqueeze(0)
    return cached_attention(query_1ATD, cache, layer, batch, rule)[0].transpose(0, 1)


def cached_attention(
    query_1ATD: Tensor, cache: PagedCache, layer: int, batch: RaggedBatch, rule: Rule
) -> Tensor:
    """`ragged_attention` for queries laid out head by head; returns [1, A, T, value_dim]."""
    outs: list[Tensor] = []
    padding, together = None, 0
    if len(batch.segments) > 1 and not rule.explicit:
        padding = plan_padding(batch, rule.window, rule.first, query_1ATD, cache, layer)
    if padding is not None:
        together = padding.count
        query_1AHD = query_1ATD.narrow(2, 0, batch.offsets[together])
        outs.append(padded_attention(query_1AHD, cache, layer, padding, rule.scale))
    for index in range(together, len(batch.segments)):
        segment = batch.segments[index]
        if not segment.length:
            continue
        begin = rule.begin(segment.start)
        key_1GSD, value_1GSD = cache.heads(layer, segment.table, begin, segment.end)
        query_1ALD = query_1ATD
        if segment.length != query_1ATD.shape[2]:
            query_1ALD = query_1ATD.narrow(2, batch.offsets[index], segment.length)
        if batch.trees is not None and batch.trees[index]:
            mask_NS = _tree_mask(batch, index, begin, query_1ALD, key_1GSD, rule)
            outs.append(_masked(query_1ALD, key_1GSD, value_1GSD, mask_NS, rule))
        else:
            outs.append(_attend(query_1ALD, key_1GSD, value_1GSD, batch, rule))
    return outs[0] if len(outs) == 1 else torch.cat(outs, 2)


def fresh_attention(
    query_1ATD: Tensor, key_1GTD: Tensor, value_1GTD: Tensor, batch: RaggedBatch, rule: Rule
) -> Tensor:
    """Causal attention without a cache: the rows of a segment see only that segment.

    Args:
        query_1ATD: queries after position encoding, [1, A, T, key_dim].
        key_1GTD: keys, [1, G, T, key_dim].
        value_1GTD: values, [1, G, T, value_dim].
        batch: which rows belong to whom.
        rule: how scores become weights.

    Returns:
        [1, A, T, value_dim].
    """
    outs: list[Tensor] = []
    for index, segment in enumerate(batch.segments):
        own = (2, batch.offsets[index], segment.length)
        rows = (query_1ATD.narrow(*own), key_1GTD.narrow(*own), value_1GTD.narrow(*own))
        outs.append(_attend(*rows, batch, rule))
    return outs[0] if len(outs) == 1 else torch.cat(outs, 2)


def _attend(
    query_1ALD: Tensor, key_1GSD: Tensor, value_1GSD: Tensor, batch: RaggedBatch, rule: Rule
) -> Tensor:
    """Attention of one segment whose last row is the last key."""
    length, size = query_1ALD.shape[2], key_1GSD.shape[2]
    fits = rule.window is None or size <= rule.window
    if length == size and length > 1 and fits and not rule.explicit:
        return scaled_dot_product_attention(
            query_1ALD,
            key_1GSD,
            value_1GSD,
            is_causal=True,
            scale=rule.scale,
            enable_gqa=query_1ALD.shape[1] != key_1GSD.shape[1],
        )
    copies = 1 if rule.explicit else folded_heads(query_1ALD, key_1GSD)
    mask_NS = _causal_mask(batch, length, size, rule.window, query_1ALD, copies=copies)
    return _masked(query_1ALD, key_1GSD, value_1GSD, mask_NS, rule)


def _masked(
    query_1ALD: Tensor, key_1GSD: Tensor, value_1GSD: Tensor, mask_NS: Tensor | None, rule: Rule
) -> Tensor:
    if rule.explicit:
        return _explicit(query_1ALD, key_1GSD, value_1GSD, mask_NS, rule)
    return fused(query_1ALD, key_1GSD, value_1GSD, mask_NS, rule.scale)


def folded_heads(query_RALD: Tensor, key_RGSD: Tensor) -> int:
    """How many heads become rows in `fused`: keys are then read once, not per query head."""
    return 1 if query_RALD.shape[2] > SHORT_ROWS else query_RALD.shape[1] // key_RGSD.shape[1]


def fused(
    query_RALD: Tensor, key_RGSD: Tensor, value_RGSD: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """The fused kernel; [R, A, L, value_dim].

    Args:
        query_RALD: queries.
        key_RGSD: keys.
        value_RGSD: values.
        mask: additive, with one row per row after folding (see `folded_heads`) or one for all.
        scale: multiplies the scores.
    """
    requests, heads, length, _ = query_RALD.shape
    groups = key_RGSD.shape[1]
    copies = folded_heads(query_RALD, key_RGSD)
    if copies == 1:
        return scaled_dot_product_attention(
            query_RALD, key_RGSD, value_RGSD, mask, scale=scale, enable_gqa=heads > groups
        )
    query_RGND = query_RALD.reshape(requests, groups, copies * length, -1)
    out_RGND = scaled_dot_product_attention(query_RGND, key_RGSD, value_RGSD, mask, scale=scale)
    return out_RGND.reshape(requests, heads, length, -1)


def _causal_mask(
    batch: RaggedBatch, length: int, size: int, window: int | None, like: Tensor, *, copies: int
) -> Tensor | None:
    """Additive mask, repeated per folded head, built once for all layers of a step."""
    if length == 1:  # a single row sees every key of its slice
        return None
    name = (length, size, window, like.dtype, copies)
    mask_NS = batch.memo.get(name)
    if mask_NS is None:
        keys_S = torch.arange(size, device=like.device)
        rows_L1 = torch.arange(size - length, size, device=like.device)[:, None]
        hidden_LS = keys_S > rows_L1
        if window is not None:
            hidden_LS |= keys_S <= rows_L1 - window
        mask_LS = like.new_zeros(length, size).masked_fill_(hidden_LS, float("-inf"))
        mask_NS = batch.memo[name] = mask_LS.repeat(copies, 1)
    return mask_NS


def _tree_mask(
    batch: RaggedBatch,
    index: int,
    begin: int,
    query_1ALD: Tensor,
    key_1GSD: Tensor,
    rule: Rule,
) -> Tensor:
    """The mask of a segment that ends in a tree, repeated per folded head, built once a step."""
    copies = 1 if rule.explicit else folded_heads(query_1ALD, key_1GSD)
    name = ("tree", index, begin, rule.window, query_1ALD.dtype, copies)
    mask_NS: Tensor | None = batch.memo.get(name)
    if mask_NS is None:
        assert batch.trees is not None
        mask_LS = tree_mask(
            batch.segments[index], batch.trees[index], begin, rule.window, query_1ALD
        )
        mask_NS = batch.memo[name] = mask_LS.repeat(copies, 1)
    return mask_NS


def _explicit(
    query_1ALD: Tensor, key_1GSD: Tensor, value_1GSD: Tensor, mask_LS: Tensor | None, rule: Rule
) -> Tensor:
    """Attention written out, for scores that the fused kernel cannot express; softmax in fp32."""
    heads, length, groups = query_1ALD.shape[1], query_1ALD.shape[2], key_1GSD.shape[1]
    query_GBLD = query_1ALD.reshape(groups, heads // groups, length, -1)
    scores_GBLS = torch.matmul(query_GBLD, key_1GSD[0, :, None].mT).float() * rule.scale
    if rule.softcap is not None:
        scores_GBLS = torch.tanh(scores_GBLS / rule.softcap) * rule.softcap
    if mask_LS is not None:
        scores_GBLS = scores_GBLS + mask_LS
    if rule.sinks is not None:
        sinks_GBL1 = rule.sinks.float().view(groups, -1, 1, 1).expand(-1, -1, length, -1)
        scores_GBLS = torch.cat((scores_GBLS, sinks_GBL1), -1)
    weights_GBLS = scores_GBLS.softmax(-1)[..., : key_1GSD.shape[2]].to(value_1GSD.dtype)
    out_GBLD = torch.matmul(weights_GBLS, value_1GSD[0, :, None])
    return out_GBLD.reshape(1, heads, length, -1)
