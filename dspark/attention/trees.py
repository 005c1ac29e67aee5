"""Draft trees in a ragged batch: every row at the position of its depth, seeing its ancestors.

The last rows of a segment may be the nodes of a tree that grows from the row before them. A node's
keys stand where its row stands, so two nodes of one depth have two rows of the cache and one
position; `PagedCache.move` brings the path that stays to where plain decoding would have put it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dspark.attention.ragged_batch import Parents, RaggedBatch, Segment, hand_over


def depths(parents: Parents) -> list[int]:
    """Depth of each node: 1 for a child of the root, which is -1."""
    found: list[int] = []
    for parent in parents:
        found.append(1 if parent < 0 else found[parent] + 1)
    return found


def ancestors(parents: Parents) -> npt.NDArray[np.bool_]:
    """Which nodes each node sees, [N, N]: itself and those on its way from the root."""
    sees_NN = np.eye(len(parents), dtype=bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            sees_NN[node] |= sees_NN[parent]
    return sees_NN


def with_trees(batch: RaggedBatch, parents: Sequence[Parents]) -> RaggedBatch:
    """The batch with the last rows of its segments as nodes of trees.

    Args:
        batch: as if every segment were one line of tokens; nothing has been derived from it yet.
        parents: per segment the parent of each of its last rows, as a number among these, before
            the node itself; -1 is the row before the first of them.
    """
    positions: list[int] = []
    for segment, own in zip(batch.segments, parents, strict=True):
        root = segment.end - len(own) - 1
        positions += range(segment.start, root + 1)
        positions += [root + depth for depth in depths(own)]
    [positions_T] = hand_over([positions], batch.positions_T.device)
    return replace(batch, positions_T=positions_T, trees=tuple(map(tuple, parents)), memo={})


def tree_mask(
    segment: Segment, parents: Parents, begin: int, window: int | None, like: Tensor
) -> Tensor:
    """Additive mask [L, S] of a segment's rows over the keys from position `begin` on.

    Args:
        segment: its last rows are a tree.
        parents: of these.
        begin: position of the first key.
        window: number of positions that a row sees, its own included; None for all.
        like: gives dtype and device.
    """
    nodes, length, size = len(parents), segment.length, segment.end - begin
    sees_LS = np.tri(length, size, size - length, dtype=bool)
    sees_LS[length - nodes :, size - nodes :] = ancestors(parents)
    if window is not None:
        root = segment.end - nodes - 1
        deep = [root + depth for depth in depths(parents)]
        keys_S = np.array([*range(begin, root + 1), *deep])
        rows_L1 = np.array([*range(segment.start, root + 1), *deep])[:, None]
        sees_LS &= keys_S > rows_L1 - window
    mask_LS = np.where(sees_LS, np.float32(0), np.float32("-inf"))
    return torch.from_numpy(mask_LS).to(like.device, like.dtype)
