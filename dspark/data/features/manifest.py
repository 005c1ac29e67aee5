"""Manifest of a feature cache: target, samples and coding, with the hashes that identify them."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dspark.data.features.codec import Bfloat16Rows, CodedRows, RowCodec
from dspark.data.files.atomic import replace_file
from dspark.data.samples import Sample
from dspark.drafters.checkpoints.files import CONFIG, INDEX, fetch
from dspark.errors import CheckpointError, DataError
from dspark.sources.gguf import is_gguf
from dspark.sources.names import origin

KEY_BYTES = 16
_WINDOW = 4096
_WINDOWS = 8192  # per file; smaller files are read whole


def sample_key(sample: Sample) -> bytes:
    """The hash [16 bytes] of a sample's tokens and loss mask."""
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    digest.update(np.asarray(sample.input_ids, dtype="<i4").tobytes())
    digest.update(np.packbits(np.asarray(sample.loss_mask, dtype=bool)).tobytes())
    return digest.digest()


def samples_fingerprint(keys: Iterable[bytes]) -> str:
    """The hash of a set of samples, independent of order and multiplicity."""
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    for key in sorted(set(keys)):
        digest.update(key)
    return digest.hexdigest()


def target_fingerprint(source: str | Path) -> str:
    """The hash of a target's weight files.

    Files below 32 MiB are read in full, larger ones in 8,192 evenly spread windows of 4 KiB:
    training changes every matrix, so another target of the same shapes has another hash.

    Args:
        source: directory, GGUF file, hub id or shipped name.

    Raises:
        CheckpointError: it is not a directory with weights, nor a hub id that can be fetched.
    """
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    for path in _weight_files(origin(source)):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        stride = max(_WINDOW, -(-size // _WINDOWS))
        with path.open("rb") as file:
            for start in range(0, size, stride):
                file.seek(start)
                digest.update(file.read(_WINDOW))
    return digest.hexdigest()


def _weight_files(source: str | Path) -> list[Path]:
    if is_gguf(source):
        return [Path(source)]
    directory = Path(source)
    if not directory.is_dir():
        directory = fetch(str(source), None, False, (CONFIG, "*.safetensors", INDEX))
    files = sorted([*directory.glob("*.safetensors"), *directory.glob("pytorch_model*.bin")])
    if not files:
        raise CheckpointError(f"{directory} has no weights (*.safetensors); fetch them again.")
    return files


FORMAT, VERSION = "dspark-features", 1
MANIFEST = "manifest.json"
CodecName = Literal["coded", "bfloat16"]


@dataclass(frozen=True)
class Origin:
    """The origin of a cache's rows, which all of these values determine.

    Attributes:
        target: directory or hub id, for messages only.
        target_fingerprint: hash of its weights and configuration.
        num_layers: its decoder layers.
        hidden_size: H.
        taps: the captured layers.
        dtype: of the target's computation.
    """

    target: str
    target_fingerprint: str
    num_layers: int
    hidden_size: int
    taps: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class SampleRecipe:
    """The samples of a cache.

    Attributes:
        fingerprint: hash of the set of samples.
        paths: source files, for messages only.
        max_length: truncation length, tokens.
        min_supervised: least number of answer tokens.
        count: number of samples.
        tokens: of all samples.
    """

    fingerprint: str
    paths: tuple[str, ...]
    max_length: int
    min_supervised: int
    count: int
    tokens: int


@dataclass(frozen=True)
class Coding:
    """Coding of the rows.

    Attributes:
        name: `coded` or `bfloat16`.
        feature_error: relative error of features (`coded`).
        teacher_error: relative error of teacher states (`coded`).
    """

    name: CodecName = "coded"
    feature_error: float = 0.1
    teacher_error: float = 0.02


@dataclass(frozen=True)
class Learned:
    """Coding parameters learned from the first samples.

    Attributes:
        scale_PH: of every channel of every tap, with the teacher in the last row.
        basis_HPP: rotation of the taps of each channel.
    """

    scale_PH: Tensor
    basis_HPP: Tensor


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json.

    Attributes:
        origin: of the rows.
        samples: the samples.
        coding: of the rows.
        learned: parameters of `coded` rows; None for others.
    """

    origin: Origin
    samples: SampleRecipe
    coding: Coding
    learned: Learned | None

    def codecs(self) -> tuple[RowCodec, RowCodec]:
        """The codecs of features and of teacher states."""
        planes, width = len(self.origin.taps), self.origin.hidden_size
        if self.learned is None:
            return Bfloat16Rows(planes, width), Bfloat16Rows(1, width)
        scale_PH, own = self.learned.scale_PH, self.coding
        return (
            CodedRows(own.feature_error, scale_PH[:-1], self.learned.basis_HPP),
            CodedRows(own.teacher_error, scale_PH[-1:]),
        )

    def write(self, directory: Path) -> None:
        """Write it atomically."""
        content: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "origin": asdict(self.origin),
            "samples": asdict(self.samples),
            "coding": asdict(self.coding),
            "learned": None,
        }
        if self.learned is not None:
            scale_PH, basis_HPP = self.learned.scale_PH, self.learned.basis_HPP
            content["learned"] = {"scale": _as_text(scale_PH), "basis": _as_text(basis_HPP)}
        directory.mkdir(parents=True, exist_ok=True)
        replace_file(directory / MANIFEST, json.dumps(content, indent=1))

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Read one.

        Raises:
            DataError: there is none, or it is damaged or of another version.
        """
        content = read_manifest(directory)
        if content.get("format") != FORMAT or content.get("version") != VERSION:
            raise DataError(
                f"{directory / MANIFEST} is of format {content.get('format')!r}, version "
                f"{content.get('version')!r}; this release reads {FORMAT!r}, version {VERSION}: "
                "build a new cache elsewhere."
            )
        try:
            return cls._parse(content)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{directory / MANIFEST} is damaged ({error!r}); delete the cache and build it "
                "again."
            ) from error

    @classmethod
    def _parse(cls, content: Mapping[str, Any]) -> Manifest:
        origin, samples = dict(content["origin"]), dict(content["samples"])
        origin["taps"], samples["paths"] = tuple(origin["taps"]), tuple(samples["paths"])
        manifest = cls(Origin(**origin), SampleRecipe(**samples), Coding(**content["coding"]), None)
        if manifest.coding.name == "bfloat16":
            return manifest
        planes, width = len(manifest.origin.taps), manifest.origin.hidden_size
        learned = Learned(
            _from_text(content["learned"]["scale"], (planes + 1, width)),
            _from_text(content["learned"]["basis"], (width, planes, planes)),
        )
        return cls(manifest.origin, manifest.samples, manifest.coding, learned)

    def refuse_other(self, wanted: Manifest, directory: Path) -> None:
        """Check that rows made according to `wanted` may be added to this cache.

        Raises:
            DataError: names the first difference, both values and the remedy.
        """
        others = wanted._makers()
        for what, mine in self._makers().items():
            if mine != others[what]:
                raise DataError(
                    f"The cache {directory} was made with {what} {_shown(mine)} "
                    f"({self._said(what)}), not {_shown(others[what])} ({wanted._said(what)}); "
                    "give features.path another directory, or delete that one."
                )

    def _makers(self) -> dict[str, object]:
        """Values that all rows of a cache share."""
        return {
            "target_fingerprint": self.origin.target_fingerprint,
            "taps": self.origin.taps,
            "dtype": self.origin.dtype,
            "samples.fingerprint": self.samples.fingerprint,
            "codec": self.coding.name,
            "feature_error": self.coding.feature_error,
            "teacher_error": self.coding.teacher_error,
        }

    def _said(self, what: str) -> str:
        """A readable description of a value's source."""
        if what == "target_fingerprint":
            return f"target {self.origin.target}"
        if what == "samples.fingerprint":
            s = self.samples
            return f"{s.count} samples of {', '.join(s.paths)} of at most {s.max_length} tokens"
        return f"target {self.origin.target}, codec {self.coding.name}"


def read_manifest(directory: Path) -> dict[str, Any]:
    """The JSON object of a cache's manifest of any format.

    Raises:
        DataError: there is none, or it is damaged.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise DataError(
            f"{directory} has no {MANIFEST}; build the cache with `dspark data cache`, or give "
            "features.path the directory of one."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON ({error}); build the cache again.") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds no JSON object; build the cache again.")
    return content


def _as_text(numbers: Tensor) -> str:
    return base64.b64encode(numbers.numpy().astype("<f4").tobytes()).decode()


def _from_text(text: str, shape: tuple[int, ...]) -> Tensor:
    raw = np.frombuffer(base64.b64decode(text), dtype="<f4")
    return torch.from_numpy(raw.reshape(shape).astype(np.float32))


def _shown(value: object) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)
