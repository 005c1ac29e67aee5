"""Weights in 8 or 4 bits with a scale per block, as DeepSeek stores them: `X.weight` and `X.scale`.

8 bits are float8 e4m3 with a scale per 128 x 128 numbers (`quantization_config.weight_block_size`);
4 bits are two floats e2m1 a byte, the lower half first, with a scale per 32 numbers of a row.
Scales are powers of two (float8 e8m0, in some files as bytes), or, beside 8 bits, float32.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dspark.errors import CheckpointError, CompatibilityError

BLOCK = (128, 128)
FP4_BLOCK = 32
_WEIGHT, _SCALE = ".weight", ".scale"
_FP8, _E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
_FP8_MOST, _FP4_MOST, _E8M0_BIAS = 448.0, 6.0, 127
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_PLAIN = (torch.bfloat16, torch.float16, torch.float32)


def dequantised(
    state: Mapping[str, Tensor], where: str, block: tuple[int, int] = BLOCK
) -> dict[str, Tensor]:
    """All tensors as floats, without scales: bf16, in which these products are exact.

    With float32 scales the products are float32.

    Args:
        state: a file's tensors; on the meta device too.
        where: what to call it in errors.
        block: rows and columns of an 8-bit block.

    Raises:
        CheckpointError: a scale is missing or has a wrong shape.
        CompatibilityError: weights or scales are of another kind.
    """
    weights = {name for name in state if name.endswith(_WEIGHT)}
    scales = {name for name in state if name.endswith(_SCALE)}
    found = {name: state[name] for name in state.keys() - weights - scales}
    for name in sorted(scales):
        if name.removesuffix(_SCALE) + _WEIGHT not in weights:
            raise CheckpointError(
                f"{where} has {name}, but no {name.removesuffix(_SCALE)}{_WEIGHT} that it scales."
            )
    for name in weights:
        scale = name.removesuffix(_WEIGHT) + _SCALE
        found[name] = _whole(state[name], state.get(scale), name, scale, where, block)
    for name, tensor in found.items():
        if tensor.dtype not in _PLAIN:
            raise _unknown(where, name, tensor)
    return found


def _whole(
    weight: Tensor,
    scale: Tensor | None,
    name: str,
    scale_name: str,
    where: str,
    block: tuple[int, int],
) -> Tensor:
    if weight.dtype in _PLAIN and scale is None:
        return weight
    packed = weight.dtype in (torch.int8, torch.uint8)
    if weight.dim() != 2 or (not packed and weight.dtype != _FP8):
        raise _unknown(where, name, weight)
    if scale is None:
        raise CheckpointError(
            f"{where} has {name} in {_named(weight)}, but no {scale_name}, without which its "
            "numbers are unknown; fetch the file again."
        )
    if scale.dtype not in (_E8M0, torch.uint8, torch.float32) or (
        packed and scale.dtype == torch.float32
    ):
        raise _unknown(where, scale_name, scale)
    rows, columns = weight.shape[0], weight.shape[1] * (2 if packed else 1)
    by_rows, by_columns = (1, FP4_BLOCK) if packed else block
    shape = (-(-rows // by_rows), -(-columns // by_columns))
    if tuple(scale.shape) != shape:
        raise CheckpointError(
            f"{where} has {scale_name} of shape {list(scale.shape)}, but a scale for each "
            f"{by_rows} x {by_columns} numbers of {name} makes {list(shape)}."
        )
    factor = _factors(scale).repeat_interleave(by_rows, 0)[:rows]
    factor = factor.repeat_interleave(by_columns, 1)[:, :columns]
    return (_unpacked(weight) if packed else weight.to(factor.dtype)) * factor


def _factors(scale: Tensor) -> Tensor:
    if scale.dtype == torch.float32:
        return scale
    return scale.view(_E8M0).to(torch.bfloat16)


def _unpacked(weight: Tensor) -> Tensor:
    """Two numbers of each byte, [rows, 2 columns] in bf16."""
    table = torch.tensor([*_FP4, *(-x for x in _FP4)], dtype=torch.bfloat16, device=weight.device)
    codes = weight.view(torch.uint8)
    pairs = torch.stack((codes & 15, codes >> 4), -1)
    return table[pairs.flatten(-2).int()]


def to_fp8(weight: Tensor, block: tuple[int, int] = BLOCK) -> tuple[Tensor, Tensor]:
    """A matrix in e4m3, and the power of two of each block (e8m0).

    What was read from such a file is given back to the bit in its values.
    """
    exponents = _exponents(_blocks(weight.abs(), block).amax((1, 3)), _FP8_MOST)
    rows, columns = weight.shape
    factor = exponents.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)
    return (weight.float() * torch.exp2(-factor[:, :columns])).to(_FP8), _as_e8m0(exponents)


def to_fp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix in e2m1, two numbers a byte (int8), and the power of two of 32 numbers (e8m0).

    What was read from such a file is given back to the bit in its values.

    Raises:
        CompatibilityError: its rows are no multiple of 32 long.
    """
    if weight.shape[1] % FP4_BLOCK:
        raise CompatibilityError(
            f"A matrix of {list(weight.shape)} has rows that are no multiple of {FP4_BLOCK} long, "
            "so it cannot be stored in 4 bits."
        )
    blocks = weight.float().reshape(weight.shape[0], -1, FP4_BLOCK)
    exponents = _exponents(blocks.abs().amax(-1), _FP4_MOST)
    scaled = (blocks * torch.exp2(-exponents).unsqueeze(-1)).flatten(1)
    table = torch.tensor(_FP4)
    codes = torch.bucketize(scaled.abs(), (table[:-1] + table[1:]) / 2)
    codes = codes.to(torch.uint8) | (scaled.signbit().to(torch.uint8) << 3)
    packed = codes[:, ::2] | (codes[:, 1::2] << 4)
    return packed.view(torch.int8), _as_e8m0(exponents)


def _blocks(x: Tensor, block: tuple[int, int]) -> Tensor:
    """[rows, columns] as [row blocks, rows each, column blocks, columns each], padded with 0."""
    more = [-size % by for size, by in zip(x.shape, block, strict=True)]
    padded = torch.nn.functional.pad(x.float(), (0, more[1], 0, more[0]))
    rows, columns = (size // by for size, by in zip(padded.shape, block, strict=True))
    return padded.view(rows, block[0], columns, block[1])


def _exponents(most: Tensor, limit: float) -> Tensor:
    """The least exponents with which the largest numbers stay within the limit."""
    least = torch.ceil(torch.log2(most / limit)).clamp(-_E8M0_BIAS, _E8M0_BIAS)
    # A logarithm may be off by a last bit on either side.
    least = torch.where(most * torch.exp2(1 - least) <= limit, least - 1, least)
    return torch.where(most * torch.exp2(-least) > limit, least + 1, least)


def _as_e8m0(exponents: Tensor) -> Tensor:
    return (exponents + _E8M0_BIAS).clamp(0, 254).to(torch.uint8).view(_E8M0)


def _named(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _unknown(where: str, name: str, tensor: Tensor) -> CompatibilityError:
    return CompatibilityError(
        f"{where} has {name} in {_named(tensor)} {list(tensor.shape)}, a quantisation that is not "
        "known here (known: float8_e4m3fn, and int8 of two 4-bit floats, with float8_e8m0fnu "
        "scales)."
    )
