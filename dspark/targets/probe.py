"""A few tiny forwards at load time that show whether a model runs correctly as a ragged target.

They learn what each layer caches and compare the ragged forward, cut into pieces and mixed with
another request, with the model's own forward. What cannot be served is refused by name here, not
decoded wrongly later: recurrent layers, options that our attention does not know, undeclared
scales.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dspark.attention.paged_cache import BlockTable, CacheShape, PagedCache
from dspark.attention.ragged_batch import RaggedBatch
from dspark.errors import CompatibilityError, NumericsError
from dspark.targets.families import Anatomy, StateNeededError
from dspark.targets.forward import (
    IMPLEMENTATION,
    LayerCall,
    LayoutLostError,
    RaggedCall,
    apply_head,
    layer_input,
    run_decoder,
)
from dspark.targets.loading import is_quantised

# Tokens of the two probe requests; the first is fed in two pieces of 3 and 2.
_LONG, _SHORT, _CUT = 5, 2, 3
# Tokens per page there, so that the long request's pages can lie apart.
_PAGE = 4
# Of a request's logits, relative, when others beside it say something else: steps of eight bits
# that a last bit has moved stay below, scales that all rows share do not.
_LEAK = 0.02


@dataclass(frozen=True)
class CacheLayout:
    """What a model caches.

    Attributes:
        shapes: one entry per cache layer.
        cache_layers: cache layer of each decoder layer.
        writers: whether the decoder layer writes to it, or reads what another has written.
        windows: number of keys that a row of each decoder layer sees; None for all.
    """

    shapes: tuple[CacheShape, ...]
    cache_layers: tuple[int, ...]
    writers: tuple[bool, ...]
    windows: tuple[int | None, ...] = ()


@torch.no_grad()
def probe(model: Any, anatomy: Anatomy) -> CacheLayout:
    """Switch a model to ragged attention and check that it still computes the same.

    Raises:
        StateNeededError: layers keep more than keys and values, or attend in their own way.
        CompatibilityError: the architecture cannot be served.
        NumericsError: the model itself computes NaN or infinite logits.
    """
    parameters = inspect.signature(anatomy.decoder.forward).parameters.values()
    if all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in parameters):
        raise StateNeededError(
            f"{anatomy.architecture} is not supported as a target: its forward takes no extra "
            "keyword arguments; use another target."
        )
    long, short = _token_ids(anatomy, _LONG), _token_ids(anatomy, _SHORT)
    model.set_attn_implementation("eager")
    expected = torch.cat([_own_logits(model, anatomy, ids) for ids in (long, short)])
    if not bool(expected.isfinite().all()):
        raise NumericsError(
            f"{anatomy.architecture} computes logits that are not finite in "
            f"{anatomy.embedding.weight.dtype}; use another dtype or check the weights."
        )
    model.set_attn_implementation(IMPLEMENTATION)
    calls = _check_whole(model, anatomy, long)
    layout = _cache_layout(calls)
    got = _ragged_logits(anatomy, layout, long, short)
    quantised = is_quantised(model.config)
    # Where activations are rounded to few bits, a last bit that differs may become a step.
    exact = anatomy.embedding.weight.dtype == torch.float32 and not quantised
    if relative_distance(got, expected) > (1e-3 if exact else 0.2):
        raise _refusal(
            anatomy,
            "its logits change when a request is fed in pieces beside another one "
            f"(relative difference {relative_distance(got, expected):.2g})",
        )
    if quantised:
        other = [(token + 1) % anatomy.embedding.num_embeddings for token in long]
        beside = _ragged_logits(anatomy, layout, other, short)
        if relative_distance(got[_LONG:], beside[_LONG:]) > _LEAK:
            raise _refusal(
                anatomy,
                "a request gets other logits beside other requests, as with quantised products "
                "that share one scale among all tokens",
            )
    return layout


def _check_whole(model: Any, anatomy: Anatomy, ids: list[int]) -> list[LayerCall]:
    """One forward of the whole model: who calls our attention, and does our head agree."""
    calls: list[LayerCall] = []
    hidden_states: list[Tensor] = []
    embedded: list[Tensor] = []
    batch = RaggedBatch.fresh([ids], anatomy.embedding.weight.device)
    hooks = [
        anatomy.decoder.register_forward_hook(
            lambda _module, _args, out: hidden_states.append(out.last_hidden_state[0])
        ),
        anatomy.layers[0].register_forward_pre_hook(
            lambda _module, args, kwargs: embedded.append(layer_input(args, kwargs)),
            with_kwargs=True,
        ),
    ]
    try:
        own_NV = model(
            input_ids=batch.input_ids_T.unsqueeze(0),
            position_ids=batch.positions_T.unsqueeze(0),
            use_cache=False,
            ragged=RaggedCall(batch, None, calls=calls),
        ).logits[0]
    except LayoutLostError as error:
        reason = "it does not pass keyword arguments on to its attention"
        raise _refusal(anatomy, reason) from error
    finally:
        for hook in hooks:
            hook.remove()
    _check_calls(anatomy, calls)
    tolerance = 1e-4 if own_NV.dtype == torch.float32 else 2e-2
    if relative_distance(apply_head(anatomy, hidden_states[0]), own_NV) > tolerance:
        raise _refusal(anatomy, "its logits are not its head's output, soft-capped as declared")
    plain_TH = anatomy.embedding.weight[batch.input_ids_T] * anatomy.embedding_scale
    if not anatomy.family.adds_positions and relative_distance(embedded[0], plain_TH) > tolerance:
        raise _refusal(anatomy, "its embeddings are scaled in a way that is not declared")
    return calls


def _check_calls(anatomy: Anatomy, calls: Sequence[LayerCall]) -> None:
    found, needed = sorted(call.layer for call in calls), list(range(len(anatomy.layers)))
    if found != needed:
        without = len(set(needed) - set(found))
        raise StateNeededError(
            f"{anatomy.architecture} is not supported as a target: {without} of its {len(needed)} "
            "layers do not go through transformers' attention interface (recurrent, hybrid or "
            "custom attention); use another target."
        )
    declared = getattr(anatomy.config, "layer_types", None)
    for call in calls:
        if call.unknown:
            raise _refusal(anatomy, f"its attention uses {', '.join(call.unknown)}")
        if declared and (declared[call.layer] == "sliding_attention") != (call.window is not None):
            raise _refusal(
                anatomy,
                f"layer {call.layer} is declared {declared[call.layer]!r} but passes the window "
                f"{call.window}",
            )


def _cache_layout(calls: Sequence[LayerCall]) -> CacheLayout:
    """Give each distinct pair of keys and values a cache layer."""
    shapes: list[CacheShape] = []
    cache_layers: list[int] = []
    writers: list[bool] = []
    owners: dict[tuple[int, int], int] = {}
    for call in sorted(calls, key=lambda call: call.layer):
        pair = (call.key_1GTD.data_ptr(), call.value_1GTD.data_ptr())
        writers.append(pair not in owners)
        if pair not in owners:
            owners[pair] = len(shapes)
            _, heads, _, key_dim = call.key_1GTD.shape
            shapes.append(CacheShape(heads, key_dim, call.value_1GTD.shape[-1]))
        cache_layers.append(owners[pair])
    windows = tuple(call.window for call in sorted(calls, key=lambda call: call.layer))
    return CacheLayout(tuple(shapes), tuple(cache_layers), tuple(writers), windows)


def _ragged_logits(
    anatomy: Anatomy, layout: CacheLayout, long: list[int], short: list[int]
) -> Tensor:
    """Logits of both requests: a piece of the long one, then its rest beside the short one."""
    weight = anatomy.embedding.weight
    cache = PagedCache(layout.shapes, 4, page_size=_PAGE, dtype=weight.dtype, device=weight.device)
    mine, other = BlockTable((3, 1), _PAGE), BlockTable((2,), _PAGE)
    steps = [[(mine, 0, long[:_CUT])], [(other, 0, short), (mine, _CUT, long[_CUT:])]]
    logits: list[Tensor] = []
    for parts in steps:
        batch = RaggedBatch.build(parts, weight.device)
        call = RaggedCall(batch, cache, layout.cache_layers, layout.writers)
        logits.append(apply_head(anatomy, run_decoder(anatomy, call)))
    return torch.cat((logits[0], logits[1][_SHORT:], logits[1][:_SHORT]))


def _own_logits(model: Any, anatomy: Anatomy, ids: list[int]) -> Tensor:
    ids_1T = torch.tensor([ids], device=anatomy.embedding.weight.device)
    logits_TV: Tensor = model(input_ids=ids_1T, use_cache=False).logits[0]
    return logits_TV


def _token_ids(anatomy: Anatomy, count: int) -> list[int]:
    return [(11 + 17 * i) % anatomy.embedding.num_embeddings for i in range(count)]


def relative_distance(a: Tensor, b: Tensor) -> float:
    """Relative distance ||a - b|| / ||b||; infinite where a number is not finite."""
    a, b = a.double(), b.double()
    ratio = (a - b).norm() / b.norm().clamp_min(1e-30)
    return float(ratio) if bool(ratio.isfinite()) else float("inf")


def _refusal(anatomy: Anatomy, reason: str) -> CompatibilityError:
    return CompatibilityError(
        f"{anatomy.architecture} is not supported as a target: {reason}; use another target."
    )
