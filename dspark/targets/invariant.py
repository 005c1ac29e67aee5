"""Batch-invariant mode: a token's result does not depend on what else is in the batch.

Rounding makes a sum depend on the order of its terms, and kernels choose that order by the shapes
that they are given: the same token beside others, or in a prompt cut elsewhere, comes out
different in its last bits. Even functions of single numbers do, since the numbers left over at
the end of a vector loop, or of a thread's share, take other instructions (docs/LOG.md). So here
the whole decoder runs on tiles of a fixed number of rows, the last one padded. Norms, products
and activations then always have the same shapes; attention takes care of itself
(`attention.invariant`); and every expert that a tile needs works on all rows of the tile.

What fixed shapes cannot ensure (that a row's place in a tile does not matter, that no layer
mixes its rows) is tried out at load, and what fails is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.integrations.moe import ExpertsInterface

from dspark.attention.choice import Attend
from dspark.attention.paged_cache import CacheShape, PagedCache
from dspark.attention.ragged_batch import RaggedBatch, Segment
from dspark.errors import CompatibilityError
from dspark.targets.families import Anatomy
from dspark.targets.forward import RaggedCall, apply_head, run_tapped
from dspark.targets.probe import CacheLayout, relative_distance

# Few rows on a CPU, which computes each; many on an accelerator, which mostly reads weights.
_CPU_ROWS, _ACCELERATOR_ROWS = 16, 64

# Tokens of the requests that are tried out.
_LENGTHS = (11, 21, 3)


def run_in_tiles(
    anatomy: Anatomy, call: RaggedCall, taps: Sequence[int] = ()
) -> tuple[Tensor, Tensor | None]:
    """As `run_tapped`, tile by tile; the call must have a cache."""
    rows = _tile_rows(call.batch.input_ids_T.device)
    calls = [replace(call, batch=tile, tile=rows) for tile in tiles(call.batch, rows)]
    runs = [run_tapped(anatomy, each, taps) for each in calls]
    hidden_TH = torch.cat([hidden for hidden, _ in runs])
    features = [feature for _, feature in runs if feature is not None]
    return hidden_TH, torch.cat(features) if features else None


def apply_head_in_tiles(anatomy: Anatomy, hidden_NH: Tensor) -> Tensor:
    """Logits [N, V] of normed hidden states, as `apply_head`, tile by tile."""
    rows = _tile_rows(hidden_NH.device)
    outs = [hidden_NH.new_empty(0, anatomy.head.out_features)]
    for tile_NH in torch.split(hidden_NH, rows):
        padded_NH = pad(tile_NH, (0, 0, 0, rows - len(tile_NH)))
        outs.append(apply_head(anatomy, padded_NH)[: len(tile_NH)])
    return torch.cat(outs)


def _tile_rows(device: torch.device) -> int:
    return _CPU_ROWS if device.type == "cpu" else _ACCELERATOR_ROWS


def with_cache(
    batch: RaggedBatch, shapes: Sequence[CacheShape], like: Tensor
) -> tuple[RaggedBatch, PagedCache]:
    """A batch that is not cached, with a cache of its own in which every segment begins at 0."""
    own = RaggedBatch.fresh([[0] * segment.length for segment in batch.segments], like.device)
    pages = sum(len(segment.table.pages) for segment in own.segments)
    cache = PagedCache(shapes, pages, dtype=like.dtype, device=like.device)
    return replace(own, input_ids_T=batch.input_ids_T, positions_T=batch.positions_T), cache


def tiles(batch: RaggedBatch, rows: int) -> Iterator[RaggedBatch]:
    """Cut a batch into pieces of `rows` rows; the last, or only one, may have fewer."""
    total = batch.offsets[-1]
    for begin in range(0, max(total, 1), rows):
        end = min(begin + rows, total)
        segments: list[Segment] = []
        offsets = [0]
        for segment, offset in zip(batch.segments, batch.offsets, strict=False):
            low, high = max(begin, offset), min(end, offset + segment.length)
            if low < high:
                segments.append(Segment(segment.table, segment.start + low - offset, high - low))
                offsets.append(offsets[-1] + high - low)
        runs: list[tuple[int, int, int]] = []
        for row, token, count in batch.runs:
            low, high = max(begin, token), min(end, token + count)
            if low < high:
                runs.append((row + low - token, low - begin, high - low))
        yield RaggedBatch(
            batch.input_ids_T[begin:end],
            batch.positions_T[begin:end],
            batch.rows_T[begin:end],
            tuple(segments),
            tuple(offsets),
            tuple(runs),
        )


def make_invariant(model: Any, anatomy: Anatomy, layout: CacheLayout, attend: Attend) -> None:
    """Switch the experts of a model, then compare requests alone with others beside them.

    Args:
        model: the model.
        anatomy: its parts.
        layout: what it caches.
        attend: attention that does not depend on what else is in a batch.

    Raises:
        CompatibilityError: the logits of a request depend on its company, or might.
    """
    device = anatomy.embedding.weight.device
    rows = _tile_rows(device)
    run = partial(_logits, anatomy, layout, attend)
    requests = _requests(anatomy.embedding.num_embeddings)
    whole = RaggedBatch.fresh(requests, device)
    before = run([whole])
    obstacle = use_tiled_experts(model, anatomy)
    if obstacle is not None:
        raise _refusal(anatomy, obstacle)
    with _watch(anatomy) as made_alone:
        alone = torch.cat([run([RaggedBatch.fresh([ids], device)]) for ids in requests])
    with _watch(anatomy) as made_together:
        together = run([whole])
    for name, calls in [*made_alone.items(), *made_together.items()]:
        if any(len(call) % rows for call in calls):
            raise _refusal(anatomy, f"how many rows {name} works on depends on the batch")
    tolerance = 1e-3 if together.dtype == torch.float32 else 0.2
    if relative_distance(together, before) > tolerance:
        raise _refusal(anatomy, "its experts cannot be applied one by one")
    copies = run([RaggedBatch.fresh([requests[0][:1]] * rows, device)])
    pairs = (
        (together, alone),
        (_halves(run, requests, device), alone),
        (copies, alone[:1].expand_as(copies)),
    )
    if not all(torch.equal(got, expected) for got, expected in pairs):
        culprit = _first_difference(made_alone, made_together, rows) or "the model"
        raise _refusal(
            anatomy,
            f"what {culprit} makes of a row changes with the others of its batch, on "
            f"{torch.get_num_threads()} threads",
        )


@torch.no_grad()
def _logits(
    anatomy: Anatomy, layout: CacheLayout, attend: Attend, batches: Sequence[RaggedBatch]
) -> Tensor:
    """Logits of all rows of batches that are fed one after the other."""
    weight = anatomy.embedding.weight
    pages = max(_tile_rows(weight.device), sum(_LENGTHS))
    cache = PagedCache(layout.shapes, pages, dtype=weight.dtype, device=weight.device)
    layers, writers = layout.cache_layers, layout.writers
    calls = [RaggedCall(batch, cache, layers, writers, attend=attend) for batch in batches]
    hidden = [run_in_tiles(anatomy, call)[0] for call in calls]
    return apply_head_in_tiles(anatomy, torch.cat(hidden))


def _requests(vocab_size: int) -> list[list[int]]:
    """Token ids of some requests that fill a tile of a CPU and part of another."""
    ids = iter((5 + 29 * i) % vocab_size for i in range(sum(_LENGTHS)))
    return [[next(ids) for _ in range(length)] for length in _LENGTHS]


def _halves(
    run: Callable[[Sequence[RaggedBatch]], Tensor],
    requests: Sequence[Sequence[int]],
    device: torch.device,
) -> Tensor:
    """Logits of requests whose first halves come in one batch, their others in a second.

    In the second the requests stand in reverse order; the result is in order.
    """
    tables = [segment.table for segment in RaggedBatch.fresh(requests).segments]
    cuts = [len(ids) // 2 for ids in requests]
    owned = list(zip(tables, requests, cuts, strict=True))
    first = [(table, 0, ids[:cut]) for table, ids, cut in owned]
    rest = [(table, cut, ids[cut:]) for table, ids, cut in owned]
    out_NV = run([RaggedBatch.build(half, device) for half in (first, rest[::-1])])
    pieces = torch.split(out_NV, [len(ids) for _, _, ids in (*first, *rest[::-1])])
    count = len(requests)
    halves = zip(pieces[:count], reversed(pieces[count:]), strict=True)
    return torch.cat([half for pair in halves for half in pair])


@contextmanager
def _watch(anatomy: Anatomy) -> Iterator[dict[str, list[Tensor]]]:
    """Note, call by call, the rows that each module makes that holds weights but no modules."""
    seen: dict[str, list[Tensor]] = {}

    def note(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _args: Any, out: Any) -> None:
            made: Tensor = out[0] if isinstance(out, tuple) else out
            seen.setdefault(name, []).append(made.reshape(-1, made.shape[-1]).clone())

        return hook

    handles = [
        module.register_forward_hook(note(name))
        for name, module in anatomy.decoder.named_modules()
        if module.state_dict() and not list(module.children())
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _first_difference(
    alone: Mapping[str, Sequence[Tensor]], together: Mapping[str, Sequence[Tensor]], rows: int
) -> str | None:
    """The first module that makes something else of the requests side by side."""
    for name, calls in alone.items():
        ours = _real_rows(calls, _LENGTHS, rows)
        if not torch.equal(ours, _real_rows(together[name], (sum(_LENGTHS),), rows)):
            return name
    return None


def _real_rows(tiles: Sequence[Tensor], lengths: Sequence[int], rows: int) -> Tensor:
    """The rows of tiles without their padding, for batches of such lengths one after another."""
    sizes = [min(rows, length - i) for length in lengths for i in range(0, length, rows)]
    pairs = zip(tiles, sizes, strict=True)
    return torch.cat([tile.reshape(rows, -1)[:size] for tile, size in pairs])


def _refusal(anatomy: Anatomy, reason: str) -> CompatibilityError:
    return CompatibilityError(
        f"{anatomy.architecture} cannot be made batch-invariant: {reason}; leave batch_invariant "
        "out, or use another target, dtype or number of threads."
    )


# Experts of a mixture

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
