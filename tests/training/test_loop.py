import errno
import json
import os
import resource
import signal
import sys
import time
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from rich.console import Console
from torch import nn

from dspark.errors import CheckpointError, RecipeError, TrainingError
from dspark.training.checkpoints import path_of, saved_steps
from dspark.training.loop import Training
from dspark.training.objective import DataOrder, Evaluation
from dspark.training.optim import MasterOptimiser, learning_rate_factor
from dspark.training.parallel import World
from dspark.training.settings import OptimiserSettings, RunSettings

QUIET = Console(quiet=True)
ORDER = DataOrder(6.0, 64, lambda step, part, parts: f"sample {step * parts + part}")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 8), nn.Linear(8, 1)])

    def forward(self, x):
        return self.layers[1](torch.tanh(self.layers[0](x)))


class Toy:
    """Learns sin(sum x), with noise from torch's own generator.

    Step `fail_at` gives a NaN loss, step `die_at` kills the run.
    """

    def __init__(self, fail_at=None, die_at=None, dtype=torch.float32, act=None):
        torch.manual_seed(0)
        self.module = Net().to(dtype)
        self.fail_at, self.die_at, self.act = fail_at, die_at, act
        self.exported = None
        self.tokens_seen = 0

    def loss(self, step, part, parts):
        self.tokens_seen += 16
        if self.act is not None:
            self.act(step)
        if step == self.die_at:
            raise KeyboardInterrupt
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(16, 4, generator=generator).to(next(self.module.parameters()).dtype)
        y = torch.sin(x.float().sum(1, keepdim=True)) + 0.01 * torch.randn(16, 1)
        loss = (self.module(x).float() - y).square().mean()
        return (loss * float("nan") if step == self.fail_at else loss), {"accepted_length": 1.0}

    def export(self, directory):
        self.exported = directory
        self.weights = weights(self)


def settings(tmp_path, steps=12, **others):
    given = {"save_every": 5, "log_every": 4, **others}
    return RunSettings(output_dir=str(tmp_path / "run"), steps=steps, **given)


def run(toy, settings, optimiser=None, *, resume=False, evaluation=None, order=ORDER):
    optimiser = optimiser or OptimiserSettings()
    training = Training(toy, settings, optimiser, order, World())
    training.start(resume)
    return training.go(console=QUIET, evaluation=evaluation)


def weights(toy):
    return torch.cat([p.detach().float().flatten() for p in toy.module.parameters()])


