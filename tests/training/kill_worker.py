"""Trains, is killed at the n-th change of the disk, goes on; for every n. Run by test_killed.py.

Arguments: a folder to work in. Prints one JSON object: how many deaths there were, and after which
of them the weights were not those of a run that was left alone.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from dspark.training.loop import Training
from dspark.training.objective import DataOrder
from dspark.training.parallel import World
from dspark.training.settings import OptimiserSettings, RunSettings

STEPS = 3
ORDER = DataOrder(1.0, 8, lambda step, part, parts: "")


class Noise:
    """Follows noise from torch's own generator."""

    def __init__(self):
        torch.manual_seed(1)
        self.module = nn.Linear(6, 4)
        self.tokens_seen = 0

    def loss(self, step, part, parts):
        self.tokens_seen += 8
        return (self.module(torch.randn(8, 6)) - torch.randn(8, 4)).square().mean(), {}

    def export(self, directory):
        torch.save(self.module.state_dict(), directory / "weights.pt")


def train(output, resume):
    run = RunSettings(output_dir=str(output), steps=STEPS, save_every=1, keep_last=1, log_every=1)
    training = Training(Noise(), run, OptimiserSettings(ema=0.9), ORDER, World())
    training.start(resume)
    training.go(console=Console(quiet=True))


def die_at(change):
    """Kill this process when it is about to change the disk for the n-th time."""
    left = [change]

    def counted(real):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    for module, name in ((os, "fsync"), (os, "replace"), (os, "mkdir"), (shutil, "rmtree")):
        setattr(module, name, counted(getattr(module, name)))


def in_child(action):
    """Do something in a process of its own; the signal that killed it, or 0."""
    child = os.fork()
    if child == 0:
        try:
            action()
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return os.WTERMSIG(status)
    assert os.WEXITSTATUS(status) == 0
    return 0


def main():
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    train(folder / "whole", False)  # here, so that no child need import what it needs
    whole = torch.load(folder / "whole" / "weights.pt", weights_only=True)
    wrong, change, signalled = [], 0, signal.SIGKILL
    while signalled == signal.SIGKILL:
        change += 1
        output = folder / str(change)

        def killed(change=change, output=output):
            die_at(change)
            train(output, False)

        signalled = in_child(killed)
        in_child(lambda output=output: train(output, True))
        found = torch.load(output / "weights.pt", weights_only=True)
        steps = [json.loads(line)["step"] for line in (output / "log.jsonl").open()]
        left = sorted(path.name for path in (output / "checkpoints").iterdir())
        same = all(torch.equal(found[name], whole[name]) for name in whole)
        if not same or steps != [1, 2, 3] or left != ["step_00000003"]:
            wrong.append({"change": change, "same": same, "steps": steps, "left": left})
    print(json.dumps({"deaths": change - 1, "wrong": wrong}))


if __name__ == "__main__":
    main()
