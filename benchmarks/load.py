"""The bundled pair under load at the cost of a real model: every schedule, 1 to 32 users.

Target, drafter and MTP-1 drafter are inflated without changing their function, so that real
acceptance meets real costs: by default to Qwen3-0.6B's width with 16 of its 28 layers (an
inflation cannot drop layers, and the bundled target has 16). A plain step of that is arithmetic,
and a sweep of five repeats ends within half an hour on two cores. The vocabulary stays at 4,096.

A closed loop (`dspark.evaluation.load.closed_loop`) with the cost table measured first, on the same
machine; the drafter's calibration carries over. Then what is promised is held against the figures:
`lagged` against the better of plain decoding, fixed blocks and MTP-1, and against plain decoding.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.common import (
    DTYPES,
    add_options,
    emit,
    environment,
    model_path,
    rounded,
    say,
)
from benchmarks.inflate import inflate_drafter, inflate_eagle3, inflate_target
from benchmarks.placement import Shape
from benchmarks.prompts import DOMAINS, domain_requests
from dspark.drafters.checkpoints.checkpoint import load_drafter
from dspark.engine.model import Model
from dspark.engine.profile import hardware_name
from dspark.evaluation.load.closed_loop import LoadRun
from dspark.evaluation.load.report import (
    can_draw,
    load_report,
    load_rows,
    median,
    median_interval,
    save_figure,
)
from dspark.evaluation.load.sweep import Contender, Runs, Workload, contenders, cover_costs, sweep
from dspark.request import VERIFIERS, Request, SamplingParams
from dspark.scheduling.calibration_file import FILE_NAME, Calibration
from dspark.sources.names import BUNDLED_DRAFTERS
from dspark.targets.target import Target

SHAPE = Shape(16, 1024, 16, 8, 128, 3072)
WAYS = ("off", "fixed", "mtp1", "prefix", "lagged")
RIVALS = ("off", "fixed", "mtp1")
OVER_BEST, OVER_BEST_LOW = 0.98, 0.95
OVER_PLAIN, PLAIN_USERS = 1.3, 4
QUICK = {
    "concurrency": (1, 2),
    "prompts": 3,
    "requests": 2,
    "max_new_tokens": 6,
    "repeats": 2,
}


@dataclass(frozen=True)
class Pair:
    """The inflated target with its own drafter, and with the MTP-1 drafter."""

    model: Model
    mtp: Model


def over_best(runs: Runs, name: str, others: Sequence[str]) -> dict[int, dict[str, Any]]:
    """Per concurrency a contender's throughput over the best of others, repeat by repeat.

    The best is the one of the highest median; each repeat gives a ratio of two runs that took
    turns. The median of these ratios counts, `ci95` is its bootstrap interval.
    """
    found: dict[int, dict[str, Any]] = {}
    for users in dict.fromkeys(users for users, _ in runs):
        speeds = {
            way: [run.tokens_per_s for run in runs[users, way]]
            for way in (name, *others)
            if (users, way) in runs
        }
        rivals = [way for way in speeds if way != name]
        if name not in speeds or not rivals:
            continue
        best = max(rivals, key=lambda way: median(speeds[way]))
        ratios = [a / b for a, b in zip(speeds[name], speeds[best], strict=True)]
        found[users] = {"best": best, "ratio": median(ratios), "ci95": median_interval(ratios)}
    return found


def inflated(args: argparse.Namespace) -> Pair:
    """Both pairs, around one target, in memory."""
    source = model_path(args.model)
    dtype, device = DTYPES[args.dtype or "bfloat16"], torch.device(args.device)
    small = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    large = inflate_target(small, args.shape, dtype=dtype, seed=args.seed).to(device)
    tokenizer = Target.load(source, dtype="float32", offline=True).tokenizer
    target = Target.from_model(large, name=f"{args.model} inflated", tokenizer=tokenizer)
    drafter = inflate_drafter(
        load_drafter(source, offline=True), args.shape, dtype=dtype, seed=args.seed
    )
    mtp = inflate_eagle3(load_drafter(args.mtp, offline=True), args.shape, dtype=dtype)
    for own in (drafter, mtp):
        own.to(device).bind(target.parts(), num_target_layers=target.num_layers)
    path = source / "dspark" / FILE_NAME
    calibration = Calibration.load(path) if path.is_file() else None
    return Pair(Model(target, drafter, name="own", calibration=calibration), Model(target, mtp))


def workload_of(model: Model, args: argparse.Namespace) -> Workload:
    """Held-out prompts of the three domains, in turn."""
    params = SamplingParams(args.max_new_tokens, temperature=args.temperature, seed=args.seed)
    columns = [
        domain_requests(model, args.data, domain, args.prompts, params) for domain in DOMAINS
    ]
    pool = [request for row in zip(*columns, strict=True) for request in row]
    return Workload(
        tuple(Request(r.prompt_ids, params.with_seed(args.seed + i)) for i, r in enumerate(pool)),
        args.requests,
    )


def announce(model: Model, workload: Workload, args: argparse.Namespace) -> dict[str, Any]:
    """Say what steps cost, and how long the sweep may take; the costs, and doubts about them."""
    costs = model.costs
    assert costs is not None
    steps_ms = {users: costs.off_ms(users) for users in args.concurrency}
    seconds = sum(
        ms * args.max_new_tokens * (workload.answers(users) + users) / users / 1e3
        for users, ms in steps_ms.items()
    )
    said = ", ".join(f"{users}: {ms:.0f} ms" for users, ms in steps_ms.items())
    minutes = len(WAYS) * args.repeats * seconds / 60
    say(f"plain steps of users: {said}; all takes about {minutes:.0f} minutes beside prompts")
    return {"plain_step_ms": steps_ms, "warnings": costs.warnings()}


def measure(ways: list[Contender], workload: Workload, args: argparse.Namespace) -> Runs:
    """The sweep, with progress."""

    def tell(repeat: int, users: int, name: str, run: LoadRun) -> None:
        say(
            f"repeat {repeat + 1} of {args.repeats}, {users} users, {name}: "
            f"{run.tokens_per_s:.1f} tokens/s in {run.seconds:.1f} s, "
            f"accepted length {run.stats.accepted_length:.2f}"
        )

    return sweep(
        ways,
        workload,
        args.concurrency,
        repeats=args.repeats,
        verifier=args.verifier,
        progress=tell,
    )


def criteria(runs: Runs) -> dict[str, Any]:
    """What is promised of `lagged`, and whether it holds."""
    best = over_best(runs, "lagged", RIVALS)
    for row in best.values():
        low = row["ci95"][0] if row["ci95"] else row["ratio"]
        row["reached"] = row["ratio"] >= OVER_BEST and low >= OVER_BEST_LOW
    plain = {
        users: row | {"reached": row["ratio"] >= OVER_PLAIN}
        for users, row in over_best(runs, "lagged", ("off",)).items()
        if users <= PLAIN_USERS
    }
    return {
        "lagged_over_best": best,
        "lagged_over_plain": plain,
        "reached": all(row["reached"] for row in (*best.values(), *plain.values())),
    }


def main() -> None:
    """Measure every schedule under load on the inflated pair."""
    args = options()
    torch.set_num_threads(args.threads)
    started = time.perf_counter()
    pair = inflated(args)
    workload = workload_of(pair.model, args)
    say("measuring what steps cost")
    cover_costs(pair.model, max(args.concurrency), save=False)
    costs = announce(pair.model, workload, args)
    runs = measure(contenders(pair.model, WAYS, pair.mtp), workload, args)
    rows = load_rows(runs, compare=args.temperature == 0)
    device = hardware_name(torch.device(args.device))
    names = ("concurrency", "prompts", "requests", "max_new_tokens", "temperature", "repeats")
    results: dict[str, Any] = {
        "device": device,
        "shape": args.shape.numbers,
        "vocabulary": pair.model.target.vocab_size,
        "settings": {name: getattr(args, name) for name in (*names, "verifier", "seed")},
        "costs": costs,
        "minutes": (time.perf_counter() - started) / 60,
        "criteria": criteria(runs),
        **load_report(rows, args.floors),
    }
    say(f"criteria: {rounded(results['criteria'])}")
    if args.out is not None and can_draw():
        args.out.mkdir(parents=True, exist_ok=True)
        title = f"the bundled pair at the shape {args.shape.numbers} on {device}"
        save_figure(rows, title, args.out)
    emit("load", environment(pair.model.target.dtype), results)


def options() -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    add_options(parser)
    parser.add_argument("--mtp", type=Path, default=BUNDLED_DRAFTERS["bundled-mtp"])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="its folder")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--shape", type=Shape.parse, default=SHAPE, help=Shape.parse.__doc__)
    parser.add_argument("--concurrency", type=int, nargs="+", default=(1, 2, 4, 8, 16, 32))
    parser.add_argument("--prompts", type=int, default=44, help="per domain")
    parser.add_argument("--requests", type=int, default=8, help="counted, or twice the users")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--verifier", choices=VERIFIERS, default="block")
    parser.add_argument("--floors", type=float, nargs="+", default=(), help="per-user tokens/s")
    parser.add_argument("--out", type=Path, help="folder for the figure")
    parser.add_argument("--quick", action="store_true", help=f"a small run: {QUICK}")
    args = parser.parse_args()
    if args.quick:
        vars(args).update(QUICK)
    return args


if __name__ == "__main__":
    main()
