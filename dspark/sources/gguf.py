"""GGUF files: read by transformers once, then kept as an ordinary checkpoint in the user's cache.

Reading takes many times as long as the same weights in safetensors do (docs/targets.md), so the
dequantised model is kept with its tokenizer and chat template, a copy per dtype. What loads a
directory thereby loads a GGUF.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import io
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspark.errors import CheckpointError, CompatibilityError, first_line
from dspark.sources.cache import cache_directory, new_entry
from dspark.sources.gguf_file import GgufFile

if TYPE_CHECKING:
    import torch

SUFFIX = ".gguf"
_FORMAT = 1
"""Counts what a copy holds: another number makes new ones."""
_ENDS_BYTES = 1 << 16
_FLOATS = {0: "float32", 1: "float16", 30: "bfloat16"}
_QUANTISED_AS = "bfloat16"
_EXTRA = ("gguf", "accelerate")
# What the loader raises of a model that it does not know; the header has been found whole by then.
_LOADER_ERRORS = (
    OSError, ValueError, LookupError, TypeError, RuntimeError, ImportError, AttributeError,
)  # fmt: skip
_logger = logging.getLogger(__name__)


def is_gguf(source: str | Path) -> bool:
    """Whether a path is named as a GGUF file."""
    path = Path(source)
    return path.suffix.lower() == SUFFIX and not path.is_dir()


def gguf_file(source: str | Path) -> Path | None:
    """The GGUF file that a source names: the file itself, or the one in a directory.

    A directory that holds safetensors or pickled weights too is an ordinary checkpoint.

    Raises:
        CheckpointError: the file is missing, or the directory holds several.
    """
    path = Path(source).expanduser()
    if is_gguf(path):
        if not path.is_file():
            raise CheckpointError(f"{path} does not exist; give a GGUF file or a directory.")
        return path
    if not str(source) or not path.is_dir() or _has_weights(path):
        return None
    files = sorted(file for file in path.iterdir() if file.suffix.lower() == SUFFIX)
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise CheckpointError(f"{path} holds {len(files)} GGUF files ({names}); name one of them.")
    return files[0] if files else None


def converted(path: Path, dtype: torch.dtype | None = None, *, sha256: str | None = None) -> Path:
    """The directory of a GGUF's model in safetensors, with its tokenizer; made where it is absent.

    Args:
        path: the file.
        dtype: of the weights; None takes the file's own, bfloat16 where they are quantised.
        sha256: what the file must hash to, checked before it is read; None for any.

    Raises:
        CheckpointError: the file is damaged, another one, or the cache cannot be written.
        CompatibilityError: transformers cannot load it, or the extra `gguf` is missing.
    """
    header = GgufFile.open(path) if dtype is None else None
    name = str(dtype).removeprefix("torch.") if header is None else _own_dtype(header)
    place = cache_directory("gguf") / f"{path.stem}-{_key(path)}-{name}"
    if place.is_dir():
        return place
    header = header or GgufFile.open(path)
    _require_extra(path)
    _check(path, header)
    if sha256 is not None:
        _check_hash(path, sha256)
    elements = sum(tensor.elements for tensor in header.tensors.values())
    size = elements * (4 if name == "float32" else 2)
    with new_entry(place) as fresh:
        if fresh is not None:
            _check_room(place, size)
            _logger.info(
                "Converting %s to safetensors in %s, once (%.1f GB) ...", path, name, size / 1e9
            )
            _convert(path, header, name, fresh)
    return place


def _has_weights(directory: Path) -> bool:
    return any(any(directory.glob(form)) for form in ("*.safetensors", "pytorch_model*.bin"))


def _key(path: Path) -> str:
    """A short hash of a file's size, time and both ends."""
    status = path.stat()
    digest = hashlib.sha256(f"{_FORMAT} {status.st_size} {status.st_mtime_ns}".encode())
    with path.open("rb") as file:
        digest.update(file.read(_ENDS_BYTES))
        file.seek(max(0, status.st_size - _ENDS_BYTES))
        digest.update(file.read(_ENDS_BYTES))
    return digest.hexdigest()[:16]


