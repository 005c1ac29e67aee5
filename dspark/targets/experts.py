"""Experts of a mixture whose products have the same shapes whoever chooses them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ExpertsInterface

from dspark.targets.families import Anatomy

EXPERTS = "dspark_tiled"


def tiled_experts(
    module: nn.Module, hidden_TH: Tensor, top_k_index_TE: Tensor, top_k_weights_TE: Tensor
) -> Tensor:
    """Experts of a mixture, each of those needed applied to all rows, in ascending order.

    transformers' own ways give an expert the rows that chose it, and their number differs from
    batch to batch.

    Args:
        module: the experts.
        hidden_TH: their input.
        top_k_index_TE: which of them each row wants, [T, experts per token].
        top_k_weights_TE: how much of each, [T, experts per token].

    Returns:
        [T, H]: the weighted sums.
    """
    apply = _own_forward(module)
    total_TH = torch.zeros_like(hidden_TH)
    one_T1 = top_k_weights_TE.new_ones(len(hidden_TH), 1)
    for expert in torch.unique(top_k_index_TE).tolist():
        out_TH = apply(module, hidden_TH, torch.full_like(top_k_index_TE[:, :1], expert), one_T1)
        chosen_TE = top_k_index_TE == expert
        weight_T1 = (top_k_weights_TE * chosen_TE).sum(-1, keepdim=True)
        added_TH = total_TH + (out_TH * weight_T1).to(total_TH.dtype)
        total_TH = torch.where(chosen_TE.any(-1, keepdim=True), added_TH, total_TH)
    return total_TH


# A model that is told to use them by `set_experts_implementation` finds them under this name.
ExpertsInterface.register(EXPERTS, tiled_experts)


def _own_forward(module: nn.Module) -> Callable[..., Tensor]:
    """The forward that a model's own file gives its experts, before it was made replaceable."""
    forward: Callable[..., Tensor] = type(module).forward.__wrapped__  # type: ignore[attr-defined]
    return forward


def use_tiled_experts(model: Any, anatomy: Anatomy) -> str | None:
    """Switch the experts of a mixture, where there are any, to `tiled_experts`.

    Returns:
        What stands against it: the name of a module whose experts lie in one tensor and cannot
        be switched. None where nothing does.
    """
    mixtures = [
        (name, module)
        for name, module in anatomy.decoder.named_modules()
        if any(p.dim() > 2 for p in module.parameters(recurse=False))
    ]
    for name, module in mixtures:
        if getattr(type(module).forward, "__wrapped__", None) is None:
            return f"the expert products of {name} ({type(module).__name__}) are not replaceable"
    if mixtures:
        model.set_experts_implementation(EXPERTS)
    return None
