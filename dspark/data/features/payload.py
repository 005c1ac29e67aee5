"""A sample's stretch of a shard: its tokens and loss mask, its feature rows, its teacher rows."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

import numpy as np

from dspark.data.samples import Sample

_SIZES = struct.Struct("<III")  # bytes of the three parts, which follow


@dataclass(frozen=True)
class Parts:
    """The three parts of a payload, undecoded."""

    sample: memoryview
    features: memoryview
    teacher: memoryview


def join(sample: Sample, features: bytes, teacher: bytes) -> bytes:
    """A payload of its parts."""
    ids = np.asarray(sample.input_ids, dtype="<u4")
    # Of the four bytes of an id mostly two say something: all first bytes, then all second ones.
    planes = ids.view(np.uint8).reshape(-1, 4).T.tobytes()
    mask = np.packbits(np.asarray(sample.loss_mask, dtype=bool)).tobytes()
    head = zlib.compress(planes + mask, 6)
    sizes = _SIZES.pack(len(head), len(features), len(teacher))
    return b"".join([sizes, head, features, teacher])


def split(payload: memoryview) -> Parts:
    """The parts of a payload."""
    first, second, _ = _SIZES.unpack(payload[: _SIZES.size])
    rest = payload[_SIZES.size :]
    return Parts(rest[:first], rest[first : first + second], rest[first + second :])


def read_sample(part: memoryview, num_tokens: int) -> Sample:
    """The sample of a payload's first part."""
    raw = np.frombuffer(zlib.decompress(part), dtype=np.uint8)
    ids = np.ascontiguousarray(raw[: 4 * num_tokens].reshape(4, num_tokens).T).view("<u4")
    mask = np.unpackbits(raw[4 * num_tokens :])[:num_tokens].astype(bool)
    return Sample(tuple(ids.ravel().tolist()), tuple(mask.tolist()))
