"""What a target runs on: a model's parts, probed, with the attention and fast paths that it gets.

Each step is tried out on the model itself. A model that keeps more than keys and values runs
through its own cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dspark.attention.choice import PLAIN as PLAIN_ATTENTION
from dspark.attention.choice import AttentionBackend, AttentionName, choose_attention
from dspark.errors import UsageError
from dspark.targets.families import Anatomy, StateNeededError, dissect
from dspark.targets.fast.graphs import GraphSwitch, Replayer, choose_graphs
from dspark.targets.fast.install import (
    PLAIN_PATH,
    FastPath,
    compile_layers,
    fuse_norms,
    install_fast_path,
)
from dspark.targets.fast.packing import QuantizeName, WeightsName, check_names
from dspark.targets.invariant import make_invariant
from dspark.targets.loading import is_quantised, quiet
from dspark.targets.own_cache import OwnCacheRunner
from dspark.targets.probe import CacheLayout, probe

# Said by configurations that name no limit of their own.
_NO_LIMIT = 1 << 20
_NO_CACHE = CacheLayout((), (), ())


@dataclass(frozen=True)
class Modes:
    """How a target runs; see `Target.load`."""

    attention: AttentionName
    batch_invariant: bool
    cuda_graphs: GraphSwitch
    compile: bool
    weights: WeightsName = "auto"
    quantize: QuantizeName | None = None

    @property
    def asks_for_pages(self) -> bool:
        """Whether a mode is asked for that models with a cache of their own do not have."""
        packed = self.weights == "packed" or self.quantize is not None
        return packed or self.batch_invariant or self.compile or self.cuda_graphs is True

    def __post_init__(self) -> None:
        check_names(self.weights, self.quantize)
        packed = self.weights == "packed" or self.quantize is not None
        if packed and (self.compile or self.batch_invariant):
            other = "compile" if self.compile else "batch_invariant"
            raise UsageError(
                f"Packed weights and {other} exclude each other: {other} runs the model's own "
                "modules; leave one of them out."
            )
        if self.compile and self.batch_invariant:
            raise UsageError(
                "compile and batch_invariant exclude each other: compiled layers may choose "
                "their kernels by the number of rows; leave one of them out."
            )


@dataclass(frozen=True)
class Prepared:
    """A model that is ready to run.

    Attributes:
        anatomy: its parts.
        layout: what its layers cache.
        attention: what attends over the cache.
        batch_invariant: whether results are independent of what else is in a batch.
        compiled: whether its decoder layers run through torch.compile.
        fast: what takes the place of its modules.
        replayer: replays decoding steps as CUDA graphs; None where they run eagerly.
        own: runs it through its own cache; None where it runs over pages.
    """

    anatomy: Anatomy
    layout: CacheLayout = _NO_CACHE
    attention: AttentionBackend = PLAIN_ATTENTION
    batch_invariant: bool = False
    compiled: bool = False
    fast: FastPath = PLAIN_PATH
    replayer: Replayer | None = None
    own: OwnCacheRunner | None = None


def prepare(model: Any, modes: Modes, name: str) -> Prepared:
    """Freeze a model and give it what its modes ask for.

    Args:
        model: of transformers; it runs through what this returns only.
        modes: as asked for.
        name: of the target, for errors.

    Raises:
        CompatibilityError: the architecture is not supported, or not in this mode.
        NumericsError: the model computes NaN or infinite numbers.
        UsageError: the attention, weights or CUDA graphs cannot be used.
    """
    attention = getattr(model.config, "_attn_implementation", None)
    try:
        return _over_pages(model, modes, name)
    except StateNeededError:
        if modes.asks_for_pages:
            raise
    if attention is not None:
        model.set_attn_implementation(attention)
    anatomy = dissect(model, ragged=False)
    model.eval().requires_grad_(False)
    with quiet():
        return Prepared(anatomy, own=OwnCacheRunner(model, anatomy))


def _over_pages(model: Any, modes: Modes, name: str) -> Prepared:
    anatomy = dissect(model)
    if anatomy.embedding.weight.dtype == torch.float32:
        torch.set_float32_matmul_precision("highest")  # no TF32
    model.eval().requires_grad_(False)
    with quiet():
        layout = probe(model, anatomy)
    fuse_norms(model)
    weight = anatomy.embedding.weight
    backend = choose_attention(
        modes.attention,
        layout.shapes,
        dtype=weight.dtype,
        device=weight.device,
        batch_invariant=modes.batch_invariant,
    )
    if modes.batch_invariant:
        make_invariant(model, anatomy, layout, backend.attend)
    compiled = modes.compile and compile_layers(anatomy, layout)
    fast = PLAIN_PATH
    quantised = is_quantised(model.config)
    if quantised and (modes.quantize is not None or modes.weights == "packed"):
        raise UsageError(f"{name} is quantised already; leave weights and quantize out.")
    if not (modes.compile or modes.batch_invariant or quantised):
        fast = install_fast_path(anatomy, layout, modes.weights, modes.quantize)
    replayer = choose_graphs(
        modes.cuda_graphs,
        anatomy,
        layout,
        backend,
        max_context(anatomy),
        batch_invariant=modes.batch_invariant,
    )
    return Prepared(anatomy, layout, backend, modes.batch_invariant, compiled, fast, replayer)


def max_context(anatomy: Anatomy) -> int:
    """The longest sequence that a model was made for, in tokens."""
    return getattr(anatomy.config, "max_position_embeddings", None) or _NO_LIMIT
