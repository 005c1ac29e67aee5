"""Block masks for flex attention where every query sees a range of keys, and maybe others.

Queries and keys are taken in stretches of 128 rows, as flex attention's kernels take them. Ranges
tell which stretches of keys a stretch of queries reads at all, and which of them need no mask
because every query of the stretch sees every key, without a look at single pairs.
Letters: Q queries, S stretches of queries, C stretches of keys.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

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
