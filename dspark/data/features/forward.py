"""The target's forward over whole samples, packed: rows of one after rows of the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dspark.attention.layout import RaggedBatch
from dspark.data.samples import Sample
from dspark.targets.target import Target


@torch.no_grad()
def target_features(
    target: Target, samples: Sequence[Sample], taps: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Run the target over samples.

    Returns:
        Features [T, F] of the taps, and states after the final norm [T, H]; T is the sum of the
        samples' lengths.
    """
    batch = RaggedBatch.fresh([s.input_ids for s in samples], target.device)
    output = target.forward(batch, taps=taps)
    assert output.features_TF is not None
    return output.features_TF, output.hidden_TH


def by_length(samples: Sequence[Sample], tokens: int) -> list[list[Sample]]:
    """Batches of samples of like length, the longest first, each of at most `tokens` tokens.

    A sample that is longer is a batch of its own. Since the first batch is the dearest, a machine
    that lacks memory for them says so at once.
    """
    batches: list[list[Sample]] = []
    room = 0
    for sample in sorted(samples, key=lambda s: len(s.input_ids), reverse=True):
        length = len(sample.input_ids)
        if length > room:
            batches.append([])
            room = max(tokens, length)
        batches[-1].append(sample)
        room -= length
    return batches


def spread(samples: Sequence[Sample], tokens: int) -> list[Sample]:
    """Samples from all over a sequence, together of about `tokens` tokens, at least one."""
    mean = sum(len(s.input_ids) for s in samples) / len(samples)
    count = min(len(samples), max(1, round(tokens / mean)))
    return [samples[i * len(samples) // count] for i in range(count)]
