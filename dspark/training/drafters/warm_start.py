"""Warm starts: a new drafter's weights from another drafter, or from the target's last layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dspark.drafters.backbone import ParallelBackbone
from dspark.drafters.checkpoints.checkpoint import load_drafter
from dspark.drafters.checkpoints.registry import AnyDrafter
from dspark.errors import CompatibilityError
from dspark.targets.target import Target

_COPIED = (
    *(f"self_attn.{x}_proj" for x in "qkvo"),
    *(f"mlp.{x}_proj" for x in ("gate", "up", "down")),
    "input_layernorm",
    "post_attention_layernorm",
)


def start_from(drafter: AnyDrafter, source: str) -> list[str]:
    """Copy the weights of a checkpoint of any layout.

    Args:
        drafter: new, bound; its own configuration stays.
        source: directory or hub id.

    Returns:
        Names of parameters that the checkpoint lacks and that stay unchanged.

    Raises:
        CheckpointError, CompatibilityError: as `load_drafter`; or the checkpoint has a tensor that
            the drafter lacks or has in another shape, or another reduced vocabulary.
    """
    loaded = load_drafter(source)
    if type(loaded) is not type(drafter):
        raise CompatibilityError(
            f"initial is {source}, which holds a drafter of another kind than the recipe trains "
            f"({type(loaded).__name__}, not {type(drafter).__name__}); give one of that kind."
        )
    mine, theirs = drafter.state_dict(), loaded.state_dict()
    for name, tensor in theirs.items():
        if name not in mine:
            raise CompatibilityError(
                f"{source} has {name}, which the recipe's drafter lacks; correct the recipe's "
                "`drafter`, or leave `initial` out."
            )
        if tensor.shape != mine[name].shape:
            raise CompatibilityError(
                f"{source} has {name} of shape {list(tensor.shape)}, but the recipe's drafter has "
                f"{list(mine[name].shape)}; correct the recipe's `drafter`, or leave `initial` out."
            )
        if not tensor.is_floating_point() and not tensor.equal(mine[name].to(tensor.device)):
            raise CompatibilityError(
                f"{source} has another {name} than the recipe's drafter; correct the recipe's "
                "`drafter`, or leave `initial` out."
            )
    if loaded.taps != drafter.taps:
        raise CompatibilityError(
            f"{source} reads target_layer_ids {list(loaded.taps)}, but the recipe's drafter "
            f"{list(drafter.taps)}; set drafter.target_layer_ids to those."
        )
    drafter.load_state_dict(theirs, strict=False)
    return sorted(set(mine) - set(theirs))


def has_copyable_layers(target: Target) -> bool:
    """Whether a target's layers have the modules that `start_from_last_layers` copies."""
    names = {name for name, _ in target.layers[-1].named_parameters()}
    return all(f"{part}.weight" in names for part in _COPIED)


@torch.no_grad()
def start_from_last_layers(drafter: ParallelBackbone, target: Target) -> None:
    """Copy the target's last decoder layers into a drafter's layers.

    The context projection starts as the deepest captured layer alone, with the input norm of the
    first copied layer, so that the initial keys and values of the context are close to the
    target's. Per-head norms that the target lacks start at the typical size of its queries and
    keys.

    Args:
        drafter: new, with as many layers as are copied.
        target: with plain weights.

    Raises:
        CompatibilityError: the target has fewer layers, or layers of another shape or other parts.
    """
    own = list(drafter.layers)
    theirs = list(target.layers)[-len(own) :]
    if len(theirs) < len(own):
        raise CompatibilityError(
            f"The drafter has {len(own)} layers, but the target only {len(theirs)}; set "
            "drafter.num_layers to that at most, or drafter.initial_layers to random."
        )
    for layer, source in zip(own, theirs, strict=True):
        _copy_layer(layer, source, target.norm_offset)
    width = drafter.backbone_config.hidden_size
    drafter.fc.weight.zero_()
    drafter.fc.weight[:, -width:].fill_diagonal_(1.0)
    drafter.hidden_norm.weight.copy_(own[0].get_parameter("input_layernorm.weight"))


def _copy_layer(layer: nn.Module, source: nn.Module, norm_offset: float) -> None:
    given = {n: _plain(n, p, norm_offset) for n, p in source.named_parameters()}
    before_mlp = given.get("pre_feedforward_layernorm.weight")
    if before_mlp is not None and getattr(layer, "pre_feedforward_layernorm", None) is None:
        given["post_attention_layernorm.weight"] = before_mlp
    buffers = dict(source.named_buffers())
    for name, buffer in layer.named_buffers():
        if name in buffers:
            buffer.copy_(buffers[name])
    lacking = []
    for name, parameter in layer.named_parameters():
        if name in given and given[name].shape == parameter.shape:
            parameter.copy_(given[name])
        else:
            lacking.append(name)
    for name in lacking:
        part = name.removesuffix("_norm.weight")
        if part not in ("self_attn.q", "self_attn.k"):
            raise CompatibilityError(
                f"The target's layers have no {name} of the drafter's shape, so none can be "
                "copied; set drafter.initial_layers to random."
            )
        projection = layer.get_parameter(f"{part}_proj.weight")
        scale_H = layer.get_parameter("input_layernorm.weight")
        # Root mean square of the projection of a normed input, whose own is 1.
        size = (projection * scale_H).square().sum(-1).mean().sqrt()
        layer.get_parameter(name).fill_(float(size))


def _plain(name: str, weight: Tensor, norm_offset: float) -> Tensor:
    """A weight in the drafter's convention, in which norms multiply by the weight alone."""
    return weight + norm_offset if name.endswith("norm.weight") else weight
