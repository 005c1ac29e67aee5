"""Identity of an evaluated pair and its environment: fingerprints, calibration, versions."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import dspark
from dspark.drafters.dspark import DSparkDrafter
from dspark.drafters.eagle3 import Eagle3Drafter
from dspark.engine.model import Model
from dspark.engine.profile import hardware_name
from dspark.errors import CompatibilityError
from dspark.evaluation.records import Drafted, Settings
from dspark.scheduling.calibration import TemperatureClass
from dspark.targets.target import Target

_SAMPLES = 256  # values per tensor in a fingerprint


def environment(target: Target) -> dict[str, Any]:
    """Hardware, threads, dtype and versions."""
    return {
        "hardware": hardware_name(target.device),
        "device": str(target.device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "dtype": dtype_name(target),
        "attention": target.attention_backend,
        "weights": target.weights,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "dspark": dspark.__version__,
    }


def dtype_name(target: Target) -> str:
    """The target's dtype, marked if batch-invariant."""
    dtype = str(target.dtype).removeprefix("torch.")
    return f"{dtype} batch-invariant" if target.batch_invariant else dtype


def target_fingerprint(target: Target) -> str:
    """Eight hex digits of the target's embedding, head and final norm."""
    parts = target.parts()
    return _fingerprint(
        t for t in (parts.embedding_VH, parts.head_VH, parts.final_norm_H) if t is not None
    )


def draft_fingerprint(model: Model) -> str:
    """Eight hex digits of the drafter's weights; empty if it has none."""
    if not isinstance(model.drafter, nn.Module):
        return ""
    return _fingerprint(tensor for _, tensor in sorted(model.drafter.state_dict().items()))


def _fingerprint(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().flatten()
        few = flat[:: max(1, len(flat) // _SAMPLES)].to("cpu", torch.float32)
        digest.update(np.ascontiguousarray(few.numpy()).tobytes())
        digest.update(str(tuple(tensor.shape)).encode())
    return digest.hexdigest()[:8]


def drafted(model: Model, settings: Settings, kind: TemperatureClass) -> Drafted:
    """Description of a run's drafter."""
    drafter = model.drafter
    if drafter is None or settings.schedule == "off":
        return Drafted(0)
    block_size = settings.block_size or drafter.block_size
    layers = parameters = None
    if isinstance(drafter, DSparkDrafter | Eagle3Drafter):
        layers = drafter.config.backbone.num_layers
        parameters = sum(p.numel() for p in drafter.parameters())
    temperatures: tuple[float, ...] | None = None
    shifts: tuple[float, ...] = ()
    if model.calibration is not None:
        try:
            entry = model.calibration.entry(block_size, settings.verifier, kind)
            temperatures, shifts = entry.scaling.temperatures, entry.scaling.shifts
        except CompatibilityError:
            pass  # an uncalibrated setting, which the report mentions
    return Drafted(block_size, layers, parameters, temperatures, shifts)
