"""Speed-up over plain decoding on evaluation tasks, one request at a time, by domain.

Prompts of all tasks come in random order. Each is decoded plainly and with a drafter, one right
after the other, by engines that live as long as the run, as in the evaluation of `dspark fit`. The
schedule `lagged` measures a cost table first where this machine has none. With `--out` a stopped
run goes on.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path

import torch

from benchmarks.common import add_machine_options, emit, environment, load_pair, say
from dspark.engine.model import Model
from dspark.engine.speculation.schedule import SCHEDULES
from dspark.evaluation.tasks import load_benchmark
from dspark.fitting.evaluation import TEMPERATURES, HeldOutPrompt, Lap, fits, race, speedup


def held_out(model: Model, args: argparse.Namespace) -> list[HeldOutPrompt]:
    """The prompts, first turns, in random order.

    Raises:
        DataError: a task's file is missing or malformed.
        SystemExit: no prompt leaves room for an answer.
    """
    found = [
        HeldOutPrompt(question.prompt, task)
        for task in args.tasks.split(",")
        for question in load_benchmark(task, args.data / "eval", limit=args.limit, seed=args.seed)
        .with_turns(1)
        .questions
        if fits(model, question.prompt, args.max_new_tokens)
    ]
    if not found:
        raise SystemExit("No prompt fits the context; ask for fewer tokens.")
    random.Random(args.seed).shuffle(found)
    return found


def run(model: Model, args: argparse.Namespace) -> list[Lap]:
    """All laps, those of an earlier run with the same options among them."""
    prompts = held_out(model, args)
    with tempfile.TemporaryDirectory() as folder:
        return race(
            model,
            prompts,
            args.out or Path(folder) / "laps.jsonl",
            temperatures=TEMPERATURES,
            max_new_tokens=args.max_new_tokens,
            least=len(prompts),
            is_over=lambda: False,
            progress=lambda done, total: None if done % 10 else say(f"{done} of {total} prompts"),
            schedule=args.schedule,
            settings={name: str(value) for name, value in vars(args).items() if name != "out"},
        )


def main() -> None:
    """Run the laps and print one JSON line."""
    parser = argparse.ArgumentParser(prog="benchmarks.speedup", description=__doc__)
    parser.add_argument("--model", default="smollm2", help="the target")
    parser.add_argument("--draft", help="default: the drafter attached; ngram: prompt lookup")
    parser.add_argument("--schedule", choices=SCHEDULES[1:], default="lagged")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="its folder")
    parser.add_argument("--tasks", default="gsm8k,mbpp,mt-bench")
    parser.add_argument("--limit", type=int, default=50, help="prompts of a task")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--out", type=Path, help="journal of a run that may be stopped")
    add_machine_options(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = load_pair(args.model, args.dtype or "auto", args.draft)
    laps = run(model, args)
    results: dict[str, object] = {
        "model": args.model,
        "drafter": args.draft or "attached",
        "schedule": args.schedule,
    }
    for temperature in TEMPERATURES:
        mine = [lap for lap in laps if lap.temperature == temperature]
        results[f"t{temperature:g}"] = {
            **{
                task: speedup([lap for lap in mine if lap.domain == task])
                for task in args.tasks.split(",")
            },
            "all": speedup(mine),
        }
    emit("speedup", environment(model.target.dtype), results)


if __name__ == "__main__":
    main()
