"""Who a sample is, and who a target is: short hashes of their contents."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from dspark.data.samples import Sample
from dspark.drafters.checkpoints.files import CONFIG, INDEX, fetch
from dspark.errors import CheckpointError
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
    """The hash of a set of samples, whatever their order and however often each occurs."""
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    for key in sorted(set(keys)):
        digest.update(key)
    return digest.hexdigest()


def target_fingerprint(source: str | Path) -> str:
    """The hash of a target's configuration and weights.

    Of large files 8,192 windows of 4 KiB, spread evenly, are read, and all of those below 32 MiB:
    training changes every matrix, so another target of the same shapes has another hash.

    Args:
        source: directory, GGUF file, hub id or name that ships.

    Raises:
        CheckpointError: it is no directory with weights, and no hub id that can be fetched.
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
