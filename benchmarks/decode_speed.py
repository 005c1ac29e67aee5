"""Plain decoding speed of one request by kind of weights, beside llama.cpp's `llama-bench`.

The ways take turns, each round another one first, so that what slows the machine for a while slows
all of them; medians count. Ours decode 64 tokens behind a prompt of one, through the engine and end
to end; llama.cpp's are `llama-bench -p 0 -n 64`.

    python -m benchmarks.decode_speed --model DIR --threads 1 --llama-bench build/bin/llama-bench \
      --gguf F16=target-F16.gguf --gguf Q8_0=target-Q8_0.gguf
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable

import torch

import dspark
from benchmarks.common import DTYPES, add_machine_options, emit, environment, model_path, say
from dspark.engine.model import Model

WEIGHTS = {
    "plain": {"weights": "plain"},
    "packed": {"weights": "packed"},
    "int8": {"quantize": "int8"},
}
TOKENS = 64


def ours(model: Model) -> float:
    """Tokens per second behind the first one."""
    seconds = []
    for count in (1, TOKENS + 1):
        started = time.perf_counter()
        output = model.generate("Once", max_new_tokens=count, ignore_eos=True)
        seconds.append(time.perf_counter() - started)
    return (len(output.token_ids) - 1) / (seconds[1] - seconds[0])


def theirs(program: str, path: str, threads: int) -> float:
    """Tokens per second of a GGUF file in llama-bench."""
    options = ["-p", "0", "-n", str(TOKENS), "-t", str(threads), "-r", "1", "-o", "json"]
    found = subprocess.run([program, "-m", path, *options], capture_output=True, check=True)
    return float(json.loads(found.stdout)[0]["avg_ts"])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="a target")
    parser.add_argument("--kinds", nargs="+", choices=WEIGHTS, default=list(WEIGHTS))
    parser.add_argument("--llama-bench", metavar="PROGRAM", help="of llama.cpp")
    parser.add_argument("--gguf", action="append", default=[], metavar="TYPE=FILE")
    parser.add_argument("--rounds", type=int, default=5)
    add_machine_options(parser)
    args = parser.parse_args()
    if bool(args.gguf) != bool(args.llama_bench):
        parser.error("--gguf and --llama-bench go together")
    torch.set_num_threads(args.threads)
    dtype = args.dtype or "float32"
    models = {
        kind: dspark.load(
            model_path(args.model), "none", device="cpu", dtype=dtype, **WEIGHTS[kind]
        )
        for kind in args.kinds
    }
    ways: dict[str, Callable[[], float]] = {n: lambda m=m: ours(m) for n, m in models.items()}
    for text in args.gguf:
        name, _, path = text.partition("=")
        ways[f"llama.cpp {name}"] = lambda p=path: theirs(args.llama_bench, p, args.threads)
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for model in models.values():
        ours(model)
    for number in range(args.rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            speeds[name].append(ways[name]())
        say(", ".join(f"{name} {found[-1]:.1f}" for name, found in speeds.items()))
    results = {
        name: {"median": statistics.median(found), "least": min(found), "most": max(found)}
        for name, found in speeds.items()
    }
    emit("decode_speed", environment(DTYPES[dtype]), {"tokens_per_s": results})


if __name__ == "__main__":
    main()
