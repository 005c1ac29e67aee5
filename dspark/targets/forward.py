"""The forward of a ragged batch: every layer's attention function, one pass, and what it gives.

transformers hands the attention of a model to a function chosen by name. Ours reads the layout of
the ragged batch from a keyword argument that the model passes through untouched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface

from dspark.attention.backends import Rule, cached_attention, fresh_attention
from dspark.attention.choice import Attend
from dspark.attention.paged_cache import PagedCache
from dspark.attention.ragged_batch import RaggedBatch
from dspark.errors import CompatibilityError
from dspark.targets.families import Anatomy

IMPLEMENTATION = "dspark_ragged"

# Said by some models beside what `ragged` already carries; they change nothing here.
_HARMLESS = frozenset({
    "position_ids", "use_cache", "cache_position", "output_attentions", "is_causal",
    "output_router_logits",
})  # fmt: skip


class LayoutLostError(CompatibilityError):
    """The attention of a model was called without the layout of the batch."""


@dataclass(frozen=True)
class LayerCall:
    """What the probe notes of one call: the layer, its keys and values, and the options."""

    layer: int
    key_1GTD: Tensor
    value_1GTD: Tensor
    window: int | None
    unknown: tuple[str, ...]


@dataclass(frozen=True)
class RaggedCall:
    """What travels through a model's forward to its attention layers.

    Attributes:
        batch: layout of the tokens.
        cache: keys and values; None lets tokens attend only within the batch.
        attend: the implementation of attention over the cache.
        cache_layers: cache layer of each decoder layer. Decoder layers that reuse the keys of an
            earlier layer share its cache layer.
        writers: whether a decoder layer writes to its cache layer.
        tile: number of rows that the batch is padded to, behind its own, on its way through the
            decoder; None for no padding.
        calls: where the probe takes notes; None outside of it.
        recorded: whether the step is being recorded, the layout of its batch known on the device
            only.
    """

    batch: RaggedBatch
    cache: PagedCache | None
    cache_layers: Sequence[int] = ()
    writers: Sequence[bool] = ()
    tile: int | None = None
    calls: list[LayerCall] | None = None
    attend: Attend = cached_attention
    recorded: bool = False


def ragged_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001 - the layout says who sees what
    *,
    scaling: float | None = None,
    dropout: float = 0.0,  # noqa: ARG001 - targets run in evaluation mode
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    ragged: RaggedCall | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer over the flattened row.

    Args:
        module: the attention module; its `layer_idx` names the layer.
        query: [1, A, T, D].
        key: [1, G, T, D].
        value: [1, G, T, D].
        attention_mask: unused.
        scaling: multiplies the scores; None for 1/sqrt(D).
        dropout: unused.
        sliding_window: number of keys that a row sees.
        softcap: soft cap of the scores.
        s_aux: attention sinks [A].
        ragged: the layout.
        **kwargs: options that are refused unless known to be harmless.

    Returns:
        [1, T, A, D] and no attention weights.

    Raises:
        LayoutLostError: the layout did not arrive.
    """
    if ragged is None:
        raise LayoutLostError(
            f"{type(module).__name__} was called without a ragged batch: the model belongs to a "
            "dspark target; call Target.forward."
        )
    layer: int = module.layer_idx  # type: ignore[assignment]
    if ragged.calls is not None:
        unknown = sorted(k for k, v in kwargs.items() if v is not None and k not in _HARMLESS)
        ragged.calls.append(LayerCall(layer, key, value, sliding_window, tuple(unknown)))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    rule = Rule(scale, sliding_window, s_aux, softcap)
    if ragged.cache is None:
        return fresh_attention(query, key, value, ragged.batch, rule).transpose(1, 2), None
    batch, cache_layer = ragged.batch, ragged.cache_layers[layer]
    own, rows = batch.offsets[-1], query.shape[2]
    if rows > own:
        query, key, value = query[:, :, :own], key[:, :, :own], value[:, :, :own]
    if ragged.writers[layer] and ragged.recorded:
        by_token = key[0].transpose(0, 1), value[0].transpose(0, 1)
        ragged.cache.write(cache_layer, batch.rows_T, *by_token)
    elif ragged.writers[layer]:
        ragged.cache.write_runs(cache_layer, batch.rows_T, batch.runs, key, value)
    out_1ATD = ragged.attend(query, ragged.cache, cache_layer, batch, rule)
    if rows > own:
        out_1ATD = pad(out_1ATD, (0, 0, 0, rows - own))
    return out_1ATD.transpose(1, 2), None


# No mask function goes with it: transformers then builds no mask, as the layout says who sees what.
AttentionInterface.register(IMPLEMENTATION, ragged_forward)


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
    with tapped(anatomy, taps) as taken:
        hidden_TH = run_decoder(anatomy, call)
    return hidden_TH, torch.cat([taken[tap] for tap in taps], -1)[: len(hidden_TH)]


@contextmanager
def tapped(anatomy: Anatomy, taps: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Within it, forwards of the decoder leave what the taps name, by tap."""
    taken: dict[int, Tensor] = {}
    handles = [_keep(anatomy, tap, taken) for tap in set(taps)]
    try:
        yield taken
    finally:
        for handle in handles:
            handle.remove()


def _keep(anatomy: Anatomy, tap: int, taken: dict[int, Tensor]) -> RemovableHandle:
    def take(states: Tensor) -> None:
        taken[tap] = states.mean(-2) if anatomy.family.streams else states

    def keep_input(_module: Any, args: Any, kwargs: Any) -> None:
        take(layer_input(args, kwargs))

    def keep_output(_module: Any, _args: Any, out: Any) -> None:
        take((out[0] if isinstance(out, tuple) else out)[0])

    if tap == -1:
        return anatomy.layers[0].register_forward_pre_hook(keep_input, with_kwargs=True)
    return anatomy.layers[tap].register_forward_hook(keep_output)


def layer_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states [T, H] that a decoder layer was called with."""
    hidden_1TH: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden_1TH[0]


@dataclass(frozen=True)
class TargetOutput:
    """Result of one forward over T tokens.

    Attributes:
        hidden_TH: hidden states after the final norm.
        logits_NV: logits of the rows that were asked for, None if none were.
        features_TF: captured layers, concatenated in the order asked for, None if none were.
    """

    hidden_TH: Tensor
    logits_NV: Tensor | None
    features_TF: Tensor | None


@dataclass(frozen=True)
class TargetParts:
    """What a drafter borrows from its target; nothing is copied.

    Attributes:
        embedding_VH: input embedding, without its scale.
        embedding_scale: number that looked-up embeddings are multiplied by.
        head_VH: output head.
        head_bias_V: bias of the head, None where it has none.
        logit_softcap: logits become `cap * tanh(logits / cap)`; None for no cap.
        vocab_size: number of rows of the head.
        hidden_size: width H.
        final_norm_H: what the final norm multiplies by; None where it is not a plain scale.
        head: the head's product with packed weights, bias included, soft cap not; no gradient
            passes it. None where there is none.
        pack: lays weights [outputs, inputs] that read the same input out as the target's are, and
            returns their product; None where the target's are plain.
    """

    embedding_VH: Tensor
    embedding_scale: float
    head_VH: Tensor
    head_bias_V: Tensor | None
    logit_softcap: float | None
    vocab_size: int
    hidden_size: int
    final_norm_H: Tensor | None
    head: Callable[[Tensor], Tensor] | None = None
    pack: Callable[..., Callable[[Tensor], Tensor]] | None = None
