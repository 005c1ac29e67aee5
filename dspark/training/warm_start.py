"""Starts a drafter from another's weights, without its optimiser: `initial` of a recipe."""

from __future__ import annotations

from dspark.drafters.checkpoint import load_drafter
from dspark.drafters.registry import AnyDrafter
from dspark.errors import CompatibilityError


def start_from(drafter: AnyDrafter, source: str) -> list[str]:
    """Copy the weights of a checkpoint of any layout.

    Args:
        drafter: new, bound; its own configuration stays.
        source: directory or hub id.

    Returns:
        Names of parameters that the checkpoint lacks, and which stay as they were.

    Raises:
        CheckpointError, CompatibilityError: as `load_drafter`; or the checkpoint has a tensor that
            the drafter lacks or has in another shape, or another vocabulary.
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
                f"{source} knows other tokens ({name}) than the recipe's drafter, whose reduced "
                "vocabulary is taken from the samples; use the samples that it was made with."
            )
    if loaded.taps != drafter.taps:
        raise CompatibilityError(
            f"{source} reads target_layer_ids {list(loaded.taps)}, but the recipe's drafter "
            f"{list(drafter.taps)}; set drafter.target_layer_ids to those."
        )
    drafter.load_state_dict(theirs, strict=False)
    return sorted(set(mine) - set(theirs))
