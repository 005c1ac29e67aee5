"""One pass of a batch through a model's decoder, and through its head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.hooks import RemovableHandle

from dspark.targets.families import Anatomy
from dspark.targets.interface import RaggedCall


def apply_head(
    anatomy: Anatomy, hidden_NH: Tensor, product: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Logits [N, V] of normed hidden states, soft cap included.

    Args:
        anatomy: whose head it is.
        hidden_NH: the states.
        product: takes the place of the head's module.
    """
    logits_NV: Tensor = (product or anatomy.head)(hidden_NH)
    cap = anatomy.logit_softcap
    return logits_NV if cap is None else torch.tanh(logits_NV / cap) * cap


def run_decoder(anatomy: Anatomy, call: RaggedCall) -> Tensor:
    """Normed hidden states [T, H] of a ragged batch."""
    ids_T, positions_T = call.batch.input_ids_T, call.batch.positions_T
    own = len(ids_T)
    if call.tile is not None:
        spare = (0, call.tile - own)
        ids_T, positions_T = pad(ids_T, spare), pad(positions_T, spare)
    out = anatomy.decoder(
        input_ids=ids_T.unsqueeze(0),
        position_ids=positions_T.unsqueeze(0),
        use_cache=False,
        ragged=call,
    )
    hidden_TH: Tensor = out.last_hidden_state[0]
    return hidden_TH[:own]


def run_tapped(
    anatomy: Anatomy, call: RaggedCall, taps: Sequence[int]
) -> tuple[Tensor, Tensor | None]:
    """Normed hidden states [T, H] of a ragged batch, and its features [T, F] if any are wanted."""
    if not taps:
        return run_decoder(anatomy, call), None
    taken: dict[int, Tensor] = {}
    handles = [_keep(anatomy, tap, taken) for tap in set(taps)]
    try:
        hidden_TH = run_decoder(anatomy, call)
    finally:
        for handle in handles:
            handle.remove()
    return hidden_TH, torch.cat([taken[tap] for tap in taps], -1)[: len(hidden_TH)]


def _keep(anatomy: Anatomy, tap: int, taken: dict[int, Tensor]) -> RemovableHandle:
    def keep_input(_module: Any, args: Any, kwargs: Any) -> None:
        taken[tap] = layer_input(args, kwargs)

    def keep_output(_module: Any, _args: Any, out: Any) -> None:
        taken[tap] = (out[0] if isinstance(out, tuple) else out)[0]

    if tap == -1:
        return anatomy.layers[0].register_forward_pre_hook(keep_input, with_kwargs=True)
    return anatomy.layers[tap].register_forward_hook(keep_output)


def layer_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states [T, H] that a decoder layer was called with."""
    hidden_1TH: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden_1TH[0]
