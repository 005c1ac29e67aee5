"""How rows of the target's states become few bytes, and rows again.

`coded`: uniform quantisation in steps that are a fixed share of what a row's numbers measure, then
Huffman codes. A number is divided by the scale of its channel, learned from the first samples, and
by the scale of its row; so channels that are always large (the outlier channels of real models) and
rows that are (the first token's) keep the relative error of the others. For an error e, in units of
a row's root mean square, the step is sqrt(12) e; normal numbers then take log2(1.193 / e) bits.

`bfloat16`: the numbers themselves, rounded to bf16 if they are not.

Letters: R rows, P planes (the taps, or the teacher alone), H width.
"""

from __future__ import annotations

import math
import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dspark.errors import NumericsError

Bytes = npt.NDArray[np.uint8]
_OCTAVE = 8  # row scales lie on a grid of 8 per factor of two
_MIDDLE = 128  # the grid's number of a row scale of 1
_LARGEST = 127  # of a code
_HALF_NORMAL = math.sqrt(math.pi / 2)  # root mean square over mean magnitude of a normal number


class RowCodec(ABC):
    """Turns rows into bytes in two stages, so that the second can run on other threads."""

    @abstractmethod
    def quantise(self, rows_RPH: Tensor) -> tuple[Bytes, ...]:
        """On the rows' device: arrays whose first axis is R, on the CPU."""

    @abstractmethod
    def pack(self, arrays: tuple[Bytes, ...]) -> bytes:
        """The bytes of what `quantise` gave, or of some of its rows."""

    @abstractmethod
    def unpack(self, data: memoryview, num_rows: int, device: torch.device) -> Tensor:
        """Rows [R, P, H] in fp32 (`coded`) or bf16, on a device."""


@dataclass(frozen=True)
class Bfloat16Rows(RowCodec):
    """Rows as they are, two bytes a number.

    Attributes:
        planes: P.
        width: H.
    """

    planes: int
    width: int

    def quantise(self, rows_RPH: Tensor) -> tuple[Bytes, ...]:
        """The rows' bytes [R, P, 2 H]."""
        return (rows_RPH.to(torch.bfloat16).contiguous().view(torch.uint8).cpu().numpy(),)

    def pack(self, arrays: tuple[Bytes, ...]) -> bytes:
        """The bytes of the rows, one after the other."""
        return arrays[0].tobytes()

    def unpack(self, data: memoryview, num_rows: int, device: torch.device) -> Tensor:
        """Rows [R, P, H] in bf16."""
        copy = torch.from_numpy(np.array(np.frombuffer(data, dtype=np.uint8)))
        shape = (num_rows, self.planes, self.width)
        return copy.to(device).view(torch.bfloat16).view(shape)


@dataclass(frozen=True)
class CodedRows(RowCodec):
    """Rows in small integers with Huffman codes.

    Attributes:
        error: root mean square of the error over that of a row's numbers, channels scaled.
        scale_PH: what each channel's numbers usually measure, fp32 on the CPU.
    """

    error: float
    scale_PH: Tensor

    def quantise(self, rows_RPH: Tensor) -> tuple[Bytes, ...]:
        """Row scales [R, P] as numbers of their grid, and codes [R, P, H] as their bytes."""
        scaled_RPH = rows_RPH.float() / self.scale_PH.to(rows_RPH.device)
        rms_RP = scaled_RPH.square().mean(dim=-1).sqrt()
        if not bool(rms_RP.isfinite().all()):
            raise NumericsError(
                "The target gives NaN or infinite features; load it in another dtype."
            )
        # A row with one huge number gets a scale at which that number has a code.
        needed_RP = scaled_RPH.abs().amax(dim=-1) / (_LARGEST * self._step)
        level_RP = (_OCTAVE * torch.log2(rms_RP)).round()
        level_RP = torch.maximum(level_RP, (_OCTAVE * torch.log2(needed_RP)).ceil())
        level_RP = (level_RP + _MIDDLE).clamp(0, 255)
        codes_RPH = (scaled_RPH / self._row_scale(level_RP).unsqueeze(-1)).round()
        codes_RPH = codes_RPH.clamp(-_LARGEST, _LARGEST).to(torch.int8)
        return level_RP.to(torch.uint8).cpu().numpy(), codes_RPH.cpu().numpy().view(np.uint8)

    def pack(self, arrays: tuple[Bytes, ...]) -> bytes:
        """Huffman codes, plane by plane: each has tables of its own."""
        levels_RP, codes_RPH = arrays
        compressor = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
        parts = [compressor.compress(levels_RP.tobytes())]
        for codes_RH in codes_RPH.transpose(1, 0, 2):
            parts.append(compressor.compress(codes_RH.tobytes()))
        return b"".join([*parts, compressor.flush()])

    def unpack(self, data: memoryview, num_rows: int, device: torch.device) -> Tensor:
        """Rows [R, P, H] in fp32."""
        planes, width = self.scale_PH.shape
        scales = num_rows * planes
        raw = np.array(np.frombuffer(zlib.decompress(data, -15), dtype=np.uint8))
        level_RP = torch.from_numpy(raw[:scales]).to(device).view(num_rows, planes)
        codes = torch.from_numpy(raw[scales:].view(np.int8)).to(device)
        codes_RPH = codes.view(planes, num_rows, width).transpose(0, 1)
        scale_RP1 = self._row_scale(level_RP).unsqueeze(-1)
        rows_RPH: Tensor = codes_RPH * (scale_RP1 * self.scale_PH.to(device))
        return rows_RPH

    @property
    def _step(self) -> float:
        return math.sqrt(12) * self.error

    def _row_scale(self, level_RP: Tensor) -> Tensor:
        """What one step measures in each row."""
        return torch.exp2((level_RP.float() - _MIDDLE) / _OCTAVE) * self._step


def channel_scales(rows_RPH: Tensor) -> Tensor:
    """What each channel's numbers usually measure [P, H], fp32 on the CPU.

    Every row counts alike, and magnitudes, not squares, are averaged: the few rows with numbers a
    thousand times as large as usual do not spoil their channels for the others.
    """
    rows_RPH = rows_RPH.float()
    rms_RP1 = rows_RPH.square().mean(dim=-1, keepdim=True).sqrt().clamp_min(1e-30)
    scale_PH = (rows_RPH / rms_RP1).abs().mean(dim=0) * _HALF_NORMAL
    # A channel that is always 0 has any scale.
    return scale_PH.clamp_min(1e-6).cpu()
