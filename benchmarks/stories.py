"""Our drafters beside the reference stack's: the same target, data and number of steps.

Trains DSpark, DFlash and Eagle3 for a small story model by the recipes `*_stories260k`, on the
sequences that the reference stack was trained on (600 steps of 16), and decodes its evaluation
prompts: 128 new tokens, 100 prompts at temperature 1 and the first 50 at 0, whole blocks verified
token by token as the reference does. Its own figures, from an unmodified run of it, stand beside
ours. Seconds per step are CPU time of one thread, which other work on the machine changes little.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dspark
from benchmarks.common import add_machine_options, emit, environment, say
from dspark.data.files.json_lines import read_json_lines
from dspark.request import Output, Request, SamplingParams, merge_stats
from dspark.training.run import run_recipe

ALGORITHMS = ("dspark", "dflash", "eagle3")
# DeepSpec at afdfa7c, unmodified: accepted length with its 95 % interval, seconds per step.
REFERENCE: dict[str, dict[str, Any]] = {
    "dspark": {"t1": (1.446, 1.429, 1.463), "t0": (1.387, 1.358, 1.417), "seconds": 0.77},
    "dflash": {"t1": (1.363, 1.351, 1.375), "t0": (1.417, 1.388, 1.445), "seconds": 0.57},
    "eagle3": {"t1": (1.904, 1.875, 1.934), "t0": (2.390, 2.262, 2.517), "seconds": 1.38},
}
PROMPTS = {"t1": 100, "t0": 50}
TEMPERATURES = {"t1": 1.0, "t0": 0.0}
NEW_TOKENS = 128
RESAMPLES = 10_000


def main() -> None:
    """Train and decode each."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--target", default="../shared/models/stories260K")
    parser.add_argument("--replay", type=Path, default=Path("../shared/golden/replay"))
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where drafters are kept")
    parser.add_argument("--only", choices=ALGORITHMS, action="append")
    add_machine_options(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = {name: _one(name, args) for name in args.only or ALGORITHMS}
    emit("stories", environment(torch.float32), results)


def _one(name: str, args: argparse.Namespace) -> dict[str, Any]:
    output = args.runs / f"stories_{name}"
    timing = output / "seconds.json"
    if not timing.is_file():
        shutil.rmtree(output, ignore_errors=True)
        started = time.process_time()
        done = run_recipe(
            f"{name}_stories260k",
            [
                f"target={args.target}",
                f"samples.root={args.replay}",
                f"run.output_dir={output}",
                f"run.seed={args.seed}",
            ],
        )
        timing.write_text(json.dumps((time.process_time() - started) / done.steps))
    found: dict[str, Any] = {"seconds_per_step": json.loads(timing.read_text())}
    model = dspark.load(args.target, str(output), dtype="float32", offline=True)
    rows = [row for _, row in read_json_lines(args.replay / "eval_prompts.jsonl")]
    for key, temperature in TEMPERATURES.items():
        requests = [
            Request(
                tuple(row["input_ids"]),
                SamplingParams(
                    NEW_TOKENS, temperature=temperature, seed=args.seed + i, ignore_eos=True
                ),
            )
            for i, row in enumerate(rows[: PROMPTS[key]])
        ]
        engine = model.engine(requests, batch_size=25, verifier="token", schedule="fixed")
        outputs = engine.run(requests)
        stats = merge_stats(outputs)
        low, high = _interval(outputs, args.seed)
        found[key] = {
            "accepted_length": stats.accepted_length,
            "ci95": (low, high),
            "conditional_acceptance": stats.conditional_acceptance,
            "reference": REFERENCE[name][key],
        }
    found["not_below_reference_t1"] = found["t1"]["ci95"][1] >= REFERENCE[name]["t1"][1]
    found["step_over_reference"] = found["seconds_per_step"] / REFERENCE[name]["seconds"]
    say(
        f"{name}: accepted length {found['t1']['accepted_length']:.3f} at T=1 "
        f"(reference {REFERENCE[name]['t1'][0]}), {found['t0']['accepted_length']:.3f} at T=0 "
        f"({REFERENCE[name]['t0'][0]}); {found['seconds_per_step']:.2f} s a step "
        f"({REFERENCE[name]['seconds']})"
    )
    return found


def _interval(outputs: Sequence[Output], seed: int) -> tuple[float, float]:
    """Bootstrap 95 % interval of tokens per round, over prompts."""
    counts = np.array([(o.stats.tokens, o.stats.rounds) for o in outputs], dtype=float)
    chosen = np.random.default_rng(seed).integers(len(counts), size=(RESAMPLES, len(counts)))
    sums = counts[chosen].sum(axis=1)
    low, high = np.quantile(sums[:, 0] / sums[:, 1], (0.025, 0.975))
    return float(low), float(high)


if __name__ == "__main__":
    main()
