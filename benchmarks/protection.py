"""What a bad drafter costs under the default schedule: throughput over that of plain decoding.

Drafters that nobody calibrated, without a cost table: one of random weights (DSpark's shape, made
for the target), the pair's own made always wrong while its confidences promise all (`wrong`), made
wrong after its first rounds (`early`), or made to take several steps of the target for a proposal
(`slow`). A closed loop at every load; the plain engine has no drafter at all. The engine of the
drafter is kept between runs, so that the first run shows what finding out costs, and the later
ones, run in turn with the plain engine's, what remains.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import dspark
from benchmarks.common import add_options, emit, environment, rounded, say
from dspark.attention.paged_cache import PagedCache
from dspark.drafters.base import DraftBatch, Draw, Proposal
from dspark.drafters.dspark import DSparkDrafter
from dspark.engine.model import Model
from dspark.evaluation.check.check import PROMPTS
from dspark.evaluation.check.live import render
from dspark.evaluation.load.closed_loop import LoadRun, closed_loop, closed_loops, out_of_step
from dspark.fitting.recipe import choose_taps
from dspark.request import Request, SamplingParams
from dspark.training.drafters.new_drafter import drafter_config
from dspark.training.settings import DSparkSettings

DRAFTERS = ("random", "wrong", "early", "slow")
FLOOR = 0.97
CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}
QUICK = {"load": (1, 2), "requests": 2, "max_new_tokens": 12, "repeats": 1}


class Adversary(DSparkDrafter):
    """A drafter that is of no use.

    Attributes:
        wrong_after: tokens of prompt and answer behind which its drafts are wrong.
        extra_s: seconds that a proposal takes beside its own time.
    """

    wrong_after: int = 0
    extra_s: float = 0.0

    def propose(self, context: PagedCache, batch: DraftBatch, draw: Draw) -> Proposal:
        """Propose, from logits turned by one token where it is to be wrong."""
        started = time.perf_counter()
        wrong_R1 = torch.tensor(batch.lengths)[:, None] >= self.wrong_after

        def turned(step: int, logits_RC: Tensor, tokens: Tensor | None = None) -> Tensor:
            logits_RC = torch.where(wrong_R1, logits_RC.roll(1, dims=1), logits_RC)
            return draw(step, logits_RC, tokens)

        proposal = super().propose(context, batch, turned)
        if proposal.confidence_logits_RK is not None:
            sure = torch.full_like(proposal.confidence_logits_RK, 5.0)
            proposal = replace(proposal, confidence_logits_RK=sure)
        while time.perf_counter() - started < self.extra_s:
            pass
        return proposal


def adversary(model: Model, kind: str, args: argparse.Namespace) -> Model:
    """The target with a drafter that is of no use; the pair's own weights where it has any."""
    target, own = model.target, model.drafter
    if kind == "random" or not isinstance(own, DSparkDrafter):
        generator = torch.Generator().manual_seed(args.seed)
        config = drafter_config(
            target, DSparkSettings(num_layers=2, target_layer_ids=choose_taps(target.num_layers))
        )
        drafter = Adversary.from_target(target.parts(), config, generator=generator)
    else:
        drafter = Adversary(own.config)
        drafter.load_state_dict(own.state_dict())
        drafter.to(device=target.device)
        drafter.bind(target.parts(), num_target_layers=target.num_layers)
    drafter.to(dtype=target.dtype).eval()
    drafter.wrong_after = {"early": args.early, "random": 1 << 30}.get(kind, 0)
    drafter.extra_s = args.slow_ms / 1e3 if kind == "slow" else 0.0
    return Model(target, drafter, name=kind)


def measure(model: Model, pool: Sequence[Request], load: int, args: Any) -> dict[str, Any]:
    """One drafter under one load: tokens per second over plain decoding's, run by run."""
    plain, ours = (
        each.open_engine(
            max_requests=load, max_length=args.max_length, schedule=schedule, prefix_reuse=False
        )
        for each, schedule in ((Model(model.target), None), (model, args.schedule))
    )
    assert ours._speculator is not None
    shield = ours._speculator.shield
    runs = list[tuple[LoadRun, LoadRun]]()
    closed_loop(plain, lambda i: pool[i % len(pool)], users=load, count=load)  # warms up
    for repeat in range(args.repeats + 1):
        first = repeat * args.requests
        pair = closed_loops(
            (plain, ours),
            out_of_step(lambda i, first=first: pool[(first + i) % len(pool)], load),
            users=load,
            count=max(args.requests, 2 * load),
            now=CLOCKS[args.clock],
        )
        runs.append((pair[0], pair[1]))
        if shield.fault is not None:  # a drafter that is switched off costs nothing
            raise shield.fault
    later = runs[1:]
    ratio = _speed([own for _, own in later]) / _speed([its for its, _ in later])
    return {
        "first": _speed([runs[0][1]]) / _speed([runs[0][0]]),
        "later": ratio,
        "later_all": [own.tokens_per_s / its.tokens_per_s for its, own in later],
        "lost_rounds": [_lost_rounds(its, own, load) for its, own in runs],
        "verified_per_round": [own.stats.verified / max(own.stats.rounds, 1) for _, own in runs],
        "reached": ratio >= FLOOR,
    }


def _speed(runs: Sequence[LoadRun]) -> float:
    """Tokens per second of runs together."""
    return sum(run.tokens for run in runs) / sum(run.seconds for run in runs)


def _lost_rounds(plain: LoadRun, ours: LoadRun, load: int) -> float:
    """Time that was lost, in rounds of plain decoding."""
    per_s = plain.tokens_per_s
    return (ours.seconds - ours.tokens / per_s) * per_s / load


def main() -> None:
    """Measure what bad drafters cost."""
    args = options()
    torch.set_num_threads(args.threads)
    model = dspark.load(args.model, dtype=args.dtype or "auto", offline=True)
    params = SamplingParams(args.max_new_tokens, temperature=args.temperature, ignore_eos=True)
    pool = [
        Request(ids, params.with_seed(args.seed + i))
        for i, ids in enumerate(render(model, PROMPTS))
    ]
    args.max_length = max(len(r.prompt_ids) for r in pool) + args.max_new_tokens
    results: dict[str, Any] = {"schedule": args.schedule}
    for kind in args.drafters:
        pair = adversary(model, kind, args)
        for load in args.load:
            row = results[f"{kind}, {load}"] = measure(pair, pool, load, args)
            say(f"{kind}, {load} requests: {rounded(row)}")
    rows = [row for row in results.values() if isinstance(row, dict)]
    results["worst"] = min(row["later"] for row in rows)
    results["reached"] = all(row["reached"] for row in rows)
    emit("protection", environment(model.target.dtype), results)


def options() -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    add_options(parser)
    parser.add_argument("--drafters", nargs="+", choices=DRAFTERS, default=DRAFTERS)
    parser.add_argument("--load", type=int, nargs="+", default=(1, 4, 16))
    parser.add_argument("--requests", type=int, default=16, help="counted, or twice the load")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--repeats", type=int, default=3, help="after the first run")
    parser.add_argument("--clock", choices=CLOCKS, default="cpu", help="of the process, or of all")
    parser.add_argument("--schedule", choices=("auto", "fixed"), default="auto")
    parser.add_argument("--early", type=int, default=100, help="tokens until `early` turns wrong")
    parser.add_argument("--slow-ms", type=float, default=200.0, help="of a proposal of `slow`")
    parser.add_argument("--quick", action="store_true", help=f"a small run: {QUICK}")
    args = parser.parse_args()
    if args.quick:
        vars(args).update(QUICK)
    return args


if __name__ == "__main__":
    main()
