"""Which kind of product a target's weights become on this machine, and the packing itself.

The kind follows from the dtype, the processor's instructions and the weights. A short try-out
on the first weight compares it with the plain product, since a kernel may be missing its
instructions without saying so; all weights then take the same kind, and plain and speculative
decoding run the same products.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor

from dspark.errors import UsageError
from dspark.targets.fast.products import (
    FP16_BOUND,
    Kind,
    Product,
    fp16_product,
    fp16_works,
    int8_product,
    int8_works,
    loses_to_fp16,
    onednn_product,
    onednn_works,
    plain_product,
)

WeightsName = Literal["auto", "plain", "packed"]
WEIGHTS: tuple[WeightsName, ...] = get_args(WeightsName)
QuantizeName = Literal["int8"]
QUANTIZATIONS: tuple[QuantizeName, ...] = get_args(QuantizeName)

# A try-out's rows: plain decoding's, and a verification's.
_ROWS = (1, 8)
_REPEATS = 5
# The second kind must be this much faster than the first, so that noise does not decide.
_MARGIN = 1.3
# How much faster bfloat16 must be than float32, which does not round; and the numbers of a weight:
# below, a model's products hardly count; above, more say nothing new.
_SHORT_MARGIN, _FEWEST, _MOST = 1.2, 2**18, 2**24
# Relative distance to the plain product beyond which a packed one is not used.
_TOLERANCE = {"fp16": 1e-5, "onednn": 1e-5, "int8": 0.1}
# The same where weights are rounded to 16 bits, and where the plain product rounds its result.
_ROUNDED, _SHORT = 2e-3, 2e-2


@dataclass(frozen=True)
class Packer:
    """Lays weights out for one kind of product.

    Attributes:
        kind: of the products.
        shapes: by shape of a weight, whether the fp16 kind uses all threads for it.
    """

    kind: Kind
    shapes: dict[tuple[int, ...], bool] = field(default_factory=dict, repr=False)

    def pack(
        self,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None] | None = None,
        *,
        exact: bool = True,
    ) -> Product:
        """One product of weights [outputs, inputs] that read the same input.

        Args:
            weights: lie side by side in the result; they are copied, save by the plain kind.
            biases: of the same weights, if any.
            exact: fall back to another kind where fp16 would change a value. A drafter's
                weights need not be exact: what it drafts is verified either way.
        """
        biases = [None] * len(weights) if biases is None else biases
        if self.kind == "plain" or weights[0].device.type != "cpu":
            return plain_product(weights, biases)
        weight = weights[0] if len(weights) == 1 else torch.cat(list(weights))
        bias = _joined(weights, biases)
        kind = self.kind
        if kind == "fp16" and exact and loses_to_fp16(weight) > FP16_BOUND:
            kind = "onednn"
        product = self._make(kind, weight, bias)
        wide = _ROUNDED if kind == "fp16" and not exact else _TOLERANCE[kind]
        if product is not None and _agrees(product, weight, bias, wide):
            return product
        return plain_product(weights, biases)

    def _make(self, kind: Kind, weight: Tensor, bias: Tensor | None) -> Product | None:
        if kind == "int8":
            return int8_product(weight, bias)
        if kind == "onednn":
            return onednn_product(weight, bias) if onednn_works(weight.dtype) else None
        shape = tuple(weight.shape)
        if torch.get_num_threads() == 1:
            self.shapes[shape] = False
        if shape not in self.shapes:
            seconds = [
                _seconds(fp16_product(weight, bias, threads), weight) for threads in (False, True)
            ]
            self.shapes[shape] = seconds[1] < seconds[0]
        return fp16_product(weight, bias, self.shapes[shape])


PLAIN = Packer("plain")


@torch.inference_mode()
def choose_packer(name: WeightsName, quantize: QuantizeName | None, like: Tensor) -> Packer:
    """What a target's weights become.

    Args:
        name: `plain` leaves them as they are; `packed` packs them, whatever the try-out says;
            `auto` packs them where that is possible and faster.
        quantize: `int8`, or None.
        like: one of the weights.

    Raises:
        UsageError: a name is unknown, or this machine has no such kind.
    """
    check_names(name, quantize)
    if quantize is not None:
        return _quantized(like)
    if name == "plain" or like.device.type != "cpu":
        if name == "packed":
            raise UsageError(f"Weights are packed on a CPU only, not on {like.device}; use auto.")
        return PLAIN
    kinds = _candidates(like)
    if not kinds:
        if name == "packed":
            raise UsageError(
                f"This machine has no packed product for {like.dtype} weights; use auto."
            )
        return PLAIN
    best = _fastest([*kinds, "plain"] if name == "auto" else kinds, like)
    return Packer(best) if best != "plain" else PLAIN


def check_names(name: str, quantize: str | None) -> None:
    """Refuse names that are unknown or exclude each other.

    Raises:
        UsageError: names the first one.
    """
    if name not in WEIGHTS:
        raise UsageError(f"weights is {name!r}, but must be one of {', '.join(WEIGHTS)}.")
    if quantize is None:
        return
    if quantize not in QUANTIZATIONS:
        raise UsageError(f"quantize is {quantize!r}, but must be {', '.join(QUANTIZATIONS)}.")
    if name == "plain":
        raise UsageError("Quantised weights are packed ones; leave weights at auto.")


def _quantized(like: Tensor) -> Packer:
    if like.device.type != "cpu" or not int8_works():
        raise UsageError(f"int8 products are not available on {like.device}; leave quantize out.")
    return Packer("int8")


def _candidates(like: Tensor) -> list[Kind]:
    """Kinds that keep these weights' values, the preferred one first."""
    kinds: list[Kind] = []
    if onednn_works(like.dtype):
        kinds.append("onednn")
    known = like.dtype in (torch.float32, torch.bfloat16)
    if known and fp16_works() and loses_to_fp16(like) <= FP16_BOUND:
        kinds.insert(0 if like.dtype == torch.float32 else len(kinds), "fp16")
    return kinds


