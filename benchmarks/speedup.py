"""Speed-up over plain decoding on evaluation tasks, one request at a time, by domain.

Each prompt is decoded plainly and with a drafter, one right after the other, as `dspark fit` does
in its evaluation; with `--out` a stopped run goes on.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

import dspark
from benchmarks.common import add_machine_options, emit, environment, say
from dspark.evaluation.tasks import load_benchmark
from dspark.fitting.evaluation import TEMPERATURES, HeldOutPrompt, fits, race, speedup


def main() -> None:
    """Run the races and print one JSON line."""
    parser = argparse.ArgumentParser(prog="benchmarks.speedup", description=__doc__)
    parser.add_argument("--model", default="smollm2", help="the target")
    parser.add_argument("--draft", help="default: the drafter attached; ngram: prompt lookup")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="its folder")
    parser.add_argument("--tasks", default="gsm8k,mbpp,mt-bench")
    parser.add_argument("--limit", type=int, default=50, help="prompts of a task")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--out", type=Path, help="journal of a run that may be stopped")
    add_machine_options(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = dspark.load(args.model, args.draft, dtype=args.dtype or "auto", offline=True)
    held = [
        HeldOutPrompt(question.prompt, task)
        for task in args.tasks.split(",")
        for question in load_benchmark(task, args.data / "eval", limit=args.limit, seed=args.seed)
        .with_turns(1)
        .questions
        if fits(model, question.prompt, args.max_new_tokens)
    ]
    with tempfile.TemporaryDirectory() as folder:
        laps = race(
            model,
            held,
            args.out or Path(folder) / "laps.jsonl",
            temperatures=TEMPERATURES,
            max_new_tokens=args.max_new_tokens,
            least=len(held),
            is_over=lambda: False,
            progress=lambda done, total: None if done % 10 else say(f"{done} of {total} prompts"),
        )
    results = {
        f"t{temperature:g}": {
            task or "all": speedup(
                [x for x in laps if x.temperature == temperature and task in (None, x.domain)]
            )
            for task in (*args.tasks.split(","), None)
        }
        for temperature in TEMPERATURES
    }
    emit("speedup", environment(model.target.dtype), results)


if __name__ == "__main__":
    main()
