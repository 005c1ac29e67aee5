"""What a step costs, and what the process holds, as contexts grow: 1, 8 and 32 users.

    python -m benchmarks.context_cost --model smollm2 --threads 1

Each user stands behind a context of random keys and values, since a prompt's read would take
minutes and its numbers change no time. A step has one row a user (plain decoding) or `--rows` (a
verification); milliseconds are lower quartiles. `resident` is the process's memory after the steps.
`--figure` draws the curves (extra `plots`); with `--line` those of an earlier JSON line.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import dspark
from benchmarks.common import add_machine_options, emit, environment, say
from dspark.attention.paged_cache import PAGE_SIZE, BlockTable, PagedCache
from dspark.attention.ragged_batch import RaggedBatch
from dspark.targets.target import Target

CONTEXTS, USERS = (128, 512, 2048, 8000), (1, 8, 32)


def filled_cache(target: Target, tables: Sequence[BlockTable]) -> PagedCache:
    """A cache whose every row has been written, as after prompts: unused memory costs no read."""
    pages = sum(len(table.pages) for table in tables)
    cache = target.new_cache(pages)
    generator = torch.Generator().manual_seed(0)
    for layer, shape in enumerate(cache.shapes):
        for table in tables:
            rows = torch.arange(table.capacity) + table.pages[0] * PAGE_SIZE
            key, value = (
                torch.randn(len(rows), shape.kv_heads, dim, generator=generator).to(cache.dtype)
                for dim in (shape.key_dim, shape.value_dim)
            )
            cache.write(layer, rows, key, value)
    return cache


@torch.inference_mode()
def measure(target: Target, users: int, context: int, rows: int, repeats: int) -> dict[str, Any]:
    """Milliseconds of a step of every user, and bytes."""
    pages = -(-(context + rows) // PAGE_SIZE)
    tables = [BlockTable(range(user * pages, (user + 1) * pages)) for user in range(users)]
    cache = filled_cache(target, tables)
    found: dict[str, Any] = {}
    for name, count in (("plain", 1), ("verify", rows)):
        parts = [(table, context, range(5, 5 + count)) for table in tables]
        seconds = []
        for _ in range(repeats + 1):
            started = time.perf_counter()
            target.forward(RaggedBatch.build(parts), cache, logit_rows="all")
            seconds.append(time.perf_counter() - started)
        found[f"{name}_ms"] = round(sorted(seconds[1:])[repeats // 4] * 1e3, 1)
    return found | {"cache_mb": round(cache.bytes / 1e6), "resident_mb": round(resident() / 1e6)}


def resident() -> int:
    """Bytes of the process that lie in memory now (Linux)."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmRSS"))


def draw(line: Mapping[str, Any], path: Path) -> None:
    """Write the curves of time and memory over context, a line for each number of users.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows, machine = line["settings"]["rows"], line["environment"]
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4))
    panels = (
        ("a step of plain decoding, ms a user", lambda step: step["plain_ms"] / step["users"]),
        (
            f"a verification of {rows} rows, ms a user",
            lambda step: step["verify_ms"] / step["users"],
        ),
        ("memory of the cache, GB", lambda step: step["cache_mb"] / 1e3),
    )
    for axis, (title, value) in zip(axes, panels, strict=True):
        for users in sorted({step["users"] for step in line["steps"]}):
            steps = [step for step in line["steps"] if step["users"] == users]
            xs = [step["context"] for step in steps]
            axis.plot(
                xs,
                [value(step) for step in steps],
                marker="o",
                label=f"{users} user{'s' * (users > 1)}",
            )
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("tokens of context")
        axis.set_ylim(bottom=0)
    axes[0].legend(frameon=False)
    threads = f"{machine['threads']} thread(s)"
    figure.suptitle(f"{line['settings']['model']} on {machine['cpu']}, {threads}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    """Measure, print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    add_machine_options(parser)
    parser.add_argument("--contexts", type=int, nargs="+", default=list(CONTEXTS))
    parser.add_argument("--users", type=int, nargs="+", default=list(USERS))
    parser.add_argument("--rows", type=int, default=8, help="of a verification")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--figure", type=Path, help="draw the curves into this file")
    parser.add_argument("--line", type=Path, help="the JSON line of an earlier run, to draw it")
    options = parser.parse_args()
    if options.line is not None:
        draw(json.loads(options.line.read_text()), options.figure or Path("context_cost.png"))
        return
    torch.set_num_threads(options.threads)
    target = dspark.load(options.model, device="cpu", dtype=options.dtype or "auto").target
    say("| users | context | plain ms | ms a token and user | verify ms | cache MB | resident MB |")
    say("|---|---|---|---|---|---|---|")
    lines = []
    for users in options.users:
        for context in options.contexts:
            found = measure(target, users, context, options.rows, options.repeats)
            lines.append({"users": users, "context": context, **found})
            say(
                f"| {users} | {context:,} | {found['plain_ms']} | "
                f"{found['plain_ms'] / users:.1f} | {found['verify_ms']} | "
                f"{found['cache_mb']:,} | {found['resident_mb']:,} |"
            )
    settings = {"model": options.model, "rows": options.rows, "weights": target.weights}
    machine, results = environment(target.dtype), {"settings": settings, "steps": lines}
    emit("context_cost", machine, results)
    if options.figure is not None:
        draw({"environment": machine, **results}, options.figure)


if __name__ == "__main__":
    main()
