"""GGUF, llama.cpp's container: typed fields and tensors in one file, read and written.

The `gguf` package does the parsing and the quantisation; what fields and tensors mean is told in
`gguf_layout` (drafters), `gguf_tokenizer` and `target_tables`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dspark.drafters.files import Written
from dspark.errors import CheckpointError, CompatibilityError, UsageError, first_line

WEIGHT_TYPES = {"bf16": "BF16", "f16": "F16", "q8_0": "Q8_0"}
"""Types of stored matrices by the names that llama.cpp's tools give them."""
_FILE_TYPES = {"f16": 1, "q8_0": 7, "bf16": 32}  # general.file_type, informative
_QUANTIZATION_VERSION = 2
_BROKEN = (ValueError, IndexError, KeyError, OSError, OverflowError, MemoryError, TypeError)


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
class GgufFile:
    """An open GGUF file; tensors are read when they are asked for.

    Attributes:
        path: where it is.
        fields: the header's values by key.
    """

    path: Path
    fields: Mapping[str, Field]
    _tensors: Mapping[str, Any]

    @classmethod
    def open(cls, source: str | Path) -> GgufFile:
        """Read the header.

        Raises:
            CheckpointError: there is no such file, or it is damaged or cut short.
            UsageError: the package `gguf` is not installed.
        """
        path, package = Path(source), _package()
        if not path.is_file():
            raise CheckpointError(f"{path} does not exist; give a GGUF file.")
        try:
            reader = package.GGUFReader(path)
            fields = {
                key: Field(field.contents(), tuple(kind.name for kind in field.types))
                for key, field in reader.fields.items()
            }
        except _BROKEN as error:
            raise CheckpointError(
                f"{path} is no whole GGUF file ({first_line(error)}); fetch or write it again."
            ) from error
        return cls(path, fields, {tensor.name: tensor for tensor in reader.tensors})

    @property
    def architecture(self) -> str:
        """What kind of model it holds, in llama.cpp's words."""
        return str(self.get("general.architecture"))

    def get(self, key: str, default: Any = None) -> Any:
        """A field's value."""
        return self.fields[key].value if key in self.fields else default

    def names(self) -> list[str]:
        """Of all tensors."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, in torch's order."""
        return tuple(int(n) for n in reversed(self._tensors[name].shape))

    def tensor(self, name: str) -> Tensor:
        """A tensor in its stored dtype; quantised ones as float32.

        Raises:
            CompatibilityError: its type is none that can be read.
        """
        stored, package = self._tensors[name], _package()
        if stored.data.dtype != np.uint8:
            return torch.from_numpy(np.array(stored.data))
        try:
            data = package.quants.dequantize(stored.data, stored.tensor_type)
        except NotImplementedError as error:
            raise CompatibilityError(
                f"{self.path} has {name} as {stored.tensor_type.name}, which is not supported; use "
                "a file of type F16, BF16 or Q8_0."
            ) from error
        # Where nothing is computed the array is still the file's.
        found = torch.from_numpy(np.array(data, dtype=np.float32)).view(self.shape(name))
        return found.bfloat16() if stored.tensor_type.name == "BF16" else found


def write_gguf(
    path: Path,
    architecture: str,
    fields: Mapping[str, Field],
    tensors: Mapping[str, Tensor],
    weight_type: str,
) -> Written:
    """Write a file, whole beside its place before it takes it.

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
    package = _package()
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
    return Written(path, len(tensors), path.stat().st_size)


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


def _package() -> ModuleType:
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