def log_of(tmp_path):
    return [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("ema", [None, 0.9])
@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_cut_anywhere_and_resumed_gives_the_same_weights(tmp_path, name, dtype, ema):
    optimiser = OptimiserSettings(name=name, learning_rate=0.02, matrix_learning_rate=0.02, ema=ema)
    whole = Toy(dtype=dtype)
    run(whole, settings(tmp_path / "whole"), optimiser)
    for die_at in (3, 8):  # before the first checkpoint, and between two
        cut = Toy(die_at=die_at, dtype=dtype)
        place = tmp_path / str(die_at)
        with pytest.raises(KeyboardInterrupt):
            run(cut, settings(place), optimiser)
        resumed = Toy(dtype=dtype)
        result = run(resumed, settings(place), optimiser, resume=True)
        assert result.steps == 12
        assert torch.equal(weights(resumed), weights(whole))
        assert torch.equal(resumed.weights, whole.weights)
        assert log_of(place) == log_of(tmp_path / "whole")
    assert not torch.equal(weights(Toy(dtype=dtype)), weights(whole))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_it_learns_and_logs(tmp_path, name):
    toy = Toy()
    optimiser = OptimiserSettings(name=name, learning_rate=0.03, matrix_learning_rate=0.03)
    result = run(toy, settings(tmp_path, steps=150, save_every=100), optimiser)
    log = log_of(tmp_path)
    assert [entry["step"] for entry in log] == [*range(4, 149, 4), 150]
    assert log[-1]["loss"] < 0.8 * log[0]["loss"]
    assert result.loss == log[-1]["loss"]
    assert toy.exported == result.output_dir
    assert result.tokens_per_s > 0


def test_a_nan_loss_stops_names_its_data_and_keeps_the_last_checkpoint(tmp_path):
    with pytest.raises(TrainingError) as caught:
        run(Toy(fail_at=7), settings(tmp_path, accumulate=2))
    assert str(caught.value) == (
        "Step 7 gave a loss that is not finite, in rank 0, part 0 (sample 14): nan; rank 0, part 1 "
        f"(sample 15): nan; the checkpoint before it is {path_of(tmp_path / 'run', 5)}: lower the "
        "learning rate, or leave these data out, and go on from there with --resume."
    )
    assert saved_steps(tmp_path / "run") == [5]
    resumed = Toy()
    run(resumed, settings(tmp_path, accumulate=2), resume=True)
    assert weights(resumed).isfinite().all()


def test_an_infinite_gradient_changes_nothing(tmp_path):
    toy = Toy()

    def steep(step):
        if step == 6:
            toy.module.layers[0].weight.register_hook(lambda grad: grad * float("inf"))

    toy.act = steep
    with pytest.raises(TrainingError, match=r"Step 6 gave a gradient norm of (inf|nan) at a loss"):
        run(toy, settings(tmp_path))
    assert weights(toy).isfinite().all()


def test_a_finished_run_is_not_overwritten_nor_resumed_as_another(tmp_path):
    run(Toy(), settings(tmp_path))
    with pytest.raises(TrainingError, match="--resume"):
        run(Toy(), settings(tmp_path))
    for others, said in (
        ({"steps": 20}, "run.steps 12, not 20"),
        ({"seed": 5}, "run.seed 0, not 5"),
        ({"rows": 4}, "run.rows 8, not 4"),
    ):
        with pytest.raises(TrainingError, match=said):
            run(Toy(), settings(tmp_path, **others), resume=True)
    with pytest.raises(TrainingError, match=r"optimiser.name adamw, not muon"):
        run(Toy(), settings(tmp_path), OptimiserSettings(name="muon"), resume=True)
    again = run(Toy(), settings(tmp_path), resume=True)
    assert again.loss == log_of(tmp_path)[-1]["loss"]


def test_an_older_versions_checkpoint_is_not_passed_over(tmp_path):
    (tmp_path / "run" / "latest").mkdir(parents=True)
    (tmp_path / "run" / "latest" / "state.pt").touch()
    with pytest.raises(TrainingError, match="of an older version"):
        run(Toy(), settings(tmp_path), resume=True)


def test_only_the_last_checkpoints_are_kept(tmp_path):
    run(Toy(), settings(tmp_path, save_every=2, keep_last=3))
    assert saved_steps(tmp_path / "run") == [8, 10, 12]


def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_serves(tmp_path):
    whole = Toy()
    run(whole, settings(tmp_path, save_every=5))
    newest = path_of(tmp_path / "run", 12)
    for file in newest.glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"step_00000012 cannot be read .* remove it"):
        run(Toy(), settings(tmp_path), resume=True)
    (newest / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match="step_00000012 cannot be read"):
        run(Toy(), settings(tmp_path), resume=True)
    os.rename(newest, tmp_path / "away")
    resumed = Toy()
    run(resumed, settings(tmp_path), resume=True)
    assert torch.equal(weights(resumed), weights(whole))


def test_a_full_disk_leaves_the_older_checkpoint(tmp_path):
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(step):  # files of more than a byte are refused from step 6 on
        if step == 6:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))

    try:
        with pytest.raises(TrainingError, match=r"after step 10 could not .*5, is whole"):
            run(Toy(act=fill), settings(tmp_path, log_every=100))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000005"]
    whole, resumed = Toy(), Toy()
    run(whole, settings(tmp_path / "w"))
    run(resumed, settings(tmp_path), resume=True)
    assert torch.equal(weights(resumed), weights(whole))


