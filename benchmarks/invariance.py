"""What depends on the shape of a batch on this machine, and what it costs that nothing does.

First, operations of a decoder: which numbers of rows give a row other bits than it has in a tile,
and whether its place in a tile matters. Then forwards in batch-invariant mode over the same in
the default mode, in turn in one process: the ratio is the median of the paired ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, scaled_dot_product_attention, sigmoid, silu

from benchmarks.common import DTYPES, add_machine_options, emit, environment, model_path, say
from benchmarks.placement import Shape
from benchmarks.sequential_head import random_target
from dspark.attention.paged_cache import PAGE_SIZE, BlockTable
from dspark.attention.ragged_batch import RaggedBatch
from dspark.targets.target import Target

# Qwen3-0.6B's width, with fewer layers.
WIDE = Shape(8, 1024, 16, 8, 128, 3072)
TILE = 16
ROWS = (*range(1, 34), 63, 64, 65, 100, 127, 128, 129, 200)
# Per forward: name, requests, tokens of each, tokens that each has already.
FORWARDS = (
    ("plain step", 1, 1, 200),
    ("round of 8 rows", 1, 8, 200),
    ("plain step of 8", 8, 1, 200),
    ("rounds of 8 rows of 8", 8, 8, 200),
    ("prompt of 256", 1, 256, 0),
)
Rows = Callable[[Tensor], Tensor]


def operations(dtype: torch.dtype) -> Iterator[tuple[str, int, Rows]]:
    """Functions of rows: name, width of the input, function."""
    random = torch.Generator().manual_seed(0)
    for out, width in ((160, 160), (416, 160), (1024, 1024), (3072, 1024), (1000, 8192)):
        weight = (torch.randn(out, width, generator=random) * width**-0.5).to(dtype)
        yield f"linear {width} to {out}", width, lambda x, weight=weight: linear(x, weight)
    for name, function in (
        ("silu", silu),
        ("gelu", lambda x: gelu(x, approximate="tanh")),
        ("sigmoid", sigmoid),
    ):
        for width in (24, 416, 3072, 9728):
            yield f"{name} of {width}", width, function
    for width in (160, 1024):
        yield f"mean of {width}", width, lambda x: x.float().pow(2).mean(-1, keepdim=True)


def vary(dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """Per operation the numbers of rows that change a row, and whether its place in a tile does."""
    found: dict[str, dict[str, Any]] = {}
    for name, width, function in operations(dtype):
        random = torch.Generator().manual_seed(1)
        x = (3 * torch.randn(max(ROWS), width, generator=random)).to(dtype)
        tile = function(x[:TILE].clone())
        rows = [
            n for n in ROWS if not torch.equal(function(x[:n].clone())[:TILE], tile[: min(n, TILE)])
        ]
        copies = function(x[:1].expand(TILE, -1).contiguous())
        found[name] = {"rows": rows, "place": not torch.equal(copies, copies[:1].expand_as(copies))}
    found["attention of 64 per head"] = vary_attention(dtype)
    return found


def vary_attention(dtype: torch.dtype) -> dict[str, Any]:
    """The same of a row of attention; beside it, numbers of keys behind its own that change it."""
    random = torch.Generator().manual_seed(2)
    query, key, value = (torch.randn(1, 4, 512, 64, generator=random).to(dtype) for _ in range(3))

    def row(position: int, rows: int, keys: int, place: int = 0) -> Tensor:
        first = position - place
        mask = torch.full((rows, keys), float("-inf"), dtype=dtype)
        for i in range(rows):
            mask[i, : first + i + 1] = 0
        own = query[:, :, first : first + rows]
        out = scaled_dot_product_attention(own, key[:, :, :keys], value[:, :, :keys], mask)
        return out[:, :, place]

    positions = (20, 63, 100, 171)
    tiles = [row(p, TILE, 192) for p in positions]
    pairs = list(zip(positions, tiles, strict=True))
    return {
        "rows": [n for n in ROWS if not all(torch.equal(row(p, n, 192), t) for p, t in pairs)],
        "place": not all(torch.equal(row(p, TILE, 192, 9), t) for p, t in pairs),
        "keys": [
            n for n in range(172, 260) if not all(torch.equal(row(p, TILE, n), t) for p, t in pairs)
        ],
    }


@torch.inference_mode()
def cost(targets: Mapping[bool, Target], repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds of forwards in both modes, and their ratio."""
    found: dict[str, dict[str, float]] = {}
    for name, requests, tokens, before in FORWARDS:
        size = -(-(before + tokens) // PAGE_SIZE)
        cache = targets[True].new_cache(requests * size)
        tables = [BlockTable(range(i * size, (i + 1) * size)) for i in range(requests)]
        parts = [(table, before, [5] * tokens) for table in tables]
        times: dict[bool, list[float]] = {False: [], True: []}
        for number in range(repeats + 2):
            for invariant in (False, True) if number % 2 else (True, False):
                target = targets[invariant]
                batch = RaggedBatch.build(parts)
                started = time.perf_counter()
                target.forward(batch, cache, logit_rows="all")
                times[invariant].append((time.perf_counter() - started) * 1e3)
        pairs = zip(times[True][2:], times[False][2:], strict=True)
        found[name] = {
            "default_ms": statistics.median(times[False][2:]),
            "invariant_ms": statistics.median(times[True][2:]),
            "ratio": statistics.median(a / b for a, b in pairs),
        }
        say(f"{name}: {found[name]}")
    return found


def main() -> None:
    """Report what varies with the batch, and the cost of batch-invariant mode."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    add_machine_options(parser)
    parser.add_argument("--model", default="bundled", help="a target directory")
    parser.add_argument("--shape", type=Shape.parse, default=WIDE, help=Shape.parse.__doc__)
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype = DTYPES[args.dtype or "bfloat16"]
    path = model_path(args.model)
    targets = {
        args.model: {
            mode: Target.load(path, device="cpu", dtype=dtype, batch_invariant=mode)
            for mode in (False, True)
        },
        "wide": {
            mode: random_target(args.shape, 4096, dtype, "cpu", batch_invariant=mode)
            for mode in (False, True)
        },
    }
    results: dict[str, Any] = {
        "tile": TILE,
        "varies": {str(kind).removeprefix("torch."): vary(kind) for kind in DTYPES.values()},
        "cost": {name: cost(pair, args.repeats) for name, pair in targets.items()},
        "shape": args.shape.numbers,
    }
    emit("invariance", environment(dtype), results)


if __name__ == "__main__":
    main()
