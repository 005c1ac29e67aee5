import json
from itertools import pairwise

import pytest
import torch
from rich.console import Console
from torch import nn

from dspark.errors import TrainingError
from dspark.training.loop import _gradients, train
from dspark.training.optim import MasterOptimiser, learning_rate_factor
from dspark.training.recipe import OptimiserSettings, RunSettings

QUIET = Console(quiet=True)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 8), nn.Linear(8, 1)])

    def forward(self, x):
        return self.layers[1](torch.tanh(self.layers[0](x)))


class Toy:
    """Learns sin(sum x); step `fail_at` gives a NaN loss, step `die_at` kills the run."""

    def __init__(self, fail_at=None, die_at=None, dtype=torch.float32):
        torch.manual_seed(0)
        self.module = Net().to(dtype)
        self.fail_at, self.die_at = fail_at, die_at
        self.exported = None
        self.tokens_seen = 0

    def loss(self, step, rank, ranks):
        self.tokens_seen += 16
        if step == self.die_at:
            raise KeyboardInterrupt
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(16, 4, generator=generator).to(next(self.module.parameters()).dtype)
        y = torch.sin(x.float().sum(1, keepdim=True))
        loss = (self.module(x).float() - y).square().mean()
        return (loss * float("nan") if step == self.fail_at else loss), {"accepted_length": 1.0}

    def export(self, directory):
        self.exported = directory


def settings(tmp_path, steps=12):
    return RunSettings(output_dir=str(tmp_path / "run"), steps=steps, save_every=5, log_every=4)


def weights(toy):
    return torch.cat([p.detach().float().flatten() for p in toy.module.parameters()])


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_cut_and_resumed_gives_the_same_weights(tmp_path, name, dtype):
    optimiser = OptimiserSettings(name=name, learning_rate=0.02, matrix_learning_rate=0.02)
    whole = Toy(dtype=dtype)
    train(whole, settings(tmp_path / "a"), optimiser, console=QUIET)
    cut = Toy(die_at=8, dtype=dtype)
    with pytest.raises(KeyboardInterrupt):
        train(cut, settings(tmp_path / "b"), optimiser, console=QUIET)
    resumed = Toy(dtype=dtype)
    result = train(resumed, settings(tmp_path / "b"), optimiser, resume=True, console=QUIET)
    assert result.steps == 12
    assert torch.equal(weights(resumed), weights(whole))
    fresh = Toy(dtype=dtype)
    assert not torch.equal(weights(fresh), weights(whole))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_it_learns_and_logs(tmp_path, name):
    toy = Toy()
    optimiser = OptimiserSettings(name=name, learning_rate=0.03, matrix_learning_rate=0.03)
    run = settings(tmp_path, steps=150)
    result = train(toy, run, optimiser, console=QUIET)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 150
    assert log[-1]["loss"] < 0.8 * log[0]["loss"]
    assert toy.exported == result.output_dir
    assert result.tokens_per_s > 0


def test_a_nan_loss_stops_and_keeps_the_last_checkpoint(tmp_path):
    run = settings(tmp_path)
    with pytest.raises(TrainingError, match="Step 7 gave a loss of nan"):
        train(Toy(fail_at=7), run, OptimiserSettings(), console=QUIET)
    state = torch.load(tmp_path / "run" / "latest" / "state.pt", weights_only=True)
    assert state["step"] == 5
    assert all(m.isfinite().all() for m in state["optimiser"]["masters"].values())


def test_a_finished_run_is_not_overwritten(tmp_path):
    run = settings(tmp_path)
    train(Toy(), run, OptimiserSettings(), console=QUIET)
    with pytest.raises(TrainingError, match="--resume"):
        train(Toy(), run, OptimiserSettings(), console=QUIET)
    with pytest.raises(TrainingError, match="12 steps, not 20"):
        train(Toy(), settings(tmp_path, 20), OptimiserSettings(), resume=True, console=QUIET)


def test_a_crash_while_saving_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    run = settings(tmp_path)
    real = torch.save

    def save_once(state, path):
        if state["step"] > 5:
            path.write_bytes(b"half")
            raise OSError("No space left on device")
        real(state, path)

    monkeypatch.setattr(torch, "save", save_once)
    with pytest.raises(OSError, match="No space"):
        train(Toy(), run, OptimiserSettings(), console=QUIET)
    monkeypatch.undo()
    whole, resumed = Toy(), Toy()
    train(whole, settings(tmp_path / "w"), OptimiserSettings(), console=QUIET)
    train(resumed, run, OptimiserSettings(), resume=True, console=QUIET)
    assert torch.equal(weights(resumed), weights(whole))


def test_learning_rate_warms_up_linearly_and_falls_to_zero():
    factors = [learning_rate_factor(s, 100, 10) for s in range(101)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10] == 1.0
    assert factors[55] == pytest.approx(0.5)
    assert factors[100] == pytest.approx(0.0)
    assert all(a >= b for a, b in pairwise(factors[10:]))


def test_masters_keep_what_bfloat16_would_lose():
    layer = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    optimiser = MasterOptimiser(
        layer.named_parameters(),
        OptimiserSettings(learning_rate=1e-4, warmup_fraction=0.0, clip=1e9),
        steps=10**6,
    )
    for step in range(60):
        layer.weight.grad = torch.ones_like(layer.weight)
        optimiser.collect()
        optimiser.step(step)
    # Sixty steps of 1e-4 are more than bfloat16's spacing below 1 (2^-8); one alone is less.
    assert layer.weight.item() == pytest.approx(1 - 60e-4, abs=2**-9)


class Sum:
    """The loss is a mean over eight numbers times a weight, read in equal parts."""

    def __init__(self, dtype):
        self.module = nn.Linear(1, 1, bias=False, dtype=dtype)
        self.module.weight.data.fill_(0.5)
        self.tokens_seen = 0

    def loss(self, step, part, parts):
        numbers = torch.arange(1.0, 9.0).view(parts, -1)[part].to(self.module.weight.dtype)
        return (self.module.weight.view(()) * numbers).mean(), {"mean": float(numbers.mean())}

    def export(self, directory):
        pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_parts_are_summed_in_fp32(dtype):
    whole, parted = Sum(dtype), Sum(dtype)
    found = []
    for objective, accumulate in ((whole, 1), (parted, 8)):
        named = objective.module.named_parameters()
        optimiser = MasterOptimiser(named, OptimiserSettings(), 10)
        metrics = _gradients(objective, optimiser, accumulate, 0, 0, 1)
        found.append((optimiser.gradients()[0], metrics))
    assert all(gradient.dtype == torch.float32 for gradient, _ in found)
    assert float(found[1][0]) == float(found[0][0]) == 4.5
    assert found[1][1]["mean"] == found[0][1]["mean"] == 4.5
    assert found[1][1]["loss"] == pytest.approx(2.25, rel=1e-2)
