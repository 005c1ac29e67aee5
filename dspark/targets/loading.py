"""From a directory, GGUF file or name to a transformers model, or one clear sentence why not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from dspark.errors import CheckpointError, CompatibilityError, UsageError, first_line
from dspark.sources.cache import use_cache_only
from dspark.sources.names import target_source
from dspark.targets.fast.packing import quicker_cpu_dtype

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class Source:
    """A checkpoint: a directory or a hub name, and how to reach it."""

    name: str
    is_directory: bool
    revision: str | None = None
    offline: bool = False
    trust_remote_code: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments for transformers' loaders."""
        return {
            "revision": self.revision,
            "local_files_only": self.offline or self.is_directory,
            "trust_remote_code": self.trust_remote_code,
        }


def resolve_source(
    source: str | Path,
    *,
    revision: str | None,
    offline: bool,
    trust_remote_code: bool,
    dtype: torch.dtype | None = None,
) -> Source:
    """Tell a directory from a hub name; a GGUF becomes a directory here.

    Args:
        source: as `Target.load`.
        revision: on the hub.
        offline: use only what is on this machine.
        trust_remote_code: run model code that comes along.
        dtype: of the weights of a GGUF; None takes its own.

    Raises:
        CheckpointError: it looks like a directory that is not there, a GGUF is damaged, or the hub
            cannot be reached and the model is not on this machine.
        CompatibilityError: a GGUF cannot be loaded here.
    """
    source = target_source(source, dtype=dtype, offline=offline)
    path = Path(source).expanduser()
    if str(source) and path.is_dir():
        return Source(str(path), True, None, offline, trust_remote_code)
    text = str(source)
    looks_local = isinstance(source, Path) or text[:1] in {"/", ".", "~", ""} or text.count("/") > 1
    if looks_local or path.exists():
        raise CheckpointError(
            f"{text!r} is not a directory; give a checkpoint directory, a GGUF file or a hub name."
        )
    return Source(text, False, revision, use_cache_only(text, revision, offline), trust_remote_code)


