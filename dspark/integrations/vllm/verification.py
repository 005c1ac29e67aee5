"""Calibration and our budget rule in vLLM's adaptive verification (V2 runner, GPU).

vLLM ranks drafts by running products of raw confidences and searches the budget that promises
most tokens a millisecond, on the confidences of an earlier step. Here the confidences are
calibrated first (`calibration.json` beside the drafter), and the budget may be chosen as the
schedule `lagged` does: smaller than the full one only where it promises more than a margin.

`--additional-config '{"dspark": {"calibration": FILE, "requests": "greedy", "schedule": "lagged",
"margin": 0.05}}'` changes what is taken; every key may be left out.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.worker.gpu.spec_decode.adaptive_verification import AdaptiveVerificationManager
from vllm.v1.worker.gpu_worker import Worker

from dspark.errors import CompatibilityError, UsageError
from dspark.request import Verifier
from dspark.scheduling.budget import best_budget
from dspark.scheduling.calibration import TemperatureClass, TemperatureScaling
from dspark.scheduling.calibration_file import FILE_NAME, Calibration
from dspark.scheduling.survival import survival

logger = logging.getLogger("vllm.dspark")

_KEYS = ("calibration", "requests", "schedule", "margin")
_SCHEDULES = ("vllm", "lagged")


@dataclass(frozen=True)
class Choice:
    """What `additional_config` says of verification.

    Attributes:
        scaling: calibrates confidences; None leaves them raw.
        schedule: whose rule chooses the budget: vllm or lagged.
        margin: see `scheduling.budget.best_budget`.
    """

    scaling: TemperatureScaling | None
    schedule: str = "vllm"
    margin: float = 0.0

    @classmethod
    def of(cls, vllm_config: Any) -> Choice:
        """What a configuration says.

        Raises:
            UsageError: an unknown key or schedule.
            CompatibilityError: the calibration that is named has no entry for this.
        """
        spec, extra = vllm_config.speculative_config, vllm_config.additional_config
        own = dict(extra.get("dspark", {})) if isinstance(extra, dict) else {}
        if unknown := sorted(set(own) - set(_KEYS)):
            raise UsageError(
                f"additional_config has dspark.{unknown[0]}, but its keys are {', '.join(_KEYS)}."
            )
        schedule = own.get("schedule", _SCHEDULES[0])
        if schedule not in _SCHEDULES:
            raise UsageError(
                f"additional_config has dspark.schedule {schedule!r}, but it must be "
                f"{' or '.join(_SCHEDULES)}."
            )
        scaling = None
        beside = Path(str(spec.model)) / FILE_NAME
        if "calibration" in own or beside.is_file():
            verifier: Verifier = "block" if spec.rejection_sample_method == "block" else "token"
            kind: TemperatureClass = own.get("requests", "sampled")
            calibration = Calibration.load(own.get("calibration", beside))
            try:
                entry = calibration.entry(spec.num_speculative_tokens, verifier, kind)
                scaling = entry.scaling
            except CompatibilityError as error:
                if "calibration" in own:
                    raise
                logger.warning("%s", error)
        return cls(scaling, schedule, float(own.get("margin", 0.0)))


def calibrated(confidence_RK: Tensor, scaling: TemperatureScaling) -> Tensor:
    """Calibrated confidences of raw ones, on their device, in fp32."""
    count = confidence_RK.shape[-1]
    temperatures = confidence_RK.new_tensor(scaling.temperatures[:count])
    logits = torch.logit(confidence_RK.float(), eps=1e-7) / temperatures
    if scaling.shifts:
        logits = logits + confidence_RK.new_tensor(scaling.shifts[:count])
    return torch.sigmoid(logits)


class CalibratedVerification(AdaptiveVerificationManager):
    """vLLM's manager with a `choice`."""

    choice: Choice
    _batch_budget: tuple[dict[str, int], dict[str, int], int] | None

    def record_confidences(self, confidence_probs: Tensor, input_batch: Any) -> None:
        """Record calibrated confidences in place of the raw ones."""
        if self.choice.scaling is not None:
            confidence_probs = calibrated(confidence_probs, self.choice.scaling)
        super().record_confidences(confidence_probs, input_batch)

    def get_num_tokens(
        self, num_tokens_per_req: dict[str, int], draft_tokens: dict[str, list[int]]
    ) -> int:
        """The step's tokens under the budget, chosen by vLLM's rule or ours."""
        tokens: int = super().get_num_tokens(num_tokens_per_req, draft_tokens)
        if self.choice.schedule == "vllm":
            return tokens
        assert self._batch_budget is not None
        drafts, others, theirs = self._batch_budget
        budget = self._best(drafts, others)
        self._batch_budget = (drafts, others, budget)
        return tokens - theirs + budget

    def _best(self, drafts: dict[str, int], others: dict[str, int]) -> int:
        assert self.cost_tables is not None
        draft_ms, verify_ms = self.cost_tables
        slots = [self.req_states.req_id_to_index[name] for name in drafts]
        confidences = self._stale_confidences[self._stale_idx].np[slots]
        limits, rest = np.fromiter(drafts.values(), np.int64), sum(others.values())
        most = min(int(limits.sum()), self._max_total_logits - len(slots) * self.num_bonus_tokens)
        step_ms = draft_ms[len(slots)] + verify_ms[rest : rest + max(most, 0) + 1]
        return best_budget(survival(confidences), step_ms, limits, self.choice.margin)


def calibrate_verification(vllm_config: Any) -> None:
    """From here on this process's V2 runner makes its managers with the configuration's choice."""
    from vllm.v1.worker.gpu import model_runner

    choice = Choice.of(vllm_config)
    make = model_runner.maybe_create_adaptive_verification_manager

    @functools.wraps(make)
    def with_choice(**options: Any) -> Any:
        manager = make(**options)
        if manager is not None:
            manager.__class__ = CalibratedVerification
            manager.choice = choice
        return manager

    model_runner.maybe_create_adaptive_verification_manager = with_choice


class CalibratedWorker(Worker):
    """vLLM's GPU worker, whose adaptive verification follows a `Choice`."""

    def init_device(self) -> None:
        """Make the runner; its manager is made later, by the function put here."""
        calibrate_verification(self.vllm_config)
        super().init_device()
