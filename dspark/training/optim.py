"""Optimisers over fp32 master weights, and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dspark.training.recipe import OptimiserSettings


def learning_rate_factor(step: int, steps: int, warmup_steps: int) -> float:
    """Linear warm-up to 1 over `warmup_steps`, then a cosine to 0 at `steps`.

    Step 0 already moves: its factor is 1 / warmup_steps.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


class MasterOptimiser:
    """Steps fp32 masters of the trainable parameters and copies them back to the model's dtype.

    `adamw` uses AdamW for all. `muon` uses Muon (Jordan et al. 2024, `torch.optim.Muon`) for the
    matrices inside the layers, and AdamW for embeddings, heads, norms and biases.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        settings: OptimiserSettings,
        steps: int,
    ) -> None:
        self.settings = settings
        self.steps = steps
        self.warmup_steps = max(1, int(settings.warmup_fraction * steps))
        named = [(n, p) for n, p in named_parameters if p.requires_grad]
        self.names = [n for n, _ in named]
        self.parameters = [p for _, p in named]
        self.masters = [
            p if p.dtype == torch.float32 else nn.Parameter(p.detach().float().clone())
            for p in self.parameters
        ]
        self._optimisers = self._build()

    def _build(self) -> list[torch.optim.Optimizer]:
        s = self.settings
        is_hidden = [
            s.name == "muon" and p.ndim == 2 and ".layers." in f".{n}"
            for n, p in zip(self.names, self.masters, strict=True)
        ]
        rest = [p for p, hidden in zip(self.masters, is_hidden, strict=True) if not hidden]
        hidden = [p for p, hidden in zip(self.masters, is_hidden, strict=True) if hidden]
        found: list[torch.optim.Optimizer] = []
        if rest:
            found.append(
                torch.optim.AdamW(
                    rest,
                    lr=s.learning_rate,
                    betas=s.betas,
                    eps=s.eps,
                    weight_decay=s.weight_decay,
                    foreach=True,
                )
            )
        if hidden:
            found.append(
                torch.optim.Muon(
                    hidden,
                    lr=s.matrix_learning_rate,
                    weight_decay=s.weight_decay,
                    adjust_lr_fn="match_rms_adamw",
                )
            )
        return found

    def collect(self) -> None:
        """Add what the last backward pass left in the model to the masters' fp32 gradients."""
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            if master is parameter or parameter.grad is None:
                continue
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                master.grad += parameter.grad
            parameter.grad = None

    def step(self, step: int) -> tuple[float, float]:
        """Clip, step and clear the collected gradients.

        Args:
            step: the index of this step from 0, which sets the learning rate.

        Returns:
            (gradient norm before clipping, learning rate of the AdamW part).
        """
        norm = nn.utils.clip_grad_norm_(self.masters, self.settings.clip)
        factor = learning_rate_factor(step, self.steps, self.warmup_steps)
        for optimiser, base in zip(self._optimisers, self._base_rates(), strict=True):
            for group in optimiser.param_groups:
                group["lr"] = base * factor
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        with torch.no_grad():
            for master, parameter in zip(self.masters, self.parameters, strict=True):
                if master is not parameter:
                    parameter.copy_(master)
        return float(norm), self.settings.learning_rate * factor

    def _base_rates(self) -> list[float]:
        return [
            self.settings.matrix_learning_rate
            if isinstance(optimiser, torch.optim.Muon)
            else self.settings.learning_rate
            for optimiser in self._optimisers
        ]

    def gradients(self) -> list[Tensor]:
        """The collected gradients that exist, for averaging over ranks."""
        return [m.grad for m in self.masters if m.grad is not None]

    def state_dict(self) -> dict[str, Any]:
        """Masters and optimiser states: what an exact resume needs beside the step."""
        return {
            "masters": dict(zip(self.names, [m.detach() for m in self.masters], strict=True)),
            "optimisers": [o.state_dict() for o in self._optimisers],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        with torch.no_grad():
            for name, master, parameter in zip(
                self.names, self.masters, self.parameters, strict=True
            ):
                master.copy_(state["masters"][name])
                parameter.copy_(master)
        states: Sequence[dict[str, Any]] = state["optimisers"]
        for optimiser, saved in zip(self._optimisers, states, strict=True):
            optimiser.load_state_dict(saved)
