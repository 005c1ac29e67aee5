"""RMS norms of a model in one call each, where that gives the same bits.

transformers writes an RMS norm as five small operations. On small models a CPU spends more time
dispatching these than computing them, so a module whose output torch's own `rms_norm` reproduces
bit for bit gets that as its forward. In fp32 most do; in other dtypes the rounding in between
differs, and they are left as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

# The published names of a norm's epsilon.
_EPSILONS = ("variance_epsilon", "eps")
_TRIAL_ROWS = 64


@torch.no_grad()
def fuse_norms(model: nn.Module) -> int:
    """Replace the forward of every RMS norm that can be replaced without changing a bit.

    Returns:
        How many were replaced.
    """
    replaced = 0
    for module in model.modules():
        if not type(module).__name__.endswith("RMSNorm"):
            continue
        fused = _fused(module)
        if fused is not None and _same_bits(module, fused):
            module.forward = fused
            replaced += 1
    return replaced


def _fused(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    weight: Any = dict(module.named_parameters(recurse=False)).get("weight")
    named = [vars(module)[name] for name in _EPSILONS if name in vars(module)]
    if weight is None or weight.ndim != 1 or len(named) != 1 or not isinstance(named[0], float):
        return None
    shape, epsilon = tuple(weight.shape), named[0]

    def forward(hidden_states: Tensor) -> Tensor:
        return rms_norm(hidden_states, shape, weight, epsilon)

    return forward


def _same_bits(module: nn.Module, fused: Callable[[Tensor], Tensor]) -> bool:
    """On rows of sizes from tiny to huge, one by one and together."""
    weight: Any = module.weight
    generator = torch.Generator().manual_seed(0)
    rows_NH = torch.randn(_TRIAL_ROWS, weight.shape[0], generator=generator)
    rows_NH = rows_NH * torch.logspace(-4, 4, _TRIAL_ROWS)[:, None]
    rows_NH = rows_NH.to(weight.device, weight.dtype)
    return all(torch.equal(module(x), fused(x)) for x in (rows_NH, rows_NH[:1], rows_NH[None]))
