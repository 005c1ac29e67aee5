"""What a step of a target costs: rows, requests and a prompt's read, by kind of weights.

    python -m benchmarks.step --model DIR --kinds plain,packed,int8 --threads 1

The kinds take turns within one process; each figure is the lower quartile. `--cpu-time` counts the
thread's own time in place of the clock's, for one thread on a machine that does other work too.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common import model_path
from dspark.attention.paged_cache import PAGE_SIZE, BlockTable
from dspark.attention.ragged_batch import RaggedBatch
from dspark.engine.profile import hardware_name
from dspark.targets.target import Target

CONTEXT = 128
PAGES = 16
SHAPES = ((1, 1), (1, 8), (1, 16), (1, 32), (8, 1), (8, 8), (32, 1))
"""(requests, rows of each)"""


def main() -> None:
    """Measure, and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--kinds", default="plain,packed", help="of plain, packed, int8")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--cpu-time", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.thread_time if options.cpu_time else time.perf_counter
    kinds = options.kinds.split(",")
    targets = {kind: load(options.model, options.dtype, kind) for kind in kinds}
    rows: list[dict[str, Any]] = []
    for name, make in cases().items():
        steps = {kind: make(target) for kind, target in targets.items()}
        seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
        for _ in range(options.repeats + 1):
            for kind, step in steps.items():
                start = clock()
                step()
                seconds[kind].append(clock() - start)
        quick = {kind: sorted(all_[1:])[len(all_) // 4] * 1e3 for kind, all_ in seconds.items()}
        rows.append({"case": name, "ms": {kind: round(ms, 2) for kind, ms in quick.items()}})
        print(name, rows[-1]["ms"], flush=True)
    print(
        json.dumps(
            {
                "hardware": hardware_name(torch.device("cpu")),
                "threads": options.threads,
                "clock": "cpu" if options.cpu_time else "wall",
                "weights": {kind: target.weights for kind, target in targets.items()},
                "rows": rows,
            }
        )
    )


def load(model: str, dtype: str, kind: str) -> Target:
    """The target with its weights of one kind."""
    path = model_path(model)
    if kind == "int8":
        return Target.load(path, device="cpu", dtype=dtype, quantize="int8")
    return Target.load(path, device="cpu", dtype=dtype, weights=kind)  # type: ignore[arg-type]


def cases() -> dict[str, Callable[[Target], Callable[[], object]]]:
    """What is measured: a target to a step of it."""
    found: dict[str, Callable[[Target], Callable[[], object]]] = {
        f"{requests} x {rows}": lambda target, r=requests, k=rows: decoding(target, r, k)  # type: ignore[misc]
        for requests, rows in SHAPES
    }
    found[f"prompt of {2 * CONTEXT - PAGE_SIZE}"] = reading
    return found


@torch.inference_mode()
def decoding(target: Target, requests: int, rows: int) -> Callable[[], object]:
    """A step of requests that stand behind a context."""
    cache = target.new_cache(requests * PAGES)
    tables = [BlockTable(range(i * PAGES, (i + 1) * PAGES)) for i in range(requests)]
    context = RaggedBatch.build([(table, 0, range(100, 100 + CONTEXT)) for table in tables])
    target.forward(context, cache)
    parts = [(table, CONTEXT, range(5, 5 + rows)) for table in tables]
    return lambda: step(target, parts, cache, "all")


def reading(target: Target) -> Callable[[], object]:
    """A prompt's first read."""
    tokens = 2 * CONTEXT - PAGE_SIZE
    cache, table = target.new_cache(PAGES), BlockTable(range(PAGES))
    last = torch.tensor([tokens - 1])
    return lambda: step(target, [(table, 0, range(100, 100 + tokens))], cache, last)


@torch.inference_mode()
def step(target: Target, parts: Any, cache: Any, rows: Any) -> object:
    """One forward, the batch's making included."""
    return target.forward(RaggedBatch.build(parts), cache, logit_rows=rows)


if __name__ == "__main__":
    main()
