"""Samples to train on, of random tokens."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import torch


def write_samples(
    path: Path, count: int, prompt_len: Callable[[int, int], int] = lambda i, length: 3
) -> None:
    """Write so many samples of 12 to 23 of 40 tokens each.

    Args:
        path: ends in .jsonl.gz.
        count: how many.
        prompt_len: tokens of the prompt of sample i, given its length.
    """
    generator = torch.Generator().manual_seed(1)
    with gzip.open(path, "wt") as file:
        for i in range(count):
            ids = torch.randint(0, 40, (12 + i % 12,), generator=generator).tolist()
            record = {"input_ids": ids, "prompt_len": prompt_len(i, len(ids))}
            file.write(json.dumps(record) + "\n")
