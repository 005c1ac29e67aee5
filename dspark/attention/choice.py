"""Which implementation attends over the pages: the one switch, and the reasons against each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from dspark.attention.backends import Rule, cached_attention
from dspark.attention.flex import flex_attention
from dspark.attention.invariant import invariant_attention
from dspark.attention.paged_cache import PAGE_SIZE, BlockTable, CacheShape, PagedCache
from dspark.attention.ragged_batch import RaggedBatch
from dspark.attention.varlen import VarlenAttention, missing_from_torch
from dspark.errors import UsageError, first_line

Attend = Callable[[Tensor, PagedCache, int, RaggedBatch, Rule], Tensor]
"""(query [1, A, T, D], cache, layer, batch, rule) -> [1, A, T, value_dim]"""

AttentionName = Literal["auto", "plain", "flex", "varlen"]
ATTENTIONS: tuple[AttentionName, ...] = get_args(AttentionName)
# What a trial may differ from plain attention, relative to it.
_TOLERANCE = 2e-2


@dataclass(frozen=True)
class AttentionBackend:
    """An implementation by name: plain, flex or varlen."""

    name: str
    attend: Attend


PLAIN = AttentionBackend("plain", cached_attention)


def choose_attention(
    name: AttentionName,
    shapes: Sequence[CacheShape],
    *,
    dtype: torch.dtype,
    device: torch.device,
    batch_invariant: bool = False,
) -> AttentionBackend:
    """The implementation asked for, tried out on a few rows.

    Args:
        name: `plain` runs everywhere; `varlen` is torch's kernel with a block table, `flex` torch's
            flex attention; `auto` takes on a GPU the first of varlen, flex and plain that runs
            there, and elsewhere plain.
        shapes: what the layers cache.
        dtype: of queries, keys and values.
        device: where they are.
        batch_invariant: whether a row's result must not depend on what else is in a batch:
            `plain` then is `invariant_attention`, `varlen` splits no keys, and there is no `flex`.

    Raises:
        UsageError: there is no such implementation, or it cannot run here or in this mode.
    """
    if name not in ATTENTIONS:
        raise UsageError(f"The attention is {name!r}, but must be one of {', '.join(ATTENTIONS)}.")
    plain = AttentionBackend("plain", invariant_attention) if batch_invariant else PLAIN
    if name == "plain" or (name == "auto" and device.type != "cuda"):
        return plain
    num_splits = 1 if batch_invariant else None
    candidates = {
        "varlen": AttentionBackend("varlen", VarlenAttention(num_splits)),
        "flex": AttentionBackend("flex", flex_attention),
    }
    if batch_invariant:
        del candidates["flex"]
        if name == "flex":
            raise UsageError(
                "The attention 'flex' cannot be batch-invariant; use 'auto', 'plain' or 'varlen'."
            )
    for candidate in candidates.values() if name == "auto" else (candidates[name],):
        reason = _reason_against(candidate, shapes, dtype, device, num_splits)
        if reason is None:
            return candidate
        if name != "auto":
            raise UsageError(
                f"The attention {name!r} cannot run on {device}: {reason}; use 'auto' or 'plain'."
            )
    return plain


def _reason_against(
    backend: AttentionBackend,
    shapes: Sequence[CacheShape],
    dtype: torch.dtype,
    device: torch.device,
    num_splits: int | None,
) -> str | None:
    if backend.name == "varlen":
        if device.type != "cuda":
            return "torch's variable-length attention needs a CUDA device"
        if reason := missing_from_torch(num_splits):
            return reason
    try:
        distances = [d for shape in set(shapes) for d in _trial(backend, shape, dtype, device)]
    except Exception as error:  # whatever a kernel raises, it does not run here
        return f"a trial failed ({first_line(error)})"
    for distance in distances:
        if not distance <= _TOLERANCE:  # nor is it NaN
            return f"a trial differs from plain attention by {distance:.2g}"
    return None


@torch.inference_mode()
def _trial(
    backend: AttentionBackend, shape: CacheShape, dtype: torch.dtype, device: torch.device
) -> list[float]:
    """Relative distances to plain attention over two requests of scattered pages."""
    generator = torch.Generator().manual_seed(0)

    def noise(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator).to(device, dtype)

    cache = PagedCache([shape], 6, PAGE_SIZE, dtype, device)
    everywhere_N = torch.arange(cache.rows, device=device)
    keys_NGD = noise(cache.rows, shape.kv_heads, shape.key_dim)
    cache.write(0, everywhere_N, keys_NGD, noise(cache.rows, shape.kv_heads, shape.value_dim))
    first, second = BlockTable((4, 1, 2)), BlockTable((5, 0))
    parts = [(first, PAGE_SIZE + 3, range(4)), (second, PAGE_SIZE - 2, range(1))]
    distances: list[float] = []
    for window in (None, 7):
        rule = Rule(shape.key_dim**-0.5, window)
        batch = RaggedBatch.build(parts, device)
        query_1ATD = noise(1, 2 * shape.kv_heads, len(batch.rows_T), shape.key_dim)
        expected = cached_attention(query_1ATD, cache, 0, batch, rule).double()
        out = backend.attend(query_1ATD, cache, 0, batch, rule).double()
        distances.append(float((out - expected).norm() / expected.norm()))
    return distances
