"""Which of the target's rows a feature cache stores for a sample, and the interface of a cache.

A context row is seen by anchors behind it, and the last anchor is the token before the last
supervised one. A teacher row precedes a supervised token and gives its distribution. Both hold for
block drafters as for chains (docs/method.md), whose row i predicts token i + 2; no other row is
stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from dspark.data.samples import Sample


def num_context_rows(sample: Sample) -> int:
    """Number of leading rows that a drafter may see: those before the last anchor."""
    supervised = [i for i, counts in enumerate(sample.loss_mask) if counts]
    return max(supervised[-1] - 1, 0) if supervised else 0


def teacher_rows(sample: Sample) -> list[int]:
    """The rows whose next token is supervised, ascending."""
    return [i - 1 for i, counts in enumerate(sample.loss_mask) if counts and i > 0]


@dataclass(frozen=True)
class StoredRows:
    """The rows of a sample in a cache.

    Attributes:
        features_RPH: the first R rows of every tap.
        teacher_MH: states after the final norm.
        teacher_rows: indices of these rows, ascending.
    """

    features_RPH: Tensor
    teacher_MH: Tensor
    teacher_rows: list[int]


class FeatureStore(Protocol):
    """A feature cache of either format.

    Attributes:
        directory: of the cache.
        taps: captured layers.
        hidden_size: H.
        target_fingerprint: of the target that made it; None if unknown.
    """

    @property
    def directory(self) -> Path: ...
    @property
    def taps(self) -> tuple[int, ...]: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def target_fingerprint(self) -> str | None: ...

    def __contains__(self, sample: Sample) -> bool: ...

    def rows(self, sample: Sample, device: torch.device) -> StoredRows:
        """A sample's rows, on a device.

        Raises:
            DataError: the cache does not hold it, or holds it damaged.
        """
        ...

    def samples(self, max_length: int) -> Iterator[Sample]:
        """All samples, truncated to `max_length` tokens if the cache supports it."""
        ...
