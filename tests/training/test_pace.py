"""A training that ends in time."""

import json
import math

import pytest
import torch
from rich.console import Console
from torch import nn

from dspark.errors import UsageError
from dspark.training.checkpoints import read_position
from dspark.training.loop import Training
from dspark.training.objective import DataOrder
from dspark.training.optim import learning_rate_factor
from dspark.training.parallel import World
from dspark.training.progress import Pace
from dspark.training.settings import OptimiserSettings, RunSettings


def paced(pace, clock, step_s, total, done=0):
    """The steps of a run whose n-th step takes step_s(n) seconds, and when it ended."""
    pace.begin(done, total)
    while done < total:
        clock[0] += step_s(done)
        done += 1
        total = pace.steps(done, total)
    return done, clock[0]


@pytest.mark.parametrize(
    ("planned", "step_s"),
    [
        (100, lambda n: 1.0),
        (100, lambda n: 4.0),
        (100, lambda n: 0.25),
        (100, lambda n: 3.0 if n < 20 else 0.7),  # a cache that fills, or a neighbour that leaves
        (100, lambda n: 0.7 if n < 60 else 2.0),
        (100, lambda n: 1.0 + 0.5 * (n % 2)),
        (3, lambda n: 0.5),
        (10_000, lambda n: 2.0),
    ],
)
def test_a_run_ends_in_time_whatever_its_speed(planned, step_s):
    clock = [50.0]
    pace = Pace(100.0, now=lambda: clock[0])
    done, ended = paced(pace, clock, step_s, planned)
    assert 90 < ended - 50 <= 100 + max(map(step_s, range(done)))
    assert done >= 1


def test_a_speed_as_planned_changes_nothing():
    clock = [0.0]
    pace = Pace(100.0, now=lambda: clock[0])
    assert paced(pace, clock, lambda n: 1.0, 100) == (100, 100.0)
    assert pace.changes == 0
    assert pace.seconds_per_step == pytest.approx(1.0)


def test_it_tells_steps_done_and_in_all():
    clock, told = [0.0], []
    pace = Pace(10.0, now=lambda: clock[0], tell=lambda *now: told.append(now))
    paced(pace, clock, lambda n: 2.5, 10)
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


class Noise:
    """Follows noise."""

    def __init__(self):
        torch.manual_seed(1)
        self.module = nn.Linear(6, 4)
        self.tokens_seen = 0

    def loss(self, step, part, parts):
        self.tokens_seen += 8
        return (self.module(torch.randn(8, 6)) - torch.randn(8, 4)).square().mean(), {}

    def export(self, directory):
        torch.save(self.module.state_dict(), directory / "weights.pt")


def training(output, steps, resume=False):
    run = RunSettings(output_dir=str(output), steps=steps, save_every=5, log_every=1)
    order = DataOrder(1.0, 8, lambda step, part, parts: "")
    found = Training(Noise(), run, OptimiserSettings(warmup_fraction=0.0), order, World())
    found.start(resume)
    return found


class Fixed(Pace):
    """Gives a run another number of steps after one of them."""

    def __init__(self, at, steps):
        super().__init__(1e9)
        self.at, self.to = at, steps

    def steps(self, done, total):
        return self.to if done == self.at else total


def rates(output):
    lines = (output / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["learning_rate"] for line in lines]


@pytest.mark.parametrize("to", [6, 20])
def test_the_rate_decays_to_the_end_of_the_new_steps(tmp_path, to):
    result = training(tmp_path, 12).go(console=Console(quiet=True), pace=Fixed(3, to))
    assert result.steps == to
    found, settings = rates(tmp_path), OptimiserSettings(warmup_fraction=0.0)
    expected = [learning_rate_factor(settings, n, 12 if n < 3 else to) for n in range(to)]
    assert found == pytest.approx([settings.learning_rate * x for x in expected])
    assert math.isclose(found[-1], min(found))


def test_a_run_is_resumed_with_its_new_steps(tmp_path):
    class Killed(Fixed):
        def steps(self, done, total):
            if done == 5:
                raise KeyboardInterrupt
            return super().steps(done, total)

    with pytest.raises(KeyboardInterrupt):
        training(tmp_path, 12).go(console=Console(quiet=True), pace=Killed(4, 8))
    assert read_position(tmp_path).fixed["run.steps"] == 8
    assert training(tmp_path, 8, resume=True).go(console=Console(quiet=True)).steps == 8
    whole = tmp_path / "whole"
    training(whole, 12).go(console=Console(quiet=True), pace=Fixed(4, 8))
    ours, theirs = (torch.load(p / "weights.pt") for p in (tmp_path, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_second_run_on_one_output_dir_is_refused(tmp_path, monkeypatch):
    from dspark.data.files.atomic import only_run
    from dspark.training import run

    class Prepared:
        def __init__(self):
            self.training = training(tmp_path / "run", 3)

    monkeypatch.setattr(run, "load_recipe", lambda name, overrides: None)
    monkeypatch.setattr(run, "_prepare", lambda *_: Prepared())
    with only_run(tmp_path / "run"), pytest.raises(UsageError, match="in use by another run"):
        run.run_recipe("any", console=Console(quiet=True))
