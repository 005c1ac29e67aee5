"""Encoder of a feature cache: target forward, row selection, quantisation, packing."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dspark.attention.ragged_batch import RaggedBatch
from dspark.data.features.codec import Bytes, channel_scales, turning_basis
from dspark.data.features.manifest import Coding, Learned, Manifest
from dspark.data.features.shards import join, num_context_rows, teacher_rows
from dspark.data.features.writer import Entry
from dspark.data.samples import Sample
from dspark.targets.target import Target

LEARNED_TOKENS = 4096
_THREADS = 8


@dataclass(frozen=True)
class Encoded:
    """An encoded batch.

    Attributes:
        entries: of the samples with finite rows, packed on other threads.
        failed: samples with non-finite rows.
    """

    entries: list[Future[Entry]]
    failed: list[Sample]


class Encoder:
    """Encodes entries of a cache; a context manager that owns its packing threads.

    Args:
        manifest: of the cache.
    """

    def __init__(self, manifest: Manifest) -> None:
        self._planes = len(manifest.origin.taps)
        self._features, self._teacher = manifest.codecs()
        self._pool = ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1))

    def __enter__(self) -> Encoder:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown(cancel_futures=kind is not None)

    def close(self) -> None:
        """End the threads after pending work."""
        self._pool.shutdown()

    def encode(self, samples: Sequence[Sample], features_TF: Tensor, hidden_TH: Tensor) -> Encoded:
        """Start encoding samples whose rows are concatenated.

        Rows leave the device once per batch, quantised.
        """
        context, teacher, failed = list[int](), list[int](), list[Sample]()
        kept: list[tuple[Sample, slice, slice]] = []
        finite_T = (features_TF.isfinite().all(-1) & hidden_TH.isfinite().all(-1)).tolist()
        start = 0
        for sample in samples:
            length = len(sample.input_ids)
            if not all(finite_T[start : start + length]):
                failed.append(sample)
                start += length
                continue
            begins = len(context), len(teacher)
            context += range(start, start + num_context_rows(sample))
            teacher += [start + row for row in teacher_rows(sample)]
            ends = len(context), len(teacher)
            kept.append((sample, slice(begins[0], ends[0]), slice(begins[1], ends[1])))
            start += length
        rows_TPH = torch.unflatten(features_TF, -1, (self._planes, -1))
        features = self._features.quantise(rows_TPH[_index(context, rows_TPH)])
        states = self._teacher.quantise(hidden_TH[_index(teacher, hidden_TH)].unsqueeze(1))
        entries = [
            self._pool.submit(self._entry, sample, _rows(features, own), _rows(states, law))
            for sample, own, law in kept
        ]
        return Encoded(entries, failed)

    def _entry(
        self, sample: Sample, features: tuple[Bytes, ...], teacher: tuple[Bytes, ...]
    ) -> Entry:
        data = join(sample, self._features.pack(features), self._teacher.pack(teacher))
        return Entry(sample, len(features[0]), len(teacher[0]), data)


def learn(
    target: Target, samples: Sequence[Sample], taps: Sequence[int], coding: Coding
) -> Learned | None:
    """Coding parameters learned from about 4,096 tokens spread over the samples.

    None unless `coded`.
    """
    if coding.name != "coded":
        return None
    some = spread(samples, LEARNED_TOKENS)
    features_TF, hidden_TH = target_features(target, some, taps)
    features_TPH = torch.unflatten(features_TF, -1, (len(taps), -1))
    scale_PH = channel_scales(features_TPH)
    teacher_1H = channel_scales(hidden_TH.unsqueeze(1))
    return Learned(torch.cat((scale_PH, teacher_1H)), turning_basis(features_TPH, scale_PH))


def _index(rows: list[int], like: Tensor) -> Tensor:
    return torch.from_numpy(np.asarray(rows, dtype=np.int64)).to(like.device)


def _rows(arrays: tuple[Bytes, ...], rows: slice) -> tuple[Bytes, ...]:
    return tuple(array[rows] for array in arrays)


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
    """Batches of samples of similar length, the longest first, each of at most `tokens` tokens.

    A longer sample is its own batch. The first batch is the most expensive, so a lack of memory
    shows at once.
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
    """Evenly spread samples of about `tokens` tokens in total, at least one."""
    mean = sum(len(s.input_ids) for s in samples) / len(samples)
    count = min(len(samples), max(1, round(tokens / mean)))
    return [samples[i * len(samples) // count] for i in range(count)]
