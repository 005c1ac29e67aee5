"""Whether a CPU computes a model faster in bfloat16 than in float32."""

from __future__ import annotations

from functools import cache

import torch

from dspark.targets.fast.packing import Packer, fastest_seconds
from dspark.targets.fast.products import onednn_works

# How much faster bfloat16 must be, so that noise does not decide: it rounds, which float32 does
# not.
_MARGIN = 1.2
# Numbers of a weight: below, a model's products hardly count; above, more say nothing new.
_FEWEST, _MOST = 2**18, 2**24


@cache
def quicker_cpu_dtype(outputs: int, inputs: int) -> torch.dtype:
    """bfloat16 where its packed products are measured faster than float32's best, else float32.

    Tried out once per process and shape, with one and with eight rows, and only on a processor
    that has instructions for bfloat16.

    Args:
        outputs: of the model's largest weight in a layer.
        inputs: of the same.
    """
    if outputs * inputs < _FEWEST or not onednn_works(torch.bfloat16):
        return torch.float32
    generator = torch.Generator().manual_seed(0)
    rows = max(1, min(outputs, _MOST // inputs))
    with torch.inference_mode():
        weight = torch.randn(rows, inputs, generator=generator).bfloat16()
        short = fastest_seconds([Packer("onednn")], weight)
        kinds = [Packer("plain"), Packer("fp16"), Packer("onednn")]
        long = fastest_seconds(kinds, weight.float())
    return torch.bfloat16 if _MARGIN * short < long else torch.float32
