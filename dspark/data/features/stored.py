"""What any feature cache gives: the rows that it holds of a sample."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from dspark.data.samples import Sample


@dataclass(frozen=True)
class StoredRows:
    """What a cache holds of a sample.

    Attributes:
        features_RPH: the first R rows of every tap.
        teacher_MH: states after the final norm.
        teacher_rows: which rows these are, ascending.
    """

    features_RPH: Tensor
    teacher_MH: Tensor
    teacher_rows: list[int]


class FeatureStore(Protocol):
    """A cache of either kind.

    Attributes:
        directory: where.
        taps: the layers that it has the features of.
        hidden_size: H.
        target_fingerprint: of the target that made it; None where it does not say.
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
        """All samples, cut to `max_length` tokens where the cache can still give their rows."""
        ...
