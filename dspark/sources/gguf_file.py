"""GGUF, llama.cpp's container: typed fields and tensors in one file, read and written.

The header is read here, without the package `gguf`; that package says how quantised tensors are
laid out, and writes. What fields and tensors mean is known to `sources.gguf` (targets) and
`drafters.checkpoints.gguf` (drafters).
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from dspark.errors import CheckpointError, CompatibilityError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

WEIGHT_TYPES = {"bf16": "BF16", "f16": "F16", "q8_0": "Q8_0"}
"""Types of stored matrices by the names that llama.cpp's tools give them."""
_FILE_TYPES = {"f16": 1, "q8_0": 7, "bf16": 32}  # general.file_type, informative
_QUANTIZATION_VERSION = 2
_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_ALIGNMENT = 32
_STRING, _ARRAY = 8, 9
# Name, and struct format where the size is fixed, of every type of a field.
_FIELD_TYPES = {
    0: ("UINT8", "B"), 1: ("INT8", "b"), 2: ("UINT16", "H"), 3: ("INT16", "h"), 4: ("UINT32", "I"),
    5: ("INT32", "i"), 6: ("FLOAT32", "f"), 7: ("BOOL", "?"), _STRING: ("STRING", ""),
    _ARRAY: ("ARRAY", ""), 10: ("UINT64", "Q"), 11: ("INT64", "q"), 12: ("FLOAT64", "d"),
}  # fmt: skip
# numpy's names of the ggml types whose numbers stand as they are.
_PLAIN = {0: "f4", 1: "f2", 24: "i1", 25: "i2", 26: "i4", 27: "i8", 28: "f8"}
_BF16 = 30


class Field(NamedTuple):
    """A value of the header, with the names of its GGUF types (of an array also its elements')."""

    value: Any
    kinds: tuple[str, ...]

    @classmethod
    def of(cls, value: Any) -> Field:
        """A field of the type that llama.cpp expects of such a Python value."""
        if isinstance(value, (list, tuple)):
            element = _kind(value[0])
            return cls(list(value), ("ARRAY", "INT32" if element == "UINT32" else element))
        return cls(value, (_kind(value),))


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "BOOL"
    if isinstance(value, str):
        return "STRING"
    return "UINT32" if isinstance(value, int) else "FLOAT32"


