"""One of several processes that train the same toy: run by test_parallel.py.

Arguments: a folder to write to. Every scenario writes its log, its weights and what went wrong.
"""

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from torch import nn
from torch.distributed.tensor import DTensor

from dspark.errors import DSparkError
from dspark.training.loop import Training
from dspark.training.objective import DataOrder, Evaluation
from dspark.training.parallel import World, start_parallel
from dspark.training.settings import OptimiserSettings, RunSettings

ROWS, LENGTH, STEPS = 8, 6, 12
ORDER = DataOrder(1.0, ROWS * LENGTH, lambda step, part, parts: f"part {part} of {parts}")


class Uneven:
    """Regression on rows of which the later ones supervise far fewer tokens.

    Weights are read as attributes, across modules, as drafters do.
    """

    def __init__(self, dtype=torch.float32, act=None):
        torch.manual_seed(3)
        self.module = nn.ModuleDict({"table": nn.Embedding(11, 5), "layers": nn.Linear(5, 3)})
        self.module.to(dtype)
        self.act = act
        self.tokens_seen = 0
        self.head = torch.randn(3, generator=torch.Generator().manual_seed(4)).to(dtype)

    def loss(self, step, part, parts):
        if self.act is not None:
            self.act(step, part)
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(11, (ROWS, LENGTH), generator=generator)
        counts = torch.tensor([6, 6, 5, 4, 1, 1, 0, 1]).unsqueeze(1)
        weight = (torch.arange(LENGTH) < counts) * torch.exp(-torch.arange(LENGTH) / 4.0)
        share = ROWS // parts
        mine = slice(part * share, (part + 1) * share)
        self.tokens_seen += share * LENGTH
        x = nn.functional.embedding(ids[mine], self.module["table"].weight)
        layer = self.module["layers"]
        hidden = torch.tanh(nn.functional.linear(x, layer.weight, layer.bias))
        error = ((hidden @ self.head).float() - torch.sin(ids[mine].float())).square()
        loss = (weight[mine] * error).sum() / (weight.sum() / parts)
        return loss, {"rows": float(share)}

    def export(self, directory):
        torch.save(self.module.state_dict(), directory / "weights.pt")


def settings(folder, name, **others):
    given = {"save_every": 4, "log_every": 1, "rows": ROWS, "steps": STEPS, **others}
    return RunSettings(output_dir=str(folder / name), **given)


def train(objective, run, world, *, ema=None, resume=False, evaluation=None, name="adamw"):
    optimiser = OptimiserSettings(
        name=name, learning_rate=0.05, matrix_learning_rate=0.05, ema=ema, clip=0.5
    )
    training = Training(objective, run, optimiser, ORDER, world)
    training.start(resume)
    return training.go(console=Console(quiet=True), evaluation=evaluation)


def cut(step, part):
    if step == 6:
        raise KeyboardInterrupt


def scenarios(folder, world):
    """Every scenario's name and what runs it."""
    sharded = replace(world, sharded=True)

    def stop_second(step, part):
        if step == 6 and world.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def broken():
        objective = Uneven()
        real = objective.loss

        def loss(step, part, parts):
            value, metrics = real(step, part, parts)
            return (value * float("nan") if (step, part) == (5, 3) else value), metrics

        objective.loss = loss
        return objective

    def cut_then_resume(name, first, second):
        def go():
            try:
                train(Uneven(act=cut), settings(folder, name), first)
            except KeyboardInterrupt:
                train(Uneven(), settings(folder, name), second, resume=True)

        return go

    def measured(name):
        objective, seen = Uneven(), []

        def measure():
            weight = objective.module["layers"].weight
            assert weight.shape == (3, 5)
            assert not isinstance(weight, DTensor)
            seen.append(float(weight.sum()))
            return {"real_accepted_length": seen[-1]}

        evaluation = Evaluation(4, measure, lambda: None)
        train(objective, settings(folder, name), sharded, ema=0.9, evaluation=evaluation)

    for parallel, of in (("ddp", world), ("fsdp", sharded)):
        for accumulate in (1, 2):
            name = f"{parallel} {accumulate}"
            run = settings(folder, name, accumulate=accumulate)
            yield name, lambda run=run, of=of: train(Uneven(), run, of)
        name = f"{parallel} bfloat16"
        run = settings(folder, name, dtype="bfloat16", accumulate=2)
        yield name, lambda run=run, of=of: train(Uneven(torch.bfloat16), run, of)
        run = settings(folder, f"{parallel} muon")
        yield f"{parallel} muon", lambda run=run, of=of: train(Uneven(), run, of, name="muon")
        yield f"{parallel} cut", cut_then_resume(f"{parallel} cut", of, of)
        run = settings(folder, f"{parallel} stopped")
        yield f"{parallel} stopped", lambda run=run, of=of: train(Uneven(act=stop_second), run, of)
        run = settings(folder, f"{parallel} nan", accumulate=2)
        yield f"{parallel} nan", lambda run=run, of=of: train(broken(), run, of)
    yield "ddp then fsdp", cut_then_resume("ddp then fsdp", world, sharded)
    yield "fsdp average", lambda: measured("fsdp average")
    alone = settings(folder, "of one")
    if Path(alone.output_dir).is_dir():  # a run of one process, cut
        yield "of one", lambda: train(Uneven(), alone, sharded, resume=True)


def main():
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    rank, ranks = start_parallel("cpu")
    errors = {}
    for name, go in scenarios(folder, World(rank, ranks)):
        try:
            go()
        except DSparkError as error:
            errors[name] = str(error)
    (folder / f"errors_{rank}.json").write_text(json.dumps(errors))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
