"""Normalisers of the target's distributions, each computed once however often it teaches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dspark.data.samples import Sample
from dspark.drafters.target_bound import TargetBound

# From so many passes over the rows that teach on, most of them are seen again.
_PASSES = 2.0
_ROWS = 128


class LogTotals:
    """Logarithms of the sums that the target's softmax divides by, kept from pass to pass.

    A drafter of a reduced vocabulary is compared with the probabilities of the tokens that it
    knows. What they are divided by is a sum over all tokens, and the same in every pass: with it,
    later passes multiply by the known tokens' rows of the head alone. 4 bytes a token are kept.

    Args:
        head: the target's drafter.
        passes: over the rows that teach, expected of the training; with few, nothing is kept.
    """

    def __init__(self, head: TargetBound[Any], passes: float) -> None:
        self._head = head if head.t2d is not None and passes >= _PASSES else None
        self._known: dict[Sample, Tensor] = {}

    def of(self, samples: Sequence[Sample], states_TH: Tensor) -> Tensor | None:
        """The logarithms of all rows of packed samples.

        Args:
            samples: in their order.
            states_TH: the target's states after its final norm.

        Returns:
            [T], 0 before a sample's answers; None where nothing is kept.
        """
        if self._head is None:
            return None
        parts = torch.split(states_TH, [len(sample.input_ids) for sample in samples])
        return torch.cat([self._of(self._head, *one) for one in zip(samples, parts, strict=True)])

    @torch.no_grad()
    def _of(self, head: TargetBound[Any], sample: Sample, states_LH: Tensor) -> Tensor:
        found = self._known.get(sample)
        if found is None:
            first = max(sample.loss_mask.index(True) - 1, 0) if any(sample.loss_mask) else 0
            rows = torch.split(states_LH[first:], _ROWS)
            sums = torch.cat([head.target_log_totals(some) for some in rows])
            found = self._known[sample] = torch.cat((sums.new_zeros(first), sums))
        return found
