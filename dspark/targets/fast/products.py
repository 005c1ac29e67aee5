"""Products of activations with fixed weights, the weights laid out for their kernel once.

Kinds, and what each does to the numbers:

plain    torch's `linear` on the weights as they are.
onednn   oneDNN's packed `linear` in the model's dtype: another order of summation.
fp16     weights as 16-bit floats, activations and sums in fp32 (FBGEMM). Weights of a bfloat16 or
         float16 checkpoint keep their values, except that those below 2^-17 are rounded to
         multiples of 2^-24. It reads half the memory of fp32 and computes in fp32.
int8     weights as 8-bit integers with one scale per output, activations as 7- or 8-bit integers
         with one scale per row, exact integer sums (FBGEMM): a row's result does not depend on
         its company. It changes values.

Several weights that read the same input become one product, whose outputs lie side by side.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Kind = Literal["plain", "onednn", "fp16", "int8"]
Product = Callable[[Tensor], Tensor]
"""x [.., inputs] -> [.., outputs], in the dtype of x"""

# Half the distance of the smallest 16-bit floats: all that a weight may lose in kind fp16.
FP16_BOUND = 2.0**-25
_FP16_MAX = 65504.0
# Rows that oneDNN lays weights out for; others work too.
_ONEDNN_ROWS = 8
# An absolute value of 0 gives no scale.
_TINY = 1e-20


def plain_product(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Product:
    """`linear` on weights [outputs, inputs] as they are: nothing is copied."""
    if len(weights) == 1:
        weight, bias = weights[0], biases[0]
        return lambda x: F.linear(x, weight, bias)
    pairs = list(zip(weights, biases, strict=True))
    return lambda x: torch.cat([F.linear(x, weight, bias) for weight, bias in pairs], -1)


def onednn_product(weight: Tensor, bias: Tensor | None) -> Product:
    """`linear` by oneDNN on a packed copy of a weight [outputs, inputs]."""
    operators: Any = torch.ops.mkldnn
    packed = operators._reorder_linear_weight(weight.contiguous(), _ONEDNN_ROWS)
    linear = operators._linear_pointwise.default
    return lambda x: linear(x, packed, bias, "none", [], "")


def fp16_product(weight: Tensor, bias: Tensor | None, threads: bool) -> Product:
    """`linear` by FBGEMM in fp32 on a packed 16-bit copy of a weight [outputs, inputs].

    Args:
        weight: what is packed, of any floating dtype.
        bias: [outputs].
        threads: use all of torch's threads, at more overhead per call; the bits are the same.
    """
    dtype, weight = weight.dtype, weight.float().contiguous()
    bias = None if bias is None else bias.float()
    product: Product
    if threads or not _has_serial_fp16():
        operators: Any = torch.ops.quantized
        held = operators.linear_prepack_fp16(weight, bias)
        linear = operators.linear_dynamic_fp16.default
        product = lambda x: linear(x, held)  # noqa: E731
    else:
        with _silent():
            packed = torch.fbgemm_pack_gemm_matrix_fp16(weight)
        serial = torch.fbgemm_linear_fp16_weight_fp32_activation
        product = lambda x: serial(x, packed, bias)  # noqa: E731
    if dtype == torch.float32:
        return product
    return lambda x: product(x.float()).to(dtype)


def int8_product(weight: Tensor, bias: Tensor | None) -> Product:
    """`linear` by FBGEMM in 8-bit integers on a packed copy of a weight [outputs, inputs].

    Each row of activations is divided by its own largest absolute value, so that one fixed scale
    serves all of them: rows stay independent, as lossless decoding needs.
    """
    dtype, operators, levels = weight.dtype, torch.ops.quantized, _activation_levels()
    weight = weight.float()
    scale_N = weight.abs().amax(1).clamp_min(_TINY) / 127
    with _silent():
        zeros_N = torch.zeros(len(scale_N), dtype=torch.int64)
        integers = torch.quantize_per_channel(weight, scale_N.double(), zeros_N, 0, torch.qint8)
    held = operators.linear_prepack(integers, None)
    linear: Any = operators.linear_with_input_q_dq_qweight_dq_output_fp32.default
    step, zero = 1.0 / levels, levels + 1

    def product(x: Tensor) -> Tensor:
        x = x.float()
        largest = torch.linalg.vector_norm(x, torch.inf, -1, True).clamp_min_(_TINY)
        out: Tensor = linear(x / largest, step, zero, held)
        out *= largest
        return (out if bias is None else out + bias).to(dtype)

    return product


def _activation_levels() -> int:
    """Largest integer of an activation: 63 where the kernel adds pairs of products in 16 bits."""
    return 127 if torch.cpu._is_vnni_supported() else 63


def loses_to_fp16(weight: Tensor) -> float:
    """The most that a value changes as a 16-bit float; infinite where one is too large.

    For values of bfloat16, which an integer test finds at once, the bound holds below the largest.
    """
    most = 0.0
    for rows in torch.split(weight, 1024):
        largest = float(rows.abs().max())
        if not largest <= _FP16_MAX:
            return float("inf")
        short = rows.dtype == torch.bfloat16
        if not short and rows.dtype == torch.float32:
            short = not bool(torch.bitwise_and(rows.view(torch.int32), 0xFFFF).any())
        lost = FP16_BOUND if short else float((rows.half().to(rows.dtype) - rows).abs().max())
        most = max(most, lost)
    return most


@cache
def fp16_works() -> bool:
    """Whether this torch and this machine have the fp16 kind."""
    return _gives_the_identity(lambda eye: fp16_product(eye, None, threads=True))


@cache
def onednn_works(dtype: torch.dtype) -> bool:
    """Whether this torch and this machine have the onednn kind, with instructions for the dtype."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if dtype == torch.bfloat16 and not torch.cpu._is_avx512_bf16_supported():
        return False
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    return _gives_the_identity(lambda eye: onednn_product(eye.to(dtype), None), dtype)


@cache
def int8_works() -> bool:
    """Whether this torch and this machine have the int8 kind."""
    return _gives_the_identity(lambda eye: int8_product(eye, None))


def _gives_the_identity(
    make: Callable[[Tensor], Product], dtype: torch.dtype = torch.float32
) -> bool:
    """Try a kind out on the unit matrix; an operator that is missing or refuses raises."""
    rows = torch.linspace(-1, 1, 3 * 32).view(3, 32).to(dtype)
    try:
        with torch.inference_mode():
            out = make(torch.eye(32))(rows)
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return bool((out - rows).abs().max() < 0.02)


@cache
def _has_serial_fp16() -> bool:
    """Whether the older entrance to the fp16 kernel works; it costs less and knows no threads."""
    try:
        with _silent(), torch.inference_mode():
            packed = torch.fbgemm_pack_gemm_matrix_fp16(torch.eye(16))
            torch.fbgemm_linear_fp16_weight_fp32_activation(torch.ones(1, 16), packed, None)
    except (RuntimeError, AttributeError):
        return False
    return True


@contextmanager
def _silent() -> Iterator[None]:
    """No word about operators that a later torch will not have: then they are found missing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
