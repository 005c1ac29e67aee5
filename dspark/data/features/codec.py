"""Row codecs of the feature cache.

`coded`: uniform quantisation in steps proportional to a row's magnitude, then Huffman codes. A
number is divided by the scale of its channel, learned from the first samples, and by the scale of
its row, so that channels that are always large (outlier channels of real models) and rows that are
(the first token's) keep the relative error of the others. Because layers add to a residual stream,
a channel in one tap predicts the same channel in the next: the taps of each channel are rotated by
a learned orthogonal matrix to uncorrelated numbers, which keeps the error and saves a fifth of the
bits. For an error e, in units of a row's root mean square, the step is sqrt(12) e; independent
normal numbers take log2(1.193 / e) bits.

`bfloat16`: the numbers themselves, rounded to bf16 if necessary.

Letters: R rows, P planes (the taps, or the teacher alone), H width.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Bytes = npt.NDArray[np.uint8]
_OCTAVE = 8  # row scales lie on a grid of 8 per factor of two
_MIDDLE = 128  # what is added to make its numbers positive
_LARGEST = 127  # of a code
_USUAL = 8.0  # of numbers with a root mean square of 1
_HALF_NORMAL = math.sqrt(math.pi / 2)  # root mean square over mean magnitude of a normal number


@dataclass(frozen=True)
class Bfloat16Rows:
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
class CodedRows:
    """Rows in small integers with Huffman codes.

    Attributes:
        error: root mean square of the error over that of a row's numbers, channels scaled.
        scale_PH: what each channel's numbers usually measure, fp32 on the CPU.
        basis_HPP: what turns a channel's planes [P] to those that are coded, fp32 on the CPU;
            None to code them as they are.
    """

    error: float
    scale_PH: Tensor
    basis_HPP: Tensor | None = None

    def quantise(self, rows_RPH: Tensor) -> tuple[Bytes, ...]:
        """Row scales [R, P] as numbers of their grid, and codes [R, P, H] as their bytes."""
        scaled_RPH = rows_RPH.float() / self.scale_PH.to(rows_RPH.device)
        level_RP = (_OCTAVE * torch.log2(scaled_RPH.square().mean(dim=-1)) / 2).round()
        level_RP = level_RP.clamp(-_MIDDLE, _MIDDLE - 1)
        turned_RPH = scaled_RPH / self._row_scale(level_RP).unsqueeze(-1)
        if self.basis_HPP is not None:
            basis_HPP = self.basis_HPP.to(rows_RPH.device)
            turned_RPH = torch.einsum("rph,hpq->rqh", turned_RPH, basis_HPP)
        # A row with one huge number gets a scale at which that number has a code.
        excess_R = turned_RPH.abs().amax(dim=(1, 2)) / _LARGEST
        raised_R1 = (_OCTAVE * torch.log2(excess_R)).ceil().clamp_min(0).unsqueeze(-1)
        level_RP = (level_RP + raised_R1).clamp(-_MIDDLE, _MIDDLE - 1)
        codes_RPH = (turned_RPH * torch.exp2(-raised_R1 / _OCTAVE).unsqueeze(-1)).round()
        codes_RPH = codes_RPH.clamp(-_LARGEST, _LARGEST).to(torch.int8)
        levels_RP = (level_RP + _MIDDLE).to(torch.uint8)
        return levels_RP.cpu().numpy(), codes_RPH.cpu().numpy().view(np.uint8)

    def pack(self, arrays: tuple[Bytes, ...]) -> bytes:
        """Huffman codes, plane by plane: each has tables of its own."""
        levels_RP, codes_RPH = arrays
        compressor = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
        parts = [compressor.compress(levels_RP.tobytes())]
        for codes_RH in codes_RPH.transpose(1, 0, 2):
            parts.append(compressor.flush(zlib.Z_BLOCK))  # new tables
            parts.append(compressor.compress(codes_RH.tobytes()))
        return b"".join([*parts, compressor.flush()])

    def unpack(self, data: memoryview, num_rows: int, device: torch.device) -> Tensor:
        """Rows [R, P, H] in fp32."""
        planes, width = self.scale_PH.shape
        scales = num_rows * planes
        raw = np.array(np.frombuffer(zlib.decompress(data, -15), dtype=np.uint8))
        levels_RP = torch.from_numpy(raw[:scales]).to(device).view(num_rows, planes)
        codes = torch.from_numpy(raw[scales:].view(np.int8)).to(device)
        turned_PRH = codes.view(planes, num_rows, width).float()
        if self.basis_HPP is not None:
            turned_PRH = torch.einsum("qrh,hpq->prh", turned_PRH, self.basis_HPP.to(device))
        scale_RP = self._row_scale(levels_RP.float() - _MIDDLE)
        rows_RPH: Tensor = turned_PRH.transpose(0, 1) * scale_RP.unsqueeze(-1)
        return rows_RPH * self.scale_PH.to(device)

    @property
    def _step(self) -> float:
        return math.sqrt(12) * self.error

    def _row_scale(self, level_RP: Tensor) -> Tensor:
        """What one step measures in each row."""
        return torch.exp2(level_RP / _OCTAVE) * self._step


RowCodec = Bfloat16Rows | CodedRows
"""Turns rows [R, P, H] into bytes in two stages, so that the second can run on other threads."""


def channel_scales(rows_RPH: Tensor) -> Tensor:
    """What each channel's numbers usually measure [P, H], fp32 on the CPU.

    Every row counts alike, and magnitudes, not squares, are averaged: the few rows with numbers a
    thousand times as large as usual do not spoil their channels for the others.
    """
    scale_PH = _alike(rows_RPH.float()).abs().mean(dim=0) * _HALF_NORMAL
    # A channel that is always 0 has any scale.
    return scale_PH.clamp_min(1e-6).cpu()


def turning_basis(rows_RPH: Tensor, scale_PH: Tensor) -> Tensor:
    """Per channel the orthogonal matrix [H, P, P] to planes that do not correlate.

    Its columns are the eigenvectors of the planes' second moments. fp32 on the CPU.
    """
    scaled_RPH = _alike(rows_RPH.float() / scale_PH.to(rows_RPH.device)).cpu()
    # Large numbers of a few rows must not decide on the axes.
    scaled_RPH = scaled_RPH.clamp(-_USUAL, _USUAL)
    moments_HPP = torch.einsum("rph,rqh->hpq", scaled_RPH, scaled_RPH) / len(scaled_RPH)
    basis_HPP: Tensor = torch.linalg.eigh(moments_HPP.double()).eigenvectors.float()
    return basis_HPP.contiguous()


def _alike(rows_RPH: Tensor) -> Tensor:
    """Rows divided by their root mean squares."""
    rms_RP1 = rows_RPH.square().mean(dim=-1, keepdim=True).sqrt().clamp_min(1e-30)
    return rows_RPH / rms_RP1