@dataclass(frozen=True)
class GgufTensor:
    """One tensor's entry in the header.

    Attributes:
        shape: in torch's order.
        kind: the ggml type it is stored in.
        offset: bytes from the start of the data.
    """

    shape: tuple[int, ...]
    kind: int
    offset: int

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file's header; tensors are read when they are asked for.

    Attributes:
        path: where it is.
        fields: the header's values by key.
        tensors: their entries by name, in the order of the file.
        data_start: bytes from the start of the file to the tensors' data.
    """

    path: Path
    fields: Mapping[str, Field]
    tensors: Mapping[str, GgufTensor]
    data_start: int

    @classmethod
    def open(cls, source: str | Path) -> GgufFile:
        """Read the header.

        Raises:
            CheckpointError: the file is missing, no GGUF, of another version, or cut short in its
                header.
        """
        path = Path(source)
        if not path.is_file():
            raise CheckpointError(f"{path} does not exist; give a GGUF file.")
        try:
            with path.open("rb") as file:
                if file.read(4) != _MAGIC:
                    raise CheckpointError(f"{path} is no GGUF file; fetch it again.")
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    return cls(path, *_Header(data).read(path))
        except (struct.error, IndexError, ValueError, OverflowError) as error:
            raise CheckpointError(
                f"{path} is damaged or cut short in its header; fetch it again."
            ) from error
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error.strerror or error}).") from error

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the model's kind."""
        return str(self.get("general.architecture", "unknown"))

    def get(self, key: str, default: Any = None) -> Any:
        """A field's value."""
        return self.fields[key].value if key in self.fields else default

    def check_whole(self) -> None:
        """Refuse a file that ends before its tensors do.

        Raises:
            CheckpointError: it is cut short.
            CompatibilityError: it has a tensor of a type that the package `gguf` does not know.
            UsageError: that package is not installed.
        """
        end = self.data_start
        for name, tensor in self.tensors.items():
            end = max(end, self.data_start + tensor.offset + self._bytes(name))
        size = self.path.stat().st_size
        if size < end:
            raise CheckpointError(
                f"{self.path} is cut short ({size:,} of {end:,} bytes); fetch it again."
            )

    def _bytes(self, name: str) -> int:
        """Size of a tensor's data."""
        tensor, sizes = self.tensors[name], gguf_package().GGML_QUANT_SIZES
        if tensor.kind not in sizes:
            raise CompatibilityError(
                f"{self.path} stores {name} in the ggml type {tensor.kind}, which the package gguf "
                "does not know; update it or take another quantisation."
            )
        block, bytes_each = sizes[tensor.kind]
        return int(tensor.elements // block * bytes_each)

    def tensor(self, name: str) -> Tensor:
        """A tensor in its stored dtype; quantised ones as float32.

        Raises:
            CompatibilityError: its type is none that can be read.
        """
        import numpy as np
        import torch

        stored = self.tensors[name]
        numbers = _PLAIN.get(stored.kind, "i2" if stored.kind == _BF16 else "u1")
        data = np.fromfile(
            self.path,
            f"<{numbers}",
            self._bytes(name) if numbers == "u1" else stored.elements,
            offset=self.data_start + stored.offset,
        )
        if numbers == "u1":
            package, rows = gguf_package(), data.reshape(*stored.shape[:-1], -1)
            try:
                data = package.quants.dequantize(rows, package.GGMLQuantizationType(stored.kind))
            except NotImplementedError as error:
                kind = package.GGMLQuantizationType(stored.kind).name
                raise CompatibilityError(
                    f"{self.path} has {name} as {kind}, which is not supported; use a file of type "
                    "F16, BF16 or Q8_0."
                ) from error
        found = torch.from_numpy(data)
        return (found.view(torch.bfloat16) if stored.kind == _BF16 else found).view(stored.shape)


class _Header:
    """Walks through a file's bytes."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 4

    def read(self, path: Path) -> tuple[dict[str, Field], dict[str, GgufTensor], int]:
        (version,) = self.take("I")
        if version not in _VERSIONS:
            raise CheckpointError(
                f"{path} is GGUF of version {version}, but versions 2 and 3 are read; convert the "
                "model again with a newer llama.cpp."
            )
        tensors, entries = self.take("QQ")
        fields = {self.string(): self.field(*self.take("I")) for _ in range(entries)}
        found = dict(self.tensor() for _ in range(tensors))
        alignment = int(fields.get("general.alignment", Field(_ALIGNMENT, ())).value)
        return fields, found, -(-self.at // alignment) * alignment

    def take(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{form}", self.data, self.at)
        self.at += struct.calcsize(f"<{form}")
        return values

    def string(self) -> str:
        (length,) = self.take("Q")
        start, self.at = self.at, self.at + length
        if self.at > len(self.data):
            raise IndexError("a string goes beyond the end of the file")
        return self.data[start : self.at].decode("utf-8", "replace")

    def field(self, kind: int) -> Field:
        if kind == _ARRAY:
            element, length = self.take("IQ")
            return Field(self.values(element, length), ("ARRAY", _FIELD_TYPES[element][0]))
        if kind not in _FIELD_TYPES:
            raise ValueError(f"no such type: {kind}")
        return Field(self.values(kind, 1)[0], (_FIELD_TYPES[kind][0],))

    def values(self, kind: int, count: int) -> list[Any]:
        if kind not in _FIELD_TYPES:
            raise ValueError(f"no such type: {kind}")
        if form := _FIELD_TYPES[kind][1]:
            return list(self.take(f"{count}{form}"))
        if kind == _STRING:
            return [self.string() for _ in range(count)]
        return [self.values(*self.take("IQ")) for _ in range(count)]

    def tensor(self) -> tuple[str, GgufTensor]:
        name = self.string()
        (dimensions,) = self.take("I")
        extents = self.take(f"{dimensions}Q")
        return name, GgufTensor(tuple(reversed(extents)), *self.take("IQ"))


def write_gguf(
    path: Path,
    architecture: str,
    fields: Mapping[str, Field],
    tensors: Mapping[str, Tensor],
    weight_type: str,
) -> int:
    """Write a file, whole beside its place before it takes it; its size in bytes.

    Vectors and single rows are stored as float32, whole numbers as int64, and with q8_0 matrices
    whose rows do not divide into blocks of 32 as float16.

    Args:
        path: its folder is made if absent.
        architecture: llama.cpp's name of it.
        fields: beside those about architecture and types.
        tensors: by llama.cpp's names, on the CPU.
        weight_type: of matrices, a key of `WEIGHT_TYPES`.

    Raises:
        UsageError: the package `gguf` is not installed.
    """
    package = gguf_package()
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    writer = package.GGUFWriter(beside, architecture)
    writer.add_file_type(_FILE_TYPES[weight_type])
    writer.add_quantization_version(_QUANTIZATION_VERSION)
    for key, (value, kinds) in fields.items():
        types = [package.GGUFValueType[kind] for kind in kinds]
        writer.add_key_value(key, value, types[0], types[1] if len(types) > 1 else None)
    for name, data, kind in _stored(tensors, weight_type, package):
        writer.add_tensor(name, data, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    return path.stat().st_size


def _stored(
    tensors: Mapping[str, Tensor], weight_type: str, package: ModuleType
) -> Iterator[tuple[str, Any, Any]]:
    types = package.GGMLQuantizationType
    wanted = types[WEIGHT_TYPES[weight_type]]
    block, _ = package.GGML_QUANT_SIZES[wanted]
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            yield name, tensor.numpy(), types.I64
            continue
        kind = wanted if tensor.ndim > 1 and min(tensor.shape) > 1 else types.F32
        if kind == types.Q8_0 and tensor.shape[-1] % block:
            kind = types.F16
        data = tensor.detach().float().contiguous().numpy()
        yield name, package.quants.quantize(data, kind), kind


def gguf_package() -> ModuleType:
    """The package `gguf`.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise UsageError(
            'GGUF files need the package gguf, which is not installed; pip install "dspark[gguf]".'
        ) from error
    # Loaded with it, but not an attribute that a type checker knows.
    import gguf.quants

    module: ModuleType = gguf
    return module