def resolve_device(device: str | torch.device) -> torch.device:
    """The device that a name stands for; `auto` takes an accelerator where there is one.

    Raises:
        UsageError: the name is unknown or the device absent.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", 0)
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise UsageError(
            f"device is {device!r}, but must be auto, cpu, cuda, cuda:N or mps."
        ) from error
    counts = {
        "cpu": 1,
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
    }
    if chosen.type not in counts:
        raise UsageError(f"device is {device!r}, but must be auto, cpu, cuda, cuda:N or mps.")
    if (chosen.index or 0) >= counts[chosen.type]:
        raise UsageError(
            f"device is {device!r}, but this machine has {counts[chosen.type]} of kind "
            f"{chosen.type}; use auto."
        )
    return torch.device("cuda", chosen.index or 0) if chosen.type == "cuda" else chosen


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype | str:
    """The dtype that a name stands for; `auto`: float32 on a CPU, else the checkpoint's own.

    On a CPU `auto_cpu_dtype` may know better, once there is a configuration.

    Raises:
        UsageError: the name is unknown.
    """
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    chosen = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if chosen is None or chosen not in _DTYPES.values():
        raise UsageError(f"dtype is {dtype!r}, but must be auto, {', '.join(_DTYPES)}.")
    return chosen


def auto_cpu_dtype(config: Any) -> torch.dtype:
    """float32; bfloat16 for a checkpoint of that dtype which a CPU runs faster so."""
    text = config.get_text_config()
    wide = getattr(text, "intermediate_size", None)
    if getattr(text, "dtype", None) != torch.bfloat16 or not isinstance(wide, int):
        return torch.float32
    return quicker_cpu_dtype(wide, text.hidden_size)


def load_model(
    source: Source, dtype: torch.dtype | str, device: torch.device, *, may_be_short: bool = False
) -> Any:
    """Load a causal language model, every weight from the checkpoint.

    It is loaded on the CPU and then moved, except for quantised weights, which transformers
    prepares for the device that they are loaded on.

    Args:
        source: the checkpoint.
        dtype: of its weights; `auto` is the checkpoint's own.
        device: where it goes.
        may_be_short: take bfloat16 in place of `dtype` where `auto_cpu_dtype` says so.

    Raises:
        CheckpointError: files are missing, truncated or do not hold every weight.
        CompatibilityError: transformers has no causal language model of this kind.
    """
    if source.is_directory:
        _check_directory(Path(source.name))
    with quiet():
        config = load_config(source)
        if may_be_short and auto_cpu_dtype(config) == torch.bfloat16:
            dtype = torch.bfloat16
        placed = {"device_map": {"": device}} if is_quantised(config) else {}
        try:
            model, report = AutoModelForCausalLM.from_pretrained(
                source.name,
                config=config,
                dtype=dtype,
                output_loading_info=True,
                **source.options,
                **(placed if device.type != "cpu" else {}),
            )
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):
                raise _unreadable(source, error) from error
            raise CompatibilityError(
                f"{source.name} is a {config.model_type!r} model, of which transformers has no "
                "causal language model; use a text model."
            ) from error
        except (OSError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
            raise _unreadable(source, error) from error
    missing = sorted(report["missing_keys"])
    if missing:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise CheckpointError(
            f"{source.name} lacks {len(missing)} of the model's weights ({shown}); "
            "fetch the checkpoint again or check that config.json belongs to it."
        )
    return model.to(device)


def is_quantised(config: Any) -> bool:
    """Whether a configuration says that weights, and perhaps what they multiply, are quantised."""
    return getattr(config, "quantization_config", None) is not None


def load_tokenizer(source: Source) -> Any:
    """Load the tokenizer, or None where a directory has none.

    Raises:
        CheckpointError: its files cannot be read.
    """
    if source.is_directory and not any((Path(source.name) / f).exists() for f in _TOKENIZER_FILES):
        return None
    with quiet():
        try:
            return AutoTokenizer.from_pretrained(source.name, **source.options)
        except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError) as error:
            raise CheckpointError(
                f"The tokenizer of {source.name} cannot be read ({first_line(error)}); "
                "fetch its files again."
            ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from printing progress bars and advice."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def load_config(source: Source) -> Any:
    """Load a configuration.

    Raises:
        CheckpointError: it cannot be read.
        CompatibilityError: transformers does not know the architecture.
    """
    try:
        return AutoConfig.from_pretrained(source.name, **source.options)
    except (OSError, KeyError) as error:
        raise _unreadable(source, error) from error
    except (ValueError, ImportError) as error:
        raise CompatibilityError(
            f"The architecture of {source.name} is not known to transformers "
            f"({first_line(error)}); update transformers or use another target."
        ) from error


def _check_directory(path: Path) -> None:
    """Name what a half-written directory lacks, in better words than the loaders have."""
    config = path / "config.json"
    if not config.exists():
        raise CheckpointError(f"{path} has no config.json; give the directory of a checkpoint.")
    _read_json(config)
    weights = sorted(path.glob("*.safetensors"))
    for index in path.glob("*.safetensors.index.json"):
        shards = set(_read_json(index).get("weight_map", {}).values())
        lost = sorted(shards - {file.name for file in weights})
        if lost:
            raise CheckpointError(
                f"{path} lacks {len(lost)} of {len(shards)} weight files ({lost[0]}); "
                "fetch the checkpoint again."
            )
    if not weights and not list(path.glob("pytorch_model*.bin")):
        raise CheckpointError(f"{path} has no weights (*.safetensors); fetch the checkpoint again.")
    for file in weights:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file} is truncated or damaged ({first_line(error)}); fetch it again."
            ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); fetch it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object; fetch it again.")
    return content


def _unreadable(source: Source, error: BaseException) -> CheckpointError:
    where = "" if source.is_directory else " (offline)" if source.offline else " from the hub"
    return CheckpointError(
        f"{source.name} cannot be loaded{where}: {first_line(error)}. "
        "Check the name, the revision and that its files are complete."
    )
