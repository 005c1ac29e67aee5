"""`dspark plan` held against `dspark bench`: the same requests, simulated and measured.

The cost table, whole steps included, and the acceptance profile are measured first: one run that
verifies whole blocks records what each prompt's rounds keep. Then closed loops of some users run on
the engine, plainly and under each schedule, and in the simulation with the same prompts' and
answers' lengths. Beside that, how long 10,000 requests take to simulate.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import emit, environment, load_pair, rounded, say
from benchmarks.prompts import DOMAINS, domain_requests
from benchmarks.recorded_traffic import Streams
from benchmarks.simulated_tables import tables
from dspark.engine.model import Model
from dspark.engine.profile_steps import measure_steps
from dspark.engine.speculation.schedule import Schedule
from dspark.evaluation.load.sweep import Workload, contenders, sweep
from dspark.request import Request, SamplingParams
from dspark.scheduling.calibration import TemperatureScaling
from dspark.scheduling.cost_table import CostTable
from dspark.simulation.acceptance import Acceptance, Stream, synthetic
from dspark.simulation.arrivals import Arrivals, Lengths, drawn_arrivals
from dspark.simulation.fleet import Fleet, closed_loop, open_loop
from dspark.simulation.planning import capacity
from dspark.simulation.server import Limits, Way

NAMES = ("off", "fixed", "lagged")


def recorded(model: Model, requests: list[Request]) -> tuple[Acceptance, np.ndarray, np.ndarray]:
    """The profile of these requests, which of them it has, and the lengths of their answers."""
    assert model.drafter is not None
    num_drafts = model.drafter.block_size
    streams = Streams(num_drafts)
    engine = model.engine(requests, batch_size=8, schedule="fixed", watch=streams)
    outputs = engine.run(requests)
    entry = next(
        e
        for e in (model.calibration.entries if model.calibration else ())
        if (e.block_size, e.verifier, e.temperature_class) == (num_drafts, "block", "greedy")
    )
    numbers = sorted(streams.accepted)
    kept = np.array([n for i in numbers for n in streams.accepted[i]])
    survival = np.array([(kept >= k).mean() for k in range(1, num_drafts + 1)])
    found = [_stream(streams, i, entry.scaling) for i in numbers]
    lengths = np.array([len(output.token_ids) for output in outputs])
    return Acceptance.of(found, survival, "recorded"), np.array(numbers), lengths


def _stream(streams: Streams, number: int, scaling: TemperatureScaling) -> Stream:
    confidence = np.clip(scaling.apply(np.array(streams.logits[number])), 1e-12, 1 - 1e-12)
    kept = np.array(streams.accepted[number])
    logits = np.log(confidence) - np.log1p(-confidence)
    return Stream(kept, np.full(len(kept), streams.num_drafts), logits)


def compared(
    model: Model, requests: list[Request], users: list[int], repeats: int
) -> dict[str, Any]:
    """Simulated over measured throughput of every way and number of users.

    Tables and loops take turns, since a machine's speed changes within minutes; medians count.
    """
    assert model.drafter is not None
    profile, numbers, lengths = recorded(model, requests)
    kept = [requests[i] for i in numbers]
    prompts = np.array([len(request.prompt_ids) for request in kept])
    arrivals = Arrivals(np.zeros(len(kept)), prompts, lengths[numbers], np.arange(len(kept)))
    workload = Workload(tuple(kept), count=len(kept))
    rows: dict[str, list[tuple[float, float]]] = {}
    for _ in range(repeats):
        costs = model.profile(max_requests=max(users), repeats=3)
        measured = sweep(contenders(model, NAMES), workload, users, repeats=1)
        costs = measure_steps(model.target, model.drafter, costs)
        ways = (
            Way("off", costs),
            Way("fixed", costs, profile),
            Way("lagged", costs, profile, Schedule("lagged")),
        )
        for count in users:
            for way in ways:
                run = closed_loop(way, arrivals, Fleet(Limits(count)), count)
                pair = (run.tokens / run.seconds, measured[count, way.name][0].tokens_per_s)
                rows.setdefault(f"{way.name}, {count}", []).append(pair)
                say(f"{way.name}, {count} users: {pair[0]:.0f} simulated, {pair[1]:.0f} measured")
    found = {}
    for name, pairs in rows.items():
        simulated, theirs = np.median(np.array(pairs), axis=0)
        ratios = [ours / measured for ours, measured in pairs]
        found[name] = {
            "simulated": float(simulated),
            "measured": float(theirs),
            "ratio": float(simulated / theirs),
            "ratios": ratios,
        }
    return found


def ten_thousand(costs: CostTable, num_drafts: int) -> dict[str, float]:
    """CPU seconds of 10,000 requests of 200 and 128 tokens, at shares of what 64 places serve."""
    profile = synthetic(np.geomspace(0.8, 0.2, num_drafts).tolist())
    ways = {
        "off": Way("off", costs),
        "fixed": Way("fixed", costs, profile),
        "lagged": Way("lagged", costs, profile, Schedule("lagged")),
    }
    requests = drawn_arrivals(10_000, Lengths(200, 0.5), Lengths(128, 0.5))
    fleet = Fleet(Limits(64))
    found = {}
    for name, way in ways.items():
        most = capacity(way, requests, fleet)
        for share in (0.1, 0.5, 0.9):
            started = time.process_time()
            open_loop(way, requests.at_rate(share * most), fleet)
            found[f"{name}, {share}"] = time.process_time() - started
    return found


def main() -> None:
    """Measure, simulate and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=8, help="of each domain")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--users", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = load_pair("bundled", "float32")
    assert model.drafter is not None
    params = SamplingParams(args.max_new_tokens)
    requests = [
        request
        for domain in DOMAINS
        for request in domain_requests(model, args.data, domain, args.prompts, params)
    ]
    found = compared(model, requests, args.users, args.repeats)
    seconds = ten_thousand(tables()["smooth"], 7)
    worst = max(abs(np.log(row["ratio"])) for row in found.values())
    results = {"runs": found, "worst_error": float(np.expm1(worst)), "cpu_s_of_10000": seconds}
    emit("planning", environment(model.target.dtype), rounded(results))


if __name__ == "__main__":
    main()
