"""A GGUF file's header: architecture, tensors and their extents, read without their data."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspark.errors import CheckpointError

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_STRING, _ARRAY = 8, 9
# The struct format of every fixed-size metadata type.
_FORMATS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_ALIGNMENT = 32


@dataclass(frozen=True)
class GgufTensor:
    """One tensor's entry.

    Attributes:
        name: as llama.cpp calls it.
        elements: how many numbers it holds.
        kind: the ggml type they are stored in.
        offset: bytes from the start of the data.
    """

    name: str
    elements: int
    kind: int
    offset: int


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says of itself.

    Attributes:
        metadata: keys and values; of arrays only the length.
        tensors: in the order of the file.
        data_start: bytes from the start of the file to the tensors' data.
    """

    metadata: Mapping[str, Any]
    tensors: tuple[GgufTensor, ...]
    data_start: int

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the model's kind."""
        return str(self.metadata.get("general.architecture", "unknown"))

    @classmethod
    def read(cls, path: Path) -> GgufHeader:
        """Read it.

        Raises:
            CheckpointError: the file is no GGUF, of another version, or cut short in its header.
        """
        try:
            with path.open("rb") as file:
                if file.read(4) != _MAGIC:
                    raise CheckpointError(f"{path} is no GGUF file; fetch it again.")
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    return _Reader(data).header(path)
        except (struct.error, IndexError, ValueError, OverflowError) as error:
            raise CheckpointError(
                f"{path} is damaged or cut short in its header; fetch it again."
            ) from error
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error.strerror or error}).") from error


class _Reader:
    """Walks through a file's bytes."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 4

    def header(self, path: Path) -> GgufHeader:
        (version,) = self.take("I")
        if version not in _VERSIONS:
            raise CheckpointError(
                f"{path} is GGUF of version {version}, but versions 2 and 3 are read; convert the "
                "model again with a newer llama.cpp."
            )
        tensors, entries = self.take("QQ")
        metadata = {self.string(): self.value(*self.take("I")) for _ in range(entries)}
        found = tuple(self.tensor() for _ in range(tensors))
        alignment = int(metadata.get("general.alignment", _ALIGNMENT))
        return GgufHeader(metadata, found, -(-self.at // alignment) * alignment)

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

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array(*self.take("IQ"))
        if kind not in _FORMATS:
            raise ValueError(f"no such type: {kind}")
        return self.take(_FORMATS[kind])[0]

    def array(self, kind: int, length: int) -> int:
        """Step over an array; its length."""
        if kind in _FORMATS:
            self.at += length * struct.calcsize(f"<{_FORMATS[kind]}")
        else:
            for _ in range(length):
                self.value(kind)
        return length

    def tensor(self) -> GgufTensor:
        name = self.string()
        (dimensions,) = self.take("I")
        elements = 1
        for extent in self.take(f"{dimensions}Q"):
            elements *= extent
        kind, offset = self.take("IQ")
        return GgufTensor(name, elements, kind, offset)
