"""Fast paths of a target, installed at load: fused norms, compiled layers, packed weights.

Norms: transformers writes an RMS norm as five small operations. On small models a CPU spends more
time dispatching these than computing them, so a module whose output torch's own `rms_norm`
reproduces bit for bit gets that as its forward. In fp32 most do; in other dtypes the rounding in
between differs, and they are left as they are.

`torch.compile`, where that is asked for: what lies between a layer's attention calls (norms,
projections, rotary embedding, gated MLP) is compiled once for all layers and numbers of rows;
attention itself and the hooks that take features stay as they are. It costs seconds to minutes at
the first steps and wins where a step is made of many small operations. Results are rounded
differently, by as much as another order of summation rounds them.

Weights are packed, and the decoder is flattened where its layers are known.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm
from transformers import AttentionInterface

from dspark.errors import first_line
from dspark.targets.families import Anatomy
from dspark.targets.fast.decoder import TRIAL_STEPS, FlatDecoder, build_decoder, run_two_steps
from dspark.targets.fast.packing import PLAIN, Packer, QuantizeName, WeightsName, choose_packer
from dspark.targets.fast.products import Product
from dspark.targets.forward import IMPLEMENTATION, ragged_forward
from dspark.targets.probe import CacheLayout, relative_distance

_logger = logging.getLogger(__name__)

# Of hidden states to those of the model's own forward, relative: with packed weights, and where
# products are rounded to 16 bits or compiled.
_TOLERANCE = {"fp16": 1e-4, "onednn": 1e-4, "int8": 0.5}
_SHORT_TOLERANCE = 0.05

# The published names of a norm's epsilon.
_EPSILONS = ("variance_epsilon", "eps")
_TRIAL_ROWS = 64


@torch.inference_mode()
def compile_layers(anatomy: Anatomy, layout: CacheLayout) -> bool:
    """Compile the decoder layers in place, and try them out on a prompt and two steps.

    Returns:
        Whether they are compiled; where that fails they run as before, and a warning says why.
    """
    expected = run_two_steps(anatomy, layout, None)
    eager = [layer.forward for layer in anatomy.layers]
    # Attention reads its batch's layout from Python objects, which are new at each step.
    AttentionInterface.register(IMPLEMENTATION, torch.compiler.disable(ragged_forward))  # type: ignore[no-untyped-call]
    for layer in anatomy.layers:
        layer.forward = torch.compile(layer.forward, dynamic=True)
    try:
        found = run_two_steps(anatomy, layout, None)
        ends = list(accumulate(TRIAL_STEPS, initial=0))
        steps = [slice(*pair) for pair in pairwise(ends)]
        distance = max(relative_distance(found[rows], expected[rows]) for rows in steps)
        if distance <= _SHORT_TOLERANCE:
            return True
        reason = f"a compiled step differs from the same step run eagerly by {distance:.2g}"
    except Exception as error:  # whatever a compiler raises, the layers can run eagerly
        reason = first_line(error)
    for layer, forward in zip(anatomy.layers, eager, strict=True):
        layer.forward = forward
    _logger.warning("%s runs without torch.compile: %s.", anatomy.architecture, reason)
    return False


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


@dataclass(frozen=True)
class FastPath:
    """What takes the place of a target's modules.

    Attributes:
        packer: how its weights are laid out, and a drafter's may be.
        decoder: runs its layers; None where its modules do.
        head: its output head without soft cap; None where its module is that.
    """

    packer: Packer
    decoder: FlatDecoder | None = None
    head: Product | None = None

    @property
    def name(self) -> str:
        """The kind of its products, and whether its decoder is flat."""
        return f"{self.packer.kind} flat" if self.decoder else self.packer.kind


PLAIN_PATH = FastPath(PLAIN)


@torch.no_grad()
def install_fast_path(
    anatomy: Anatomy, layout: CacheLayout, name: WeightsName, quantize: QuantizeName | None
) -> FastPath:
    """Pack a model's weights in place, if that is asked for or pays.

    The layers' own weights are released, one layer at a time where the decoder is flat. Embedding
    and head stay as tables, since tokens are looked up in them and drafters borrow them.

    Raises:
        UsageError: what is asked for is not possible here.
    """
    linear = [m for m in anatomy.layers.modules() if type(m) is nn.Linear]
    like = max((m.weight for m in linear), key=Tensor.numel, default=anatomy.head.weight)
    packer = choose_packer(name, quantize, like)
    if packer.kind == "plain":
        return PLAIN_PATH
    decoder, reason = build_decoder(anatomy, layout, packer)
    if decoder is None:
        _logger.info("%s keeps its modules: %s.", anatomy.architecture, reason)
        if not _pack_modules(anatomy, layout, linear, packer):
            return PLAIN_PATH
    head = packer.pack([anatomy.head.weight], [anatomy.head.bias])
    return FastPath(packer, decoder, head)


def _pack_modules(
    anatomy: Anatomy, layout: CacheLayout, modules: list[nn.Linear], packer: Packer
) -> bool:
    """Pack each projection on its own; all are as before where a model then computes otherwise."""
    expected = run_two_steps(anatomy, layout, None)
    weights = [module.weight for module in modules]
    for module in modules:
        vars(module)["forward"] = packer.pack([module.weight], [module.bias])
        module.weight = nn.Parameter(module.weight.new_empty(0), requires_grad=False)
    try:
        distance = relative_distance(run_two_steps(anatomy, layout, None), expected)
        reason = f"packed weights change a step by {distance:.2g}"
    except Exception as error:  # a model that reads the weights themselves
        distance, reason = float("inf"), str(error)
    exact = expected.dtype == torch.float32 or packer.kind == "int8"
    if distance <= (_TOLERANCE[packer.kind] if exact else _SHORT_TOLERANCE):
        return True
    for module, weight in zip(modules, weights, strict=True):
        module.weight = nn.Parameter(weight, requires_grad=False)
        del vars(module)["forward"]
    _logger.warning("%s runs with plain weights: %s.", anatomy.architecture, reason)
    return False