def test_a_disk_that_is_full_at_the_last_file(tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("dspark.training.checkpoints.replace_file", full)
    with pytest.raises(TrainingError, match=r"No space left on device.*; none is: make room"):
        run(Toy(), settings(tmp_path))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(tmp_path, number):
    toy = Toy(act=lambda step: os.kill(os.getpid(), number) if step == 6 else None)
    before = signal.getsignal(number)
    with pytest.raises(TrainingError, match=rf"by {number.name} after step 7 of 12.*--resume"):
        run(toy, settings(tmp_path))
    assert signal.getsignal(number) is before
    assert saved_steps(tmp_path / "run") == [5, 7]
    whole, resumed = Toy(), Toy()
    run(whole, settings(tmp_path / "w"))
    run(resumed, settings(tmp_path), resume=True)
    assert torch.equal(weights(resumed), weights(whole))


def test_the_second_signal_acts_at_once(tmp_path):
    def twice(step):
        if step == 6:
            noting = signal.getsignal(signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            while signal.getsignal(signal.SIGINT) is noting:  # two that come at once are one
                time.sleep(0.001)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)

    # A shell starts what runs in its background with this signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(Toy(act=twice), settings(tmp_path))
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_learning_rate_warms_up_and_falls_as_its_schedule_says(schedule):
    own = OptimiserSettings(schedule=schedule, warmup_fraction=0.1)
    factors = [learning_rate_factor(own, s, 100) for s in range(101)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10] == 1.0
    half, near_end = {
        "cosine": (0.5, 0.0076),
        "linear": (0.5, 1 / 18),
        "constant": (1.0, 1.0),
        "wsd": (1.0, 1 - 0.5**0.5),
    }[schedule]
    assert factors[55] == pytest.approx(half)
    assert factors[95] == pytest.approx(near_end, abs=1e-4)
    assert factors[100] == pytest.approx(1.0 if schedule == "constant" else 0.0)
    assert all(a >= b for a, b in pairwise(factors[10:]))


def test_only_wsd_has_a_share_that_decays():
    own = OptimiserSettings(schedule="wsd", decay_fraction=0.5)
    assert learning_rate_factor(own, 50, 100) == 1.0
    assert learning_rate_factor(own, 51, 100) < 1.0
    with pytest.raises(ValueError, match="has no effect beside schedule cosine"):
        OptimiserSettings(decay_fraction=0.5)


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
        optimiser.clip(1.0)
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
        self.exported = self.module.weight.item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_parts_are_summed_in_fp32(tmp_path, dtype):
    found = []
    for accumulate in (1, 8):
        own = settings(tmp_path, accumulate=accumulate)
        training = Training(Sum(dtype), own, OptimiserSettings(), ORDER, World())
        metrics, losses = training.gradients(0)
        assert [part for part, _ in losses] == list(range(accumulate))
        found.append((training.optimiser.gradients()[0], metrics))
    assert all(gradient.dtype == torch.float32 for gradient, _ in found)
    assert float(found[1][0]) == float(found[0][0]) == 4.5
    assert found[1][1]["mean"] == found[0][1]["mean"] == 4.5
    assert found[1][1]["loss"] == pytest.approx(2.25, rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_average_of_the_weights_is_what_is_exported(tmp_path, dtype):
    optimiser = OptimiserSettings(learning_rate=0.1, ema=0.8, schedule="constant")
    seen = []
    objective = Sum(dtype)
    training = Training(objective, settings(tmp_path, steps=6), optimiser, ORDER, World())
    real = training.optimiser.step

    def step(number):
        rate = real(number)
        seen.append(training.optimiser.masters[0].item())
        return rate

    training.optimiser.step = step
    training.go(console=QUIET)
    average = 0.5
    for i, value in enumerate(seen):
        decay = min(0.8, (1 + i) / (10 + i))
        average = decay * average + (1 - decay) * value
    assert objective.exported == pytest.approx(
        average, rel=1e-2 if dtype is torch.bfloat16 else 1e-6
    )
    assert objective.module.weight.item() == pytest.approx(seen[-1], rel=1e-2)
    assert abs(average - seen[-1]) > 0.02


def test_the_best_checkpoint_has_the_highest_real_accepted_length(tmp_path):
    lengths = {4: 1.5, 8: 2.5, 12: 2.0}
    toy, kept = Toy(), []

    def measure():
        step = len(measured) * 4 + 4
        measured.append(step)
        return {"real_accepted_length": lengths[step], "real_accepted_length_t0": 9.0}

    measured = []
    evaluation = Evaluation(4, measure, lambda: kept.append(measured[-1]))
    result = run(toy, settings(tmp_path), evaluation=evaluation)
    assert (measured, kept) == ([4, 8, 12], [4, 8])
    log = {entry["step"]: entry for entry in log_of(tmp_path)}
    assert {s: log[s]["real_accepted_length"] for s in lengths} == lengths
    assert log[8]["accepted_length"] == 1.0
    assert result.metrics["real_accepted_length_t0"] == 9.0


def test_the_best_is_remembered_when_a_run_is_resumed(tmp_path):
    kept = []
    high = Evaluation(5, lambda: {"real_accepted_length": 3.0}, lambda: kept.append("high"))
    with pytest.raises(KeyboardInterrupt):
        run(Toy(die_at=8), settings(tmp_path), evaluation=high)
    low = replace(high, measure=lambda: {"real_accepted_length": 2.0})
    run(Toy(), settings(tmp_path), evaluation=low, resume=True)
    assert kept == ["high"]
    best = json.loads((path_of(tmp_path / "run", 12) / "state.json").read_text())
    assert (best["best_step"], best["best_accepted_length"]) == (5, 3.0)


def test_epochs_in_place_of_steps(tmp_path):
    own = RunSettings(output_dir=str(tmp_path / "run"), epochs=2.5)
    assert run(Toy(), own).steps == 15
    for given, said in (({}, "neither is given"), ({"steps": 3, "epochs": 1}, "both are given")):
        with pytest.raises(ValueError, match=f"either steps or epochs, but {said}"):
            RunSettings(output_dir="x", **given)


def test_tensorboard_gets_every_logged_number(tmp_path):
    pytest.importorskip("tensorboard")
    run(Toy(), settings(tmp_path, tensorboard=True))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    losses = [(e.step, e.value) for e in events.Scalars("loss")]
    assert losses == [(e["step"], pytest.approx(e["loss"])) for e in log_of(tmp_path)]


def test_tensorboard_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(RecipeError, match=r"install dspark\[tensorboard\]"):
        run(Toy(), settings(tmp_path, tensorboard=True))
