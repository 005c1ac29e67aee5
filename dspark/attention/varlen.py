"""Attention over pages by torch's variable-length attention with a block table.

The kernel reads keys and values where they lie, page by page, and masks nothing that it need not.
It knows no attention sinks, no soft-capped scores, no first key and no draft trees; these are
attended to by `backends.cached_attention`, or `invariant_attention` where keys are not split.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from dspark.attention.backends import Rule, cached_attention
from dspark.attention.invariant import invariant_attention
from dspark.attention.paged_cache import PagedCache
from dspark.attention.ragged_batch import RaggedBatch, hand_over

MEMO = ("varlen",)
"""The name of a batch's `VarlenLayout` in its memo."""


@dataclass(frozen=True)
class VarlenLayout:
    """What the kernel reads of a batch, int32: R requests of up to P pages.

    Attributes:
        starts_R1: first row of each request, and the end.
        used_R: keys of each request.
        pages_RP: its pages, any behind its last.
        most_rows: rows of the longest segment, or more.
        most_keys: keys of the longest request, or more.
    """

    starts_R1: Tensor
    used_R: Tensor
    pages_RP: Tensor
    most_rows: int
    most_keys: int

    @classmethod
    def of(cls, batch: RaggedBatch) -> VarlenLayout:
        """The layout of a batch of at least one request."""
        packed = pack_layout(batch, requests=len(batch.segments))
        return cls(
            packed[:, 0].contiguous(),
            packed[:-1, 1].contiguous(),
            packed[:-1, 2:].contiguous(),
            max(segment.length for segment in batch.segments),
            batch.longest,
        )


def pack_layout(batch: RaggedBatch, *, requests: int) -> Tensor:
    """First row, keys and pages of each request of a batch, int32 [requests + 1, 2 + P].

    Args:
        batch: of at least one request.
        requests: how many to speak of, at least those of the batch; any behind these are empty.
    """
    segments, size = batch.segments, batch.segments[0].table.page_size
    width = -(-batch.longest // size)
    pages = [list(s.table.pages[:width]) for s in segments]
    rows = [
        [offset, segment.end, *own, *[0] * (width - len(own))]
        for offset, segment, own in zip(batch.offsets, segments, pages, strict=False)
    ]
    empty = [batch.offsets[-1], 0, *[0] * width]
    rows += [empty] * (requests + 1 - len(segments))
    return hand_over(rows, batch.rows_T.device, torch.int32)


@dataclass(frozen=True)
class VarlenAttention:
    """`backends.cached_attention` by torch's variable-length attention.

    Attributes:
        num_splits: into how many parts the keys of a request are split; 1 makes a request's
            result independent of what else is in the batch, None lets the kernel choose.
    """

    num_splits: int | None = None

    def __call__(
        self, query_1ATD: Tensor, cache: PagedCache, layer: int, batch: RaggedBatch, rule: Rule
    ) -> Tensor:
        """Attention of every row over its own request's pages; [1, A, T, value_dim]."""
        if rule.explicit or rule.first > 0 or batch.trees is not None:
            other = cached_attention if self.num_splits is None else invariant_attention
            return other(query_1ATD, cache, layer, batch, rule)
        if MEMO not in batch.memo:
            batch.memo[MEMO] = VarlenLayout.of(batch)
        layout: VarlenLayout = batch.memo[MEMO]
        key_PSGD, value_PSGD = cache.by_page(layer)
        options: dict[str, Any] = {}
        if self.num_splits is not None:
            options["num_splits"] = self.num_splits
        out_TAD = varlen_attn(
            query_1ATD[0].transpose(0, 1).contiguous(),
            key_PSGD,
            value_PSGD,
            layout.starts_R1,
            None,
            layout.most_rows,
            layout.most_keys,
            scale=rule.scale,
            # A window counts the row's own key, the kernel's left side does not.
            window_size=(-1 if rule.window is None else rule.window - 1, 0),
            enable_gqa=query_1ATD.shape[1] != key_PSGD.shape[2],
            seqused_k=layout.used_R,
            block_table=layout.pages_RP,
            **options,
        )
        assert isinstance(out_TAD, Tensor)  # nothing beside it was asked for
        return out_TAD.transpose(0, 1).unsqueeze(0)


def missing_from_torch(num_splits: int | None) -> str | None:
    """Why the installed torch has no such kernel, as the rest of a sentence; None if it may.

    Args:
        num_splits: as in `VarlenAttention`.
    """
    needed = {"scale", "window_size", "enable_gqa", "seqused_k", "block_table"}
    if num_splits is not None:
        needed.add("num_splits")
    missing = sorted(needed - inspect.signature(varlen_attn).parameters.keys())
    if not missing:
        return None
    return f"the variable-length attention of torch {torch.__version__} has no {', '.join(missing)}"
