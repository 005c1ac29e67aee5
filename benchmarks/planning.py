"""`dspark plan` held against the engine: the same requests, simulated and measured.

The acceptance profile is measured first: one run that verifies whole blocks records what each
prompt's rounds keep. Then cost tables, whole steps included, and closed loops of some users take
turns, plainly and under each schedule, all users beginning at once; the simulation gets the same
prompts' and answers' lengths, without the pages that all prompts begin with, and no prompt comes
twice, so that a prefix cache spares nothing else. With one thread times are those of the
processor, which a busy machine changes less. Beside that, how long 10,000 requests take to
simulate.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import (
    add_options,
    emit,
    environment,
    load_pair,
    rounded,
    say,
    settings_of,
)
from benchmarks.prompts import DOMAINS, domain_requests
from benchmarks.simulated_tables import tables
from dspark.attention.paged_cache import PAGE_SIZE
from dspark.engine.model import Model
from dspark.engine.profile_steps import measure_steps
from dspark.engine.speculation.round_record import RoundRecord
from dspark.engine.speculation.schedule import Schedule
from dspark.evaluation.evaluate import RoundLog
from dspark.evaluation.load.closed_loop import WARM_UP_TOKENS, LoadRun, closed_loop, warm_up
from dspark.evaluation.load.sweep import Contender, Workload, contenders
from dspark.evaluation.records import Turn
from dspark.request import Request, SamplingParams
from dspark.scheduling.cost_table import CostTable
from dspark.simulation.acceptance import Acceptance, synthetic
from dspark.simulation.acceptance_source import of_turns, rounds_of
from dspark.simulation.arrivals import Arrivals, Lengths, drawn_arrivals
from dspark.simulation.fleet import Fleet, open_loop
from dspark.simulation.fleet import closed_loop as simulated_loop
from dspark.simulation.planning import capacity
from dspark.simulation.server import Limits, Way

NAMES = ("off", "fixed", "lagged")
SHARES = (0.05, 0.2, 0.5, 0.9)
GOAL, GOAL_S = 0.1, 10.0


def recorded(model: Model, requests: list[Request], tree_nodes: int | None = None) -> list[Turn]:
    """The answers to these requests, with rounds of whole blocks or trees."""
    logs: dict[int, RoundLog] = defaultdict(RoundLog)
    assert model.drafter is not None
    num_drafts = model.drafter.block_size

    def watch(record: RoundRecord) -> None:
        for row, number in enumerate(record.request_ids):
            logs[number].add(record, row, num_drafts)

    engine = model.engine(
        requests, batch_size=8, schedule="fixed", tree_nodes=tree_nodes, watch=watch
    )
    outputs = engine.run(requests)
    room = max(request.params.max_new_tokens for request in requests)
    return [logs[i].turn(output, room, plain=False) for i, output in enumerate(outputs)]


def profile_of(model: Model, turns: list[Turn]) -> Acceptance:
    """The acceptance profile of answers, one stream each."""
    assert model.drafter is not None
    num_drafts = model.drafter.block_size
    entry = next(
        e
        for e in (model.calibration.entries if model.calibration else ())
        if (e.block_size, e.verifier, e.temperature_class) == (num_drafts, "block", "greedy")
    )
    return of_turns(turns, num_drafts, entry.scaling, "recorded")


def shared_rows(requests: list[Request]) -> int:
    """Rows of every prompt that the prefix cache spares: whole pages of what all begin with."""
    prompts = [request.prompt_ids for request in requests]
    first, last = min(prompts), max(prompts)
    equal = 0
    while equal < len(first) - 1 and first[equal] == last[equal]:
        equal += 1
    return equal // PAGE_SIZE * PAGE_SIZE


def measured(
    model: Model,
    workload: Workload,
    users: int,
    turn: int,
    now: Callable[[], float],
    tree_nodes: int | None = None,
) -> dict[str, LoadRun]:
    """A closed loop of each way, users in step as the simulated ones are, on this clock.

    One after the other, as a server steps one engine: in turn each finds the others' data in the
    processor's caches.
    """
    runs: dict[str, LoadRun] = {}
    ways: dict[str, Contender] = {way.name: way for way in contenders(model, NAMES)}
    if tree_nodes is not None:
        ways["trees"] = contenders(model, ("lagged",), tree_nodes=tree_nodes)[0]
    names = [*ways]
    for name in names[turn % len(names) :] + names[: turn % len(names)]:
        engine = ways[name].engine(workload.pool, users, "block")
        warm_up(engine, [workload.request(-1 - i) for i in range(users)], WARM_UP_TOKENS)
        count = workload.answers(users)
        runs[name] = closed_loop(engine, workload.request, users=users, count=count, now=now)
    return runs


def compared(
    model: Model, requests: list[Request], users: list[int], args: argparse.Namespace
) -> dict[str, Any]:
    """Simulated over measured throughput of every way and number of users.

    Tables and loops take turns, since a machine's speed changes within minutes; medians count.
    """
    assert model.drafter is not None
    now = time.process_time if args.threads == 1 else time.perf_counter
    nodes = args.tree_nodes
    chains, trees = recorded(model, requests), recorded(model, requests, nodes) if nodes else None
    numbers = [
        i
        for i, turn in enumerate(chains)
        if rounds_of(turn) and (trees is None or (trees[i].trees and rounds_of(trees[i])))
    ]
    profile = profile_of(model, [chains[i] for i in numbers])
    tree_profile = profile_of(model, [trees[i] for i in numbers]) if trees is not None else None
    kept = [requests[i] for i in numbers]
    lengths = np.array([chains[i].tokens for i in numbers])
    prompts = np.array([len(request.prompt_ids) for request in kept]) - shared_rows(kept)
    arrivals = Arrivals(np.zeros(len(kept)), prompts, lengths, np.arange(len(kept)))
    workload = Workload(tuple(kept), count=args.answers)
    rows: dict[str, list[tuple[float, float]]] = {}
    for turn in range(args.repeats):
        costs = model.profile(max_requests=max(users), repeats=3)
        pairs = [*zip(prompts.tolist(), arrivals.answer_N.tolist(), strict=True)]
        how = {"rounds": args.rounds, "lengths": pairs, "now": now}
        costs = measure_steps(model.target, model.drafter, costs, **how)
        say(f"turn {turn}: {costs.extras}, {costs.prompts}")
        ways = {
            "off": Way("off", costs),
            "fixed": Way("fixed", costs, profile),
            "lagged": Way("lagged", costs, profile, Schedule("lagged")),
        }
        if nodes:
            tree_costs = model.profile_trees(max(users), nodes)
            tree_costs = measure_steps(
                model.target, model.drafter, tree_costs, tree_nodes=nodes, **how
            )
            say(f"turn {turn}, trees: {tree_costs.extras}")
            schedule = Schedule("lagged")
            ways["trees"] = Way("trees", costs, tree_profile, schedule, tree_costs=tree_costs)
        for count in users:
            theirs = measured(model, workload, count, turn, now, nodes)
            for name, way in ways.items():
                run = simulated_loop(
                    way,
                    arrivals,
                    Fleet(Limits(count)),
                    count,
                    count=workload.answers(count),
                    warm_up_tokens=WARM_UP_TOKENS,
                )
                pair = (run.tokens / run.seconds, theirs[name].tokens_per_s)
                rows.setdefault(f"{name}, {count}", []).append(pair)
                _say_pair(name, count, run.servers[0].counts, theirs[name], pair)
    return {name: _ratio(pairs) for name, pairs in rows.items()}


def _say_pair(name: str, users: int, ours: Any, theirs: LoadRun, pair: tuple[float, float]) -> None:
    steps = theirs.clock.steps + theirs.clock.prefills
    say(
        f"{name}, {users} users: {pair[0]:.0f} simulated, {pair[1]:.0f} measured "
        f"({pair[0] / pair[1]:.2f}); {ours.steps} and {steps} steps, {ours.tokens} and "
        f"{theirs.tokens} tokens, {ours.verified / max(ours.rounds, 1):.2f} and "
        f"{theirs.stats.verified / max(theirs.stats.rounds, 1):.2f} drafts a round"
    )


def _ratio(pairs: list[tuple[float, float]]) -> dict[str, Any]:
    simulated, theirs = np.median(np.array(pairs), axis=0)
    ratios = [ours / measured for ours, measured in pairs]
    return {
        "simulated": float(simulated),
        "measured": float(theirs),
        "ratio": float(np.median(ratios)),
        "ratios": ratios,
    }


def ten_thousand(costs: CostTable, num_drafts: int) -> dict[str, float]:
    """CPU seconds of 10,000 requests of 200 and 128 tokens, at shares of what 64 places serve."""
    profile = synthetic(np.geomspace(0.8, 0.2, num_drafts).tolist())
    names = ("fixed", "auto", "prefix", "lagged", "lookahead")
    ways = {name: Way(name, costs, profile, Schedule(name)) for name in names}
    requests = drawn_arrivals(10_000, Lengths(200, 0.5), Lengths(128, 0.5))
    fleet = Fleet(Limits(64))
    found = {}
    for name, way in {"off": Way("off", costs), **ways}.items():
        most = capacity(way, requests, fleet)
        for share in SHARES:
            started = time.process_time()
            open_loop(way, requests.at_rate(share * most), fleet)
            found[f"{name}, {share}"] = time.process_time() - started
            say(f"10,000 requests, {name}, {share} of capacity: {found[f'{name}, {share}']:.2f} s")
    return found


def main() -> None:
    """Measure, simulate and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="its folder")
    parser.add_argument("--prompts", type=int, help="of each domain; by default enough for all")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--users", type=int, nargs="*", default=[1, 8, 16], help="none: no loops")
    parser.add_argument("--answers", type=int, default=20, help="counted in a loop, at least")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=30, help="of each kind in a table")
    parser.add_argument("--tree-nodes", type=int, help="compare draft trees of so many nodes too")
    parser.add_argument("--no-time", action="store_true", help="leave the 10,000 requests out")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype, results = args.dtype or "float32", dict[str, Any]()
    if args.users:
        model = load_pair(args.model, dtype)
        params = SamplingParams(args.max_new_tokens, seed=args.seed)
        most = max(args.users)  # users who wait for the last counted answer go on asking
        sent = 2 * max(args.answers, 2 * most) + most
        count = args.prompts or -(-sent // len(DOMAINS))
        requests = [
            request
            for each in zip(
                *(domain_requests(model, args.data, d, count, params) for d in DOMAINS),
                strict=True,
            )
            for request in each
        ]
        results["runs"] = compared(model, requests, args.users, args)
        worst = max(abs(np.log(row["ratio"])) for row in results["runs"].values())
        results["worst_error"] = float(np.expm1(worst))
        results["close"] = results["worst_error"] <= GOAL
    if not args.no_time:
        results["cpu_s_of_10000"] = ten_thousand(tables()["smooth"], 7)
        results["fast"] = max(results["cpu_s_of_10000"].values()) < GOAL_S
    found = {"settings": settings_of(args), **rounded(results)}
    emit("planning", environment(getattr(torch, dtype)), found)


if __name__ == "__main__":
    main()
