"""Optimisers over fp32 master weights, their moving average and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dspark.training.settings import WSD_DECAY, OptimiserSettings


class MasterOptimiser:
    """Updates fp32 masters of the trainable parameters and copies them to the model's dtype.

    `adamw` uses AdamW for all. `muon` uses Muon (Jordan et al. 2024, `torch.optim.Muon`) for the
    matrices inside the layers, and AdamW for embeddings, heads, norms and biases. Parameters
    sharded by FSDP are fp32 shards and their own masters.

    Args:
        named_parameters: of the module; those without gradient are ignored.
        settings: rates, schedule, clipping, moving average.
        steps: of the whole run, for the schedule.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        settings: OptimiserSettings,
        steps: int,
    ) -> None:
        self.settings = settings
        self.steps = steps
        named = [(n, p) for n, p in named_parameters if p.requires_grad]
        self.names = [n for n, _ in named]
        self.parameters = [p for _, p in named]
        self.masters = [
            p if p.dtype == torch.float32 else nn.Parameter(p.detach().float().clone())
            for p in self.parameters
        ]
        self.averages = None if settings.ema is None else [m.detach().clone() for m in self.masters]
        self._optimisers = self._build()

    def _build(self) -> dict[str, torch.optim.Optimizer]:
        s = self.settings
        named = list(zip(self.names, self.masters, strict=True))
        hidden = [(n, p) for n, p in named if s.name == "muon" and _in_layers(n, p)]
        chosen = {n for n, _ in hidden}
        rest = [(n, p) for n, p in named if n not in chosen]
        found: dict[str, torch.optim.Optimizer] = {}
        if rest:
            found["adamw"] = _adamw([p for _, p in rest], s)
        if hidden:
            found["muon"] = Muon(
                [p for _, p in hidden],
                lr=s.matrix_learning_rate,
                weight_decay=s.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        return found

    def collect(self) -> None:
        """Add the model's gradients to the masters' fp32 gradients and clear them."""
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            if master is parameter or parameter.grad is None:
                continue
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                master.grad += parameter.grad
            parameter.grad = None

    def gradients(self) -> list[Tensor]:
        """The collected gradients that exist."""
        return [m.grad for m in self.masters if m.grad is not None]

    def clear(self) -> None:
        """Clear the collected gradients."""
        for master in self.masters:
            master.grad = None

    def clip(self, scale: float) -> float:
        """Multiply the collected gradients and clip them.

        Args:
            scale: what the gradients are multiplied by first.

        Returns:
            Their norm before clipping, over all ranks' shards.
        """
        torch._foreach_mul_(self.gradients(), scale)
        norm = nn.utils.clip_grad_norm_(self.masters, self.settings.clip)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    @torch.no_grad()
    def step(self, step: int) -> float:
        """Step with the collected gradients and clear them.

        Args:
            step: the index of this step from 0, which sets the learning rate.

        Returns:
            The learning rate of the AdamW part.
        """
        factor = learning_rate_factor(self.settings, step, self.steps)
        for name, optimiser in self._optimisers.items():
            peak = self.settings
            base = peak.matrix_learning_rate if name == "muon" else peak.learning_rate
            for group in optimiser.param_groups:
                group["lr"] = base * factor
            optimiser.step()
        self.clear()
        self._write_back()
        if self.averages is not None and self.settings.ema is not None:
            # A shorter average at first, so that the initial weights fade quickly.
            share = 1.0 - min(self.settings.ema, (1.0 + step) / (10.0 + step))
            torch._foreach_lerp_(self.averages, [m.detach() for m in self.masters], share)
        return self.settings.learning_rate * factor

    def _write_back(self) -> None:
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            if master is not parameter:
                parameter.copy_(master)

    def shown(self) -> dict[str, Tensor]:
        """The weights to evaluate and export: the moving average if any, or the masters."""
        tensors = self.averages or [m.detach() for m in self.masters]
        return dict(zip(self.names, tensors, strict=True))

    def state_dict(self) -> dict[str, Tensor]:
        """Masters, moving average and optimiser states, by flat names.

        Together with the step number this suffices for an exact resume.
        """
        state = {f"master/{n}": m.detach() for n, m in zip(self.names, self.masters, strict=True)}
        if self.averages is not None:
            state |= {f"ema/{n}": a for n, a in zip(self.names, self.averages, strict=True)}
        for key, optimiser in self._optimisers.items():
            for name, own in self._states(optimiser):
                state |= {f"{key}/{name}/{field}": value for field, value in own.items()}
        return state

    def blank_state(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Empty tensors in the shape of `state_dict`'s, for a checkpoint to fill."""
        masters = dict(zip(self.names, self.masters, strict=True))
        blank: dict[str, Tensor] = {}
        for name in names:
            kind, _, rest = name.partition("/")
            parameter, _, field = rest.partition("/")
            like = masters[parameter].detach()
            whole = kind in ("master", "ema") or field != "step"
            blank[name] = torch.zeros_like(like) if whole else torch.zeros(())
        return blank

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the state of `state_dict`."""
        for name, master in zip(self.names, self.masters, strict=True):
            master.copy_(state[f"master/{name}"])
        self._write_back()
        for name, average in zip(self.names, self.averages or (), strict=False):
            average.copy_(state[f"ema/{name}"])
        for key, optimiser in self._optimisers.items():
            saved: dict[int, dict[str, Tensor]] = {}
            for index, (name, _) in enumerate(self._states(optimiser)):
                start = f"{key}/{name}/"
                own = {n.removeprefix(start): x for n, x in state.items() if n.startswith(start)}
                if own:
                    saved[index] = own
            groups = optimiser.state_dict()["param_groups"]
            optimiser.load_state_dict({"state": saved, "param_groups": groups})

    def _states(self, optimiser: torch.optim.Optimizer) -> list[tuple[str, dict[str, Tensor]]]:
        names = {id(m): n for n, m in zip(self.names, self.masters, strict=True)}
        parameters = [p for group in optimiser.param_groups for p in group["params"]]
        return [(names[id(p)], optimiser.state.get(p, {})) for p in parameters]


class Muon(torch.optim.Muon):
    """torch's Muon, in fp32 where bf16 is slow.

    torch iterates in bf16, which is six times slower than fp32 on CPUs without bf16 units
    (docs/LOG.md).
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update the parameters as torch does."""
        if all(_has_fast_bf16(p.device) for group in self.param_groups for p in group["params"]):
            return super().step(closure)  # type: ignore[no-untyped-call]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return None

    def _update(self, parameter: Tensor, grad: Tensor, group: Mapping[str, Any]) -> None:
        state, momentum = self.state[parameter], group["momentum"]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        buffer = state["momentum_buffer"].lerp_(grad, 1 - momentum)
        update = grad.lerp(buffer, momentum) if group["nesterov"] else buffer
        update = _orthogonal(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
        size = 0.2 * math.sqrt(max(parameter.shape))  # match_rms_adamw
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-group["lr"] * size)


def _orthogonal(
    matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """An approximately orthogonalised matrix by Muon's Newton-Schulz iterations, in fp32."""
    a, b, c = coefficients
    tall = matrix.shape[0] > matrix.shape[1]
    wide = (matrix.mT if tall else matrix).float()
    wide = wide / wide.norm().clamp(min=eps)
    for _ in range(steps):
        gram = wide @ wide.mT
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.mT if tall else wide


def _has_fast_bf16(device: torch.device) -> bool:
    return device.type != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _in_layers(name: str, parameter: Tensor) -> bool:
    return parameter.ndim == 2 and ".layers." in f".{name}"


def _adamw(parameters: list[nn.Parameter], settings: OptimiserSettings) -> torch.optim.Optimizer:
    """AdamW, fused if the device supports it."""
    options: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": settings.betas,
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
    }
    try:
        return torch.optim.AdamW(parameters, fused=True, **options)
    except RuntimeError:  # not fused on this device
        return torch.optim.AdamW(parameters, foreach=True, **options)


def number_of(parameters: Iterable[Tensor]) -> int:
    """Number of elements of all parameters, shards counted in full."""
    return sum(math.prod(p.shape) for p in parameters)


def warmup_steps(settings: OptimiserSettings, steps: int) -> int:
    """Warm-up steps, at least 1, so that step 0 already moves."""
    return max(1, int(settings.warmup_fraction * steps))


def learning_rate_factor(settings: OptimiserSettings, step: int, steps: int) -> float:
    """Factor on the peak learning rate: linear warm-up to 1, then `settings.schedule`.

    `cosine` and `linear` fall to 0 at `steps`, `constant` stays; `wsd` (warm-up, stable, decay) is
    constant until its last share of steps, over which it falls as 1 - sqrt(progress) (Hagele et al.
    2024).

    Args:
        settings: the schedule and its shares.
        step: from 0.
        steps: of the whole run.
    """
    warm = warmup_steps(settings, steps)
    if step < warm:
        return (step + 1) / warm
    progress = min(1.0, (step - warm) / max(1, steps - warm))
    if settings.schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    if settings.schedule == "linear":
        return 1.0 - progress
    if settings.schedule == "wsd":
        decay = max(1, int((settings.decay_fraction or WSD_DECAY) * steps))
        return 1.0 - math.sqrt(min(1.0, max(0, step - (steps - decay)) / decay))
    return 1.0


def usual_learning_rate(width: int) -> float:
    """AdamW's peak rate for a drafter of a hidden width: it falls with the root of the width."""
    return float(f"{6e-4 * math.sqrt(2048 / width):.2g}")