def _fastest(kinds: Sequence[Kind], like: Tensor) -> Kind:
    packers = [Packer(kind) for kind in kinds]
    products = [packer.pack([like]) for packer in packers]
    seconds = [_seconds(product, like) for product in products]
    best = min(range(len(kinds)), key=seconds.__getitem__)
    return kinds[best] if seconds[0] > _MARGIN * seconds[best] else kinds[0]


def _fastest_seconds(packers: Sequence[Packer], weight: Tensor) -> float:
    """What the rows of a try-out take by the fastest of some kinds; one that fails is plain."""
    return min(_seconds(packer.pack([weight]), weight) for packer in packers)


@cache
def quicker_cpu_dtype(outputs: int, inputs: int) -> torch.dtype:
    """bfloat16 where its packed products are measured faster than float32's best, else float32.

    Tried out once per process and shape, with one and with eight rows, and only on a processor
    that has instructions for bfloat16.

    Args:
        outputs: of the model's largest weight in a layer.
        inputs: of the same.
    """
    if outputs * inputs < _FEWEST or not onednn_works(torch.bfloat16):
        return torch.float32
    generator = torch.Generator().manual_seed(0)
    rows = max(1, min(outputs, _MOST // inputs))
    with torch.inference_mode():
        weight = torch.randn(rows, inputs, generator=generator).bfloat16()
        short = _fastest_seconds([Packer("onednn")], weight)
        kinds = [Packer("plain"), Packer("fp16"), Packer("onednn")]
        long = _fastest_seconds(kinds, weight.float())
    return torch.bfloat16 if _SHORT_MARGIN * short < long else torch.float32


def _seconds(product: Product, weight: Tensor) -> float:
    """What the rows of a try-out take together, at their quickest."""
    total = 0.0
    for count in _ROWS:
        rows = _rows(count, weight)
        quickest = float("inf")
        for _ in range(_REPEATS):
            start = time.perf_counter()
            product(rows)
            quickest = min(quickest, time.perf_counter() - start)
        total += quickest
    return total


def _agrees(product: Product, weight: Tensor, bias: Tensor | None, wide: float) -> bool:
    """Whether a product is the plain one, up to rounding, on the first outputs."""
    rows = _rows(3, weight)
    few = weight[:256]
    expected = torch.nn.functional.linear(rows, few, None if bias is None else bias[:256]).float()
    distance = (product(rows)[:, :256].float() - expected).norm() / expected.norm().clamp_min(1e-20)
    return float(distance) <= (wide if weight.dtype == torch.float32 else max(wide, _SHORT))


def _rows(count: int, weight: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, weight.shape[1], generator=generator).to(weight.dtype)


def _joined(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor | None:
    """The biases of several weights as one; those that are missing are 0."""
    if all(bias is None for bias in biases):
        return None
    pairs = zip(weights, biases, strict=True)
    return torch.cat([w.new_zeros(len(w)) if b is None else b for w, b in pairs])
