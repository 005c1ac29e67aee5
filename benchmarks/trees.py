"""Draft trees against the chain of the same drafter: accepted length, speed and a decision's time.

As many requests at a time as `--at-once` says, all ways in turn within each group. Under `fixed`
every node is verified; under the other schedules a tree's engine chooses between trees and chains,
as it does by default. Beside seconds on the clock there are those of the processor, which a busy
machine changes less.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import numpy as np
import torch

from benchmarks.common import add_decoding_options, emit, environment, load_pair, longest, say
from dspark.data.conversations import read_prompts
from dspark.engine.engine import Engine
from dspark.engine.model import Model
from dspark.engine.speculation.draft_scheduler import Scheduler
from dspark.engine.speculation.schedule import Schedule
from dspark.request import Output, Request, SamplingParams, merge_stats
from dspark.scheduling.budget import best_budget, fill_budget, prefix_lengths
from dspark.scheduling.lookahead import lookahead_lengths

REQUESTS, NODES = 64, 32
"""Of the decision that is timed."""


@dataclass
class Way:
    """One way of decoding, and what it gave."""

    engine: Engine
    outputs: list[Output] = field(default_factory=list)
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def decode(self, requests: Sequence[Request], *, counts: bool = True) -> None:
        """Decode some requests at once, timed where it counts."""
        clock, cpu = time.perf_counter(), time.process_time()
        outputs = self.engine.run(requests)
        if counts:
            self.seconds += time.perf_counter() - clock
            self.cpu_seconds += time.process_time() - cpu
            self.outputs += outputs

    def figures(self, chain: Way, plain: Way) -> dict[str, Any]:
        """What it gave, beside the chain and plain decoding."""
        stats = merge_stats(self.outputs)
        tokens = sum(len(output.token_ids) for output in self.outputs)
        cpu_per_s = tokens / self.cpu_seconds
        return {
            "accepted_length": stats.accepted_length,
            "over_chain": stats.accepted_length / merge_stats(chain.outputs).accepted_length,
            "tokens_per_s": tokens / self.seconds,
            "tokens_per_cpu_s": cpu_per_s,
            "speed_over_chain": cpu_per_s / chain.per_cpu_s,
            "speed_over_plain": cpu_per_s / plain.per_cpu_s,
            "rounds": stats.rounds,
            "identical_to_plain": sum(
                a.token_ids == b.token_ids for a, b in zip(self.outputs, plain.outputs, strict=True)
            ),
        }

    @property
    def per_cpu_s(self) -> float:
        """Tokens per second of the processor."""
        return sum(len(output.token_ids) for output in self.outputs) / self.cpu_seconds


def requests_of(
    model: Model, args: argparse.Namespace, name: str, params: SamplingParams, count: int
) -> list[Request]:
    """The first prompts of an evaluation file that fit; prompt i draws with `seed` + i."""
    found: list[Request] = []
    for prompt in read_prompts(args.data / "eval" / f"{name}.jsonl"):
        ids = model.encode(prompt.messages[:1])
        if len(ids) + params.max_new_tokens <= model.target.max_context:
            found.append(Request(ids, replace(params, seed=params.seed + len(found))))
        if len(found) == count:
            break
    return found


def ways_of(
    model: Model, args: argparse.Namespace, requests: Sequence[Request], at_once: int
) -> dict[str, Way]:
    """Plain decoding, the chain, and a tree of each size."""
    drafter, schedule = model.drafter, Schedule(args.schedule)
    assert drafter is not None
    options = {"max_requests": at_once, "max_length": longest(requests), "verifier": args.verifier}
    costs = model.profile(max_requests=at_once) if schedule.weighs_costs else None

    def way(nodes: int | None) -> Way:
        chains = Scheduler(schedule, args.verifier, drafter.block_size, model.calibration, costs)
        tree_costs = None
        if costs is not None and nodes is not None and nodes > drafter.block_size:
            tree_costs = model.profile_trees(at_once, nodes)
        own = {"schedule": chains, "tree_nodes": nodes, "tree_costs": tree_costs}
        return Way(Engine(model.target, drafter, **options, **own))

    plain = Way(Engine(model.target, **options))
    trees = {f"tree_{nodes}": way(nodes) for nodes in args.nodes}
    return {"plain": plain, "chain": way(None), **trees}


def measure(model: Model, args: argparse.Namespace) -> dict[str, Any]:
    """All files at all temperatures and loads."""
    results: dict[str, Any] = {}
    for name, temperature, at_once in product(args.files, args.temperatures, args.at_once):
        params = SamplingParams(args.max_new_tokens, temperature=temperature, seed=args.seed)
        requests = requests_of(model, args, name, params, max(args.prompts, at_once))
        ways = ways_of(model, args, requests, at_once)
        for way in ways.values():
            way.decode(requests[:1], counts=False)
        names = list(ways)
        for turn, first in enumerate(range(0, len(requests), at_once)):
            begin = turn % len(names)
            for each in names[begin:] + names[:begin]:
                ways[each].decode(requests[first : first + at_once])
        key = f"{name}, temperature {temperature:g}, {at_once} at once"
        results[key] = {
            each: way.figures(ways["chain"], ways["plain"]) for each, way in ways.items()
        }
        say(f"{key}: {results[key]}")
    return results


def decisions_ms() -> dict[str, float]:
    """Milliseconds of one decision about 64 trees of 32 nodes, by schedule, the median of many."""
    generator, most = np.random.default_rng(0), REQUESTS * NODES
    step_ms_N = 10.0 + 0.05 * np.arange(most + 1) + generator.random(most + 1)

    def survivals() -> Any:
        return -np.sort(-generator.random((REQUESTS, NODES)), axis=1)

    deciders: dict[str, Callable[[Any, Any], Any]] = {
        "prefix": lambda now, _: prefix_lengths(now, step_ms_N),
        "lagged": lambda now, earlier: fill_budget(now, best_budget(earlier, step_ms_N)),
        "lookahead": lambda now, earlier: lookahead_lengths(now, earlier, step_ms_N),
    }
    found = {}
    for name, decide in deciders.items():
        spent = list[float]()
        for _ in range(50):
            now, earlier = survivals(), survivals()
            started = time.process_time()
            decide(now, earlier)
            spent.append((time.process_time() - started) * 1e3)
        found[name] = statistics.median(spent)
    return found


def main() -> None:
    """Measure trees of several sizes against a chain."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    add_decoding_options(parser, prompts=12, tokens=80)
    parser.add_argument("--draft", help="a drafter (default: the one attached to the target)")
    parser.add_argument("--nodes", type=int, nargs="+", default=[8, 15, 16, 31, 32, 64])
    parser.add_argument("--files", nargs="+", default=["gsm8k", "mt-bench"])
    parser.add_argument("--at-once", type=int, nargs="+", default=[1], help="requests of a round")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = load_pair(args.model, args.dtype or "auto", args.draft)
    results = measure(model, args)
    results["decision_ms"] = decisions_ms()
    emit("trees", environment(model.target.dtype), results)


if __name__ == "__main__":
    main()
