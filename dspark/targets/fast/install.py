"""A target's weights packed at load, and its decoder flattened where its layers are known."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dspark.targets.families import Anatomy
from dspark.targets.fast.decoder import FlatDecoder, build_decoder, run_two_steps
from dspark.targets.fast.packing import PLAIN, Packer, QuantizeName, WeightsName, choose_packer
from dspark.targets.fast.products import Product
from dspark.targets.probe import CacheLayout, relative_distance

_logger = logging.getLogger(__name__)

# Of hidden states with packed weights to those without, relative.
_TOLERANCE = {"fp16": 1e-4, "onednn": 1e-4, "int8": 0.5}
_SHORT_TOLERANCE = 0.05


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
