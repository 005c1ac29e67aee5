"""Decoder layers through `torch.compile`, where that is asked for.

What lies between a layer's attention calls (norms, projections, rotary embedding, gated MLP) is
compiled once for all layers and numbers of rows; attention itself and the hooks that take features
stay as they are. It costs seconds to minutes at the first steps and wins where a step is made of
many small operations. Results are rounded differently, by as much as another order of summation
rounds them.
"""

from __future__ import annotations

import logging

import torch
from transformers import AttentionInterface

from dspark.attention.paged_cache import BlockTable, PagedCache
from dspark.attention.ragged_batch import RaggedBatch
from dspark.errors import first_line
from dspark.targets.families import Anatomy
from dspark.targets.forward import IMPLEMENTATION, RaggedCall, ragged_forward, run_decoder
from dspark.targets.probe import CacheLayout, relative_distance

_logger = logging.getLogger(__name__)

# Of a compiled step's hidden states to those of the same step run eagerly, relative.
_TOLERANCE = 0.05


@torch.inference_mode()
def compile_layers(anatomy: Anatomy, layout: CacheLayout) -> bool:
    """Compile the decoder layers in place, and try them out on two steps.

    Returns:
        Whether they are compiled; where that fails they run as before, and a warning says why.
    """
    steps = [[3, 5, 7, 11, 13], [17]]
    expected = _run(anatomy, layout, steps)
    eager = [layer.forward for layer in anatomy.layers]
    # Attention reads its batch's layout from Python objects, which are new at each step.
    AttentionInterface.register(IMPLEMENTATION, torch.compiler.disable(ragged_forward))  # type: ignore[no-untyped-call]
    for layer in anatomy.layers:
        layer.forward = torch.compile(layer.forward, dynamic=True)
    try:
        found = _run(anatomy, layout, steps)
        distance = max(relative_distance(a, b) for a, b in zip(found, expected, strict=True))
        if distance <= _TOLERANCE:
            return True
        reason = f"a compiled step differs from the same step run eagerly by {distance:.2g}"
    except Exception as error:  # whatever a compiler raises, the layers can run eagerly
        reason = first_line(error)
    for layer, forward in zip(anatomy.layers, eager, strict=True):
        layer.forward = forward
    _logger.warning("%s runs without torch.compile: %s.", anatomy.architecture, reason)
    return False


def _run(anatomy: Anatomy, layout: CacheLayout, steps: list[list[int]]) -> list[torch.Tensor]:
    """Hidden states of the steps of one request."""
    weight = anatomy.embedding.weight
    cache = PagedCache(layout.shapes, 1, dtype=weight.dtype, device=weight.device)
    table, start, found = BlockTable((0,)), 0, []
    for ids in steps:
        batch = RaggedBatch.build([(table, start, ids)], weight.device)
        call = RaggedCall(batch, cache, layout.cache_layers, layout.writers)
        found.append(run_decoder(anatomy, call))
        start += len(ids)
    return found
