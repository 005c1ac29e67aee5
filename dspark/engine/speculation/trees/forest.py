"""The forest of a round: its requests' trees, and where their nodes stand in rows and pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dspark.attention.paged_cache import PagedCache
from dspark.engine.requests.sequence import ActiveRequest
from dspark.engine.speculation.trees.growth import Tree


@dataclass(frozen=True)
class Forest:
    """The trees that a round verifies, of R requests.

    Attributes:
        trees: of each request, pruned; empty for those that did not draft.
        tokens_DKTC: candidates of each slot, of the first D requests; T is P where they hang on the
            parent, and 1 elsewhere.
        law_DKPC: what children were drawn from, float64; None where no request's were drawn.
    """

    trees: tuple[Tree, ...]
    tokens_DKTC: Tensor
    law_DKPC: Tensor | None = None

    def rows(self, requests_M: Sequence[int]) -> Forest:
        """Of the requests named, in that order; those that did not draft come last."""
        drafted = [r for r in requests_M if r < len(self.tokens_DKTC)]
        return Forest(
            tuple(self.trees[r] for r in requests_M),
            self.tokens_DKTC[drafted],
            None if self.law_DKPC is None else self.law_DKPC[drafted],
        )


def compact(
    cache: PagedCache, requests: Sequence[ActiveRequest], paths: Sequence[Sequence[int]]
) -> None:
    """Move the rows of the paths that stay to where their positions are.

    Args:
        cache: of the target.
        requests: as the round has found them.
        paths: the nodes of each that stay, from the anchor on.
    """
    rows, to = list[int](), list[int]()
    for request, path in zip(requests, paths, strict=True):
        if not path:
            continue
        begin = len(request.tokens)
        own = request.table.rows(begin, begin + max(path) + 1)
        for depth, node in enumerate(path):
            if node != depth:
                rows.append(own[node])
                to.append(own[depth])
    if rows:
        device = cache.device
        cache.move(torch.tensor(rows, device=device), torch.tensor(to, device=device))


def in_order_of_paths(
    count: int, ends: Sequence[int], trees: Sequence[Tree], paths: Sequence[Sequence[int]]
) -> list[int] | None:
    """The rows of a batch with every kept path first among its tree's rows; None for as they are.

    Args:
        count: rows of the batch.
        ends: the row behind each tree's last one.
        trees: of each request.
        paths: the nodes of each that stay.
    """
    order, moved = list(range(count)), False
    for end, tree, path in zip(ends, trees, paths, strict=True):
        begin = end - len(tree)
        for depth, node in enumerate(path):
            order[begin + depth] = begin + node
            moved |= depth != node
    return order if moved else None
