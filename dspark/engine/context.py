"""The drafter's context: rows of committed tokens, handed over when the drafter next needs them.

Nothing is computed for a request that ends before it drafts again, and rounds in which the
schedule drafts nothing cost what plain decoding costs, but for keeping the features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dspark.attention.slots import SlotCache
from dspark.drafters.base import Drafter

_MOST_ROWS = 4096  # rows that may wait: 100 MB of features for a 4B target


@dataclass(frozen=True)
class _Rows:
    slots_T: Tensor
    positions_T: Tensor
    features_TF: Tensor
    next_tokens_T: Tensor

    def take(self, rows: Tensor) -> _Rows:
        return _Rows(
            self.slots_T[rows],
            self.positions_T[rows],
            self.features_TF[rows],
            self.next_tokens_T[rows],
        )


class DraftContext:
    """A drafter's cache, and the rows that are still to be written to it.

    Args:
        drafter: bound to its target.
        cache: its cache; rows stand where the target's rows stand.
    """

    def __init__(self, drafter: Drafter, cache: SlotCache) -> None:
        self.drafter = drafter
        self.cache = cache
        self._waiting: list[_Rows] = []
        self._count = 0

    def hold(
        self, slots_T: Tensor, positions_T: Tensor, features_TF: Tensor, next_tokens_T: Tensor
    ) -> None:
        """Keep the rows of committed tokens for the next `flush`; as `Drafter.observe`."""
        self._waiting.append(_Rows(slots_T, positions_T, features_TF, next_tokens_T))
        self._count += len(slots_T)
        if self._count > _MOST_ROWS:
            self.flush()

    def flush(self) -> None:
        """Write what is waiting."""
        if not self._waiting:
            return
        rows = self._waiting[0]
        if len(self._waiting) > 1:
            parts = self._waiting
            rows = _Rows(
                torch.cat([part.slots_T for part in parts]),
                torch.cat([part.positions_T for part in parts]),
                torch.cat([part.features_TF for part in parts]),
                torch.cat([part.next_tokens_T for part in parts]),
            )
            # Rounds stand one after the other here, but a drafter reads request by request.
            rows = rows.take(torch.argsort(rows.slots_T, stable=True))
        self._drop()
        self.drafter.observe(
            self.cache, rows.slots_T, rows.positions_T, rows.features_TF, rows.next_tokens_T
        )

    def forget(self, slot: int) -> None:
        """Drop what is waiting for a slot that was given back."""
        waiting, self._waiting, self._count = self._waiting, [], 0
        for part in waiting:
            stays_T = part.slots_T != slot
            rest = part if bool(stays_T.all()) else part.take(stays_T.nonzero().squeeze(1))
            if len(rest.slots_T):
                self._waiting.append(rest)
                self._count += len(rest.slots_T)

    def clear(self, slot: int, begin: int) -> None:
        """Zero a slot's rows from `begin` on, where they may be no numbers."""
        self.cache.clear(slot, begin)

    def _drop(self) -> None:
        self._waiting, self._count = [], 0