def _own_dtype(header: GgufFile) -> str:
    """The dtype of most numbers: norms are in float32 whatever the rest is."""
    counts: dict[str, int] = {}
    for tensor in header.tensors.values():
        name = _FLOATS.get(tensor.kind, _QUANTISED_AS)
        counts[name] = counts.get(name, 0) + tensor.elements
    return max(counts, key=lambda name: counts[name], default="float32")


def _require_extra(path: Path) -> None:
    missing = [name for name in _EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise CompatibilityError(
            f"{path} is a GGUF file, which needs {' and '.join(missing)}; install the extra: "
            "pip install 'dspark[gguf]'."
        )


def _check(path: Path, header: GgufFile) -> None:
    """Refuse a file that is cut short, and what transformers' loader would drop in silence."""
    parts = int(header.get("split.count", 1))
    if parts > 1:
        raise CompatibilityError(
            f"{path} is one part of {parts}; join them first (llama-gguf-split --merge)."
        )
    header.check_whole()
    scaling = header.get(f"{header.architecture}.rope.scaling.type", "none")
    frequencies = any(name.startswith("rope_freqs") for name in header.tensors)
    if header.architecture != "gpt-oss" and (scaling != "none" or frequencies):
        raise CompatibilityError(
            f"{path} scales its rotary positions, which transformers' GGUF loader leaves out; use "
            "the model's safetensors checkpoint."
        )


def _check_hash(path: Path, sha256: str) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != sha256:
        raise CheckpointError(
            f"{path} is not the file it should be (sha256 {digest.hexdigest()[:12]}... in place of "
            f"{sha256[:12]}...); remove it and fetch it again."
        )


def _check_room(place: Path, size: int) -> None:
    free = shutil.disk_usage(place.parent).free
    if free < size:
        raise CheckpointError(
            f"{place.parent} has {free / 1e9:.1f} GB free, but the converted model takes "
            f"{size / 1e9:.1f}; make room, or set XDG_CACHE_HOME to another place."
        )


def _convert(path: Path, header: GgufFile, dtype: str, directory: Path) -> None:
    """Read a GGUF with transformers, and save model, tokenizer and chat template."""
    import torch
    import transformers

    kwargs: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    # Where transformers knows GgufConfig, it keeps weights quantised unless it is told not to.
    config_class = getattr(transformers, "GgufConfig", None)
    dequantise = {"quantization_config": config_class(dequantize=True)} if config_class else {}
    # Its bars are tqdm's own, which no switch of transformers' turns off.
    with contextlib.redirect_stderr(io.StringIO()), _memoised_reading():
        try:
            config = transformers.AutoConfig.from_pretrained(path.parent, **kwargs)
            head_dim = header.get(f"{header.architecture}.attention.key_length")
            if head_dim is not None and getattr(config, "head_dim", head_dim) != head_dim:
                config.head_dim = int(head_dim)  # left out for some architectures
            model, report = transformers.AutoModelForCausalLM.from_pretrained(
                path.parent,
                config=config,
                dtype=getattr(torch, dtype),
                output_loading_info=True,
                **kwargs,
                **dequantise,
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, **kwargs)
        except _LOADER_ERRORS as error:
            raise CompatibilityError(
                f"{path} is a GGUF of the architecture {header.architecture!r}, which transformers "
                f"{transformers.__version__} cannot load ({first_line(error)}); use the model's "
                "safetensors checkpoint."
            ) from error
        missing = sorted(report["missing_keys"])
        if missing:
            raise CheckpointError(
                f"{path} lacks {len(missing)} of the model's weights ({', '.join(missing[:3])}); "
                "fetch it again, or use the model's safetensors checkpoint."
            )
        model.config.__dict__.pop("quantization_config", None)
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)


@contextlib.contextmanager
def _memoised_reading() -> Iterator[None]:
    """Keep transformers from reading the header three times, and naming tensors once per module.

    That is two thirds of the time of reading SmolLM2.
    """
    import gguf

    names = ("GGUFReader", "get_tensor_name_map")
    before = {name: getattr(gguf, name) for name in names}
    for name, function in before.items():
        setattr(gguf, name, functools.cache(function))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(gguf, name, function)
