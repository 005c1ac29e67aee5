"""The schedules under simulated load, and what a decision costs.

Per table (smooth, staircase, flat) and traffic (mixed, easy, hard), for loads from 1 to 256
requests: each schedule's throughput over the best budget in hindsight and over the better of
plain decoding and fixed blocks (`benchmarks.simulated_load`), the worst of all loads. Then the
time of a decision for 256 requests with 7 drafts each, on one core.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import against_floors, emit, environment, say
from benchmarks.recorded_traffic import bundled_streams
from benchmarks.simulated_load import POLICIES, Simulation, lagged
from benchmarks.simulated_tables import noisy, tables
from dspark.scheduling.budget import best_budget, drafting_gain, fill_budget, prefix_lengths
from dspark.scheduling.lookahead import lookahead_lengths
from dspark.simulation.traffic import (
    TRAFFIC,
    FloatArray,
    Record,
    expected_survival_of,
    record_of,
)

FLOORS = {"over_hindsight": 0.95, "over_better": 0.99}
CEILING_MS = 1.0
NOISE_LOADS = (1, 2, 4, 8, 16, 32, 128)
LOADS = [*range(1, 9), 10, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 224, 256]


def decision_ms(requests: int, drafts: int, repeats: int, seed: int) -> dict[str, dict[str, float]]:
    """Least and median milliseconds of every kind of decision, survivals and limits given."""
    generator = np.random.default_rng(seed)
    survival_RK, earlier_RK = (
        np.multiply.accumulate(generator.random((requests, drafts)) ** 0.3, axis=1)
        for _ in range(2)
    )
    limits_R = np.full(requests, drafts)
    step_ms_N = 20 + 0.01 * np.arange(requests * drafts + 1)
    kinds: dict[str, Callable[[], object]] = {
        "prefix": lambda: prefix_lengths(survival_RK, step_ms_N, limits_R),
        "lagged": lambda: fill_budget(
            survival_RK, best_budget(earlier_RK, step_ms_N, limits_R), limits_R
        ),
        "lookahead": lambda: lookahead_lengths(survival_RK, earlier_RK, step_ms_N, limits_R),
        "gain": lambda: drafting_gain(earlier_RK, step_ms_N, 20.0, limits_R),
    }
    found = {}
    for name, decide in kinds.items():
        times = []
        for _ in range(repeats):
            started = time.perf_counter()
            decide()
            times.append((time.perf_counter() - started) * 1e3)
        found[name] = {"least_ms": min(times), "median_ms": statistics.median(times)}
    return found


Replay = tuple[Callable[[int], Record], FloatArray]
"""(the record of so many requests, mean survivals of other rounds of such traffic)"""


def simulated(drafts: int, rounds: int, seed: int) -> dict[str, Replay]:
    """Made-up traffic of three kinds."""
    return {
        name: (
            lambda requests, traffic=traffic: record_of(traffic, requests, drafts, rounds, seed),
            expected_survival_of(traffic, drafts, seed + 1),
        )
        for name, traffic in TRAFFIC.items()
    }


def recorded(args: argparse.Namespace) -> dict[str, Replay]:
    """What the bundled drafter offered on held-out prompts."""
    return {
        name: (
            lambda requests, streams=streams, scaling=scaling: streams.record(
                scaling, requests, args.rounds, args.seed
            ),
            streams.record(scaling, 64, args.rounds, args.seed + 1).survival_TRK.mean(axis=(0, 1)),
        )
        for name, (streams, scaling) in bundled_streams(args).items()
    }


def load_results(
    loads: Sequence[int], replays: Mapping[str, Replay]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Per traffic and table, the worst load of every schedule."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name, (replay, expected_K) in replays.items():
        found[name] = {}
        records = {requests: replay(requests) for requests in loads}
        for kind, table in tables().items():
            rows: dict[str, list[tuple[float, float, int]]] = {policy: [] for policy in POLICIES}
            oracle = []
            for requests, record in records.items():
                simulation = Simulation(record, table, expected_K)
                hindsight = simulation.hindsight().throughput
                better = max(simulation.off().throughput, simulation.fixed().throughput)
                oracle.append(simulation.oracle().throughput / hindsight)
                for policy, decide in POLICIES.items():
                    got = simulation.scheduled(decide).throughput
                    rows[policy].append((got / hindsight, got / better, requests))
            found[name][kind] = {policy: worst(row) for policy, row in rows.items()}
            found[name][kind]["oracle_over_hindsight_mean"] = statistics.mean(oracle)
            say(f"{name} {kind}: " + "; ".join(f"{p} {worst(r)}" for p, r in rows.items()))
    return found


def failing_results(drafts: int, rounds: int, seed: int) -> dict[str, dict[str, float]]:
    """Throughput with factors of failing requests over throughput without, by load.

    Where nobody fails, factors should cost nothing; where a third of the requests does, they
    should pay.
    """
    table = tables()["smooth"]
    found: dict[str, dict[str, float]] = {}
    for name, traffic in (
        ("nobody fails", TRAFFIC["mixed"]),
        ("a third fails", replace(TRAFFIC["mixed"], failing=1 / 3)),
    ):
        expected_K = expected_survival_of(traffic, drafts, seed + 1)
        found[name] = {}
        for requests in (1, 16, 64, 256):
            record = record_of(traffic, requests, drafts, rounds, seed)
            simulation = Simulation(record, table, expected_K)
            heeding, blind = (
                simulation.scheduled(lagged, heeds_failures=heeds).throughput
                for heeds in (True, False)
            )
            found[name][str(requests)] = heeding / blind
    say(f"factors of failing requests: {found}")
    return found


def noise_results(drafts: int, rounds: int, seed: int) -> dict[str, dict[str, Any]]:
    """`lagged` by tables whose measurement scatters by 2 %, by margin: the worst of some loads.

    A margin costs a little against hindsight, and keeps noise from losing to fixed blocks.
    """
    traffic = TRAFFIC["mixed"]
    expected_K = expected_survival_of(traffic, drafts, seed + 1)
    records = {r: record_of(traffic, r, drafts, rounds, seed) for r in NOISE_LOADS}
    found: dict[str, dict[str, Any]] = {}
    for kind, table in tables().items():
        found[kind] = {}
        for margin in (0.005, 0.02):
            rows = []
            for requests, record in records.items():
                true = Simulation(record, table, expected_K)
                hindsight = true.hindsight().throughput
                better = max(true.off().throughput, true.fixed().throughput)
                for number in range(3):
                    believed = noisy(table, 0.02, seed + number)
                    world = Simulation(record, table, expected_K, margin, believed)
                    got = world.scheduled(lagged).throughput
                    rows.append((got / hindsight, got / better, requests))
            found[kind][str(margin)] = worst(rows)
        say(f"noise of 2 %, {kind}: {found[kind]}")
    return found


def worst(rows: Sequence[tuple[float, float, int]]) -> dict[str, Any]:
    """The least of both ratios over loads, and the loads they belong to."""
    hindsight, better = min(rows), min(rows, key=lambda row: row[1])
    return {
        "over_hindsight": round(hindsight[0], 4),
        "at_requests": hindsight[2],
        "over_better": round(better[1], 4),
        "better_at_requests": better[2],
        "mean_over_hindsight": round(statistics.mean(row[0] for row in rows), 4),
    }


def main() -> None:
    """Simulate loads and time decisions."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--drafts", type=int, default=7, help="K")
    parser.add_argument("--rounds", type=int, default=200, help="per load")
    parser.add_argument(
        "--every", type=int, default=0, help="loads in even steps; 0: more of the low"
    )
    parser.add_argument("--repeats", type=int, default=500, help="of each timed decision")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--recorded", action="store_true", help="replay the bundled drafter's rounds, too"
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="its prompts")
    parser.add_argument("--prompts", type=int, default=300, help="of these, per domain")
    args = parser.parse_args()
    loads = sorted({1, *range(args.every, 257, args.every), 256}) if args.every else LOADS
    decisions = decision_ms(256, args.drafts, args.repeats, args.seed)
    say(f"a decision for 256 requests: {decisions}")
    replays = simulated(args.drafts, args.rounds, args.seed)
    results = load_results(loads, replays | (recorded(args) if args.recorded else {}))
    least = {
        f"lagged_{key}": min(
            row["lagged"][key] for kinds in results.values() for row in kinds.values()
        )
        for key in FLOORS
    }
    figures = {
        **(vars(args) | {"data": str(args.data)}),
        "loads": loads,
        "decision": decisions,
        "load": results,
        "factors": failing_results(args.drafts, args.rounds, args.seed),
        "noise": noise_results(args.drafts, args.rounds, args.seed),
        "floors": against_floors(least, {f"lagged_{key}": floor for key, floor in FLOORS.items()}),
        "ceilings": {
            name: {
                "value": row["least_ms"],
                "ceiling": CEILING_MS,
                "reached": row["least_ms"] < CEILING_MS,
            }
            for name, row in decisions.items()
        },
    }
    emit("scheduling", environment(torch.float64), figures)


if __name__ == "__main__":
    main()
