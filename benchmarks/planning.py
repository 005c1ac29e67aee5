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
    model: Model, requests: list[Request], costs: CostTable, users: list[int], repeats: int
) -> dict[str, Any]:
    """Measured and simulated figures of every way and number of users."""
    profile, numbers, lengths = recorded(model, requests)
    kept = [requests[i] for i in numbers]
    prompts = np.array([len(request.prompt_ids) for request in kept])
    workload = Workload(tuple(kept), count=len(kept))
    measured = sweep(contenders(model, NAMES), workload, users, repeats=repeats)
    ways = {
        "off": Way("off", costs),
        "fixed": Way("fixed", costs, profile),
        "lagged": Way("lagged", costs, profile, Schedule("lagged")),
    }
    arrivals = Arrivals(np.zeros(len(kept)), prompts, lengths[numbers], np.arange(len(kept)))
    found = {}
    for count in users:
        for name, way in ways.items():
            run = closed_loop(way, arrivals, Fleet(Limits(count)), count)
            runs = measured[count, name]
            theirs = float(np.median([r.tokens_per_s for r in runs]))
            counts = run.servers[0].counts
            stats = runs[0].stats
            clock = runs[0].clock.per_step()
            steps = max(counts.steps, 1)
            found[f"{name}, {count}"] = {
                "simulated": run.tokens / run.seconds,
                "measured": theirs,
                "ratio": run.tokens / run.seconds / theirs,
                "accepted_length": [counts.gained / counts.rounds, stats.accepted_length],
                "verified": [counts.verified / counts.rounds, stats.verified / stats.rounds],
                "step_ms": [1e3 * counts.busy_s / steps, clock.draft_ms + clock.verify_ms],
                "ttft_ms": [
                    float(np.median([1e3 * (j.first_s - j.sent_s) for j in run.jobs])),
                    float(np.median([a.ttft_ms for a in runs[0].answers])),
                ],
            }
            say(f"{name}, {count} users: {found[f'{name}, {count}']}")
    return found


def ten_thousand(costs: CostTable, num_drafts: int) -> dict[str, float]:
    """CPU seconds of 10,000 requests of 200 and 128 tokens, near what the table can serve."""
    profile = synthetic(np.geomspace(0.8, 0.2, num_drafts).tolist())
    ways = {
        "off": Way("off", costs),
        "fixed": Way("fixed", costs, profile),
        "lagged": Way("lagged", costs, profile, Schedule("lagged")),
    }
    requests = drawn_arrivals(10_000, Lengths(200, 0.5), Lengths(128, 0.5))
    most = max(point.requests for point in costs.points)
    found = {}
    for name, way in ways.items():
        started = time.process_time()
        open_loop(way, requests.at_rate(1e4), Fleet(Limits(most)))
        found[name] = time.process_time() - started
    return found


def main() -> None:
    """Measure, simulate and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=8, help="of each domain")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--users", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--repeats", type=int, default=2)
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
    costs = model.profile(max_requests=max(args.users), repeats=5)
    costs = measure_steps(model.target, model.drafter, costs)
    found = compared(model, requests, costs, args.users, args.repeats)
    from benchmarks.simulated_tables import tables

    seconds = ten_thousand(tables()["smooth"], 7)
    worst = max(abs(np.log(row["ratio"])) for row in found.values())
    results = {"runs": found, "worst_error": float(np.expm1(worst)), "cpu_s_of_10000": seconds}
    emit("planning", environment(model.target.dtype), rounded(results))


if __name__ == "__main__":
    main()
