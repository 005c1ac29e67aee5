"""The bundled pair at the cost of a real model: inflated, function-preserving, and timed.

First in fp32, on a few prompts: tokens, rounds and accepted drafts of the inflated pair are those
of the small one. Then in bf16: speed against plain decoding, one request at a time, the two in
turn within each request, end to end; the small pair's accepted length in fp32 beside it, as bf16
rounding alone may change an argmax.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.common import (
    DTYPES,
    Tally,
    add_decoding_options,
    against_floors,
    decoder_of,
    emit,
    environment,
    identical,
    load_pair,
    longest,
    macro,
    model_path,
    rounded,
    say,
    settings_of,
    side_by_side,
    single_engine,
)
from benchmarks.inflate import inflate_drafter, inflate_target, largest_deviation
from benchmarks.placement import QWEN3_06B, Shape
from benchmarks.prompts import DOMAINS, domain_requests
from dspark.attention.paged_cache import PAGE_SIZE, BlockTable
from dspark.attention.ragged_batch import RaggedBatch
from dspark.drafters.checkpoints.checkpoint import load_drafter
from dspark.engine.model import Model
from dspark.request import Request, SamplingParams
from dspark.targets.target import Target

TEMPERATURES = {"t0": 0.0, "t1": 1.0}
Requests = dict[tuple[str, str], list[Request]]
FLOORS = {"speedup_t0": 2.8, "speedup_t1": 2.2}


def inflated_pair(source: str, shape: Shape, dtype: torch.dtype, seed: int) -> Model:
    """The pair in a larger shape, in memory."""
    path = model_path(source)
    small = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    target = Target.from_model(inflate_target(small, shape, dtype=dtype, seed=seed))
    drafter = inflate_drafter(load_drafter(path, offline=True), shape, dtype=dtype, seed=seed)
    drafter.bind(target.parts(), num_target_layers=target.num_layers)
    return Model(target, drafter)


def forward_ms(target: Target, tokens: int, repeats: int = 5) -> float:
    """Median milliseconds of a forward of that many tokens after 64 cached ones."""
    table = BlockTable(range(-(-(64 + tokens) // PAGE_SIZE)))
    cache = target.new_cache(len(table.pages))
    with torch.inference_mode():
        target.forward(RaggedBatch.build([(table, 0, [7] * 64)], target.device), cache)
        rows = torch.arange(tokens)
        times: list[float] = []
        for _ in range(repeats):
            batch = RaggedBatch.build([(table, 64, [7] * tokens)], target.device)
            started = time.perf_counter()
            target.forward(batch, cache, logit_rows=rows)
            times.append((time.perf_counter() - started) * 1e3)
    return sorted(times)[repeats // 2]


def decode(
    model: Model, requests: Sequence[Request], args: argparse.Namespace, label: str, *, plain: bool
) -> dict[str, Tally]:
    """Decode with the drafter, and plainly beside it if wanted."""
    length = longest(requests)
    ways = {"plain": None, "dspark": model.drafter} if plain else {"dspark": model.drafter}
    decoders = {
        way: decoder_of(single_engine(model.target, drafter, args, length))
        for way, drafter in ways.items()
    }
    return side_by_side(decoders, requests, label=label)


def checked(
    small: Model, large: Model, requests: Requests, args: argparse.Namespace
) -> dict[str, Any]:
    """How many answers of the inflated pair are the small one's, in tokens and accepted drafts.

    At temperature 1 a draw that falls within rounding of the border between two tokens may take
    the other one; on a flat law over thousands of tokens this is seen, on a trained one hardly.
    """
    results: dict[str, Any] = {"logit_deviation": largest_deviation(small.target, large.target)}
    for name in TEMPERATURES:
        results[name] = {"answers": 0, "same_tokens": 0, "same_accepted": 0}
    for (domain, name), chosen in requests.items():
        few, label = chosen[: args.check_prompts], f"fp32 check, {domain} {name}"
        a, b = (decode(m, few, args, label, plain=False)["dspark"] for m in (small, large))
        counts = [[(o.stats.rounds, o.stats.accepted) for o in t.outputs] for t in (a, b)]
        results[name]["answers"] += len(few)
        results[name]["same_tokens"] += sum(identical(a, b))
        results[name]["same_accepted"] += sum(x == y for x, y in zip(*counts, strict=True))
    return results


def results_of(tallies: dict[str, Tally], small: Tally) -> dict[str, Any]:
    """The figures of one domain at one temperature."""
    plain, draft = tallies["plain"], tallies["dspark"]
    stats = draft.stats
    return {
        "accepted_length": stats.accepted_length,
        "small_fp32_accepted_length": small.stats.accepted_length,
        "conditional_acceptance": stats.conditional_acceptance,
        "plain_tokens_per_s": plain.tokens_per_s,
        "dspark_tokens_per_s": draft.tokens_per_s,
        "speedup": draft.tokens_per_s / plain.tokens_per_s,
        "identical_to_plain": sum(identical(plain, draft)),
        "identical_to_small_fp32": sum(identical(small, draft)),
    }


def announce(model: Model, args: argparse.Namespace) -> dict[str, float]:
    """Time the forwards of a plain step and of a verification, and say how long all will take."""
    assert model.drafter is not None
    rows = {"plain": 1, "verify": 1 + model.drafter.block_size}
    times = {name: forward_ms(model.target, count) for name, count in rows.items()}
    steps = len(DOMAINS) * len(TEMPERATURES) * args.prompts * args.max_new_tokens
    seconds = steps * (times["plain"] + times["verify"] / 2) / 1e3
    said = ", ".join(f"{rows[n]} tokens {ms:.0f} ms" for n, ms in times.items())
    say(f"a forward of {said}; timing will take up to about {seconds / 60:.0f} minutes")
    return {f"{name}_forward_ms": value for name, value in times.items()}


def requests_of(small: Model, args: argparse.Namespace) -> Requests:
    """The prompts of every domain at every temperature."""
    found: Requests = {}
    for domain in DOMAINS:
        for name, temperature in TEMPERATURES.items():
            params = SamplingParams(
                max_new_tokens=args.max_new_tokens, temperature=temperature, seed=args.seed
            )
            found[domain, name] = domain_requests(small, args.data, domain, args.prompts, params)
    return found


def timed(
    small: Model, large: Model, requests: Requests, args: argparse.Namespace
) -> dict[str, Any]:
    """Every domain and temperature on the inflated pair, the small pair's acceptance beside it."""
    domains: dict[str, Any] = {domain: {} for domain in DOMAINS}
    for (domain, name), chosen in requests.items():
        reference = decode(small, chosen, args, f"small pair, {domain} {name}", plain=False)
        tallies = decode(large, chosen, args, f"{domain} {name}", plain=True)
        domains[domain][name] = results_of(tallies, reference["dspark"])
        say(f"{domain} {name}: {rounded(domains[domain][name])}")
    return domains


def main() -> None:
    """Inflate the bundled pair, check that nothing changed, and time it."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    add_decoding_options(parser, prompts=8, tokens=48)
    parser.add_argument("--shape", type=Shape.parse, default=QWEN3_06B, help=Shape.parse.__doc__)
    parser.add_argument("--check-prompts", type=int, default=2, help="per domain, in fp32")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    small = load_pair(args.model, "float32")
    requests = requests_of(small, args)
    check: dict[str, Any] = {}
    if args.check_prompts:
        check = checked(
            small, inflated_pair(args.model, args.shape, torch.float32, args.seed), requests, args
        )
        say(f"fp32 check: {rounded(check)}")
    dtype = DTYPES[args.dtype or "bfloat16"]
    large = inflated_pair(args.model, args.shape, dtype, args.seed)
    forwards = announce(large, args)
    domains = timed(small, large, requests, args)
    values = {
        f"{key}_{name}": macro([domains[domain][name][key] for domain in DOMAINS])
        for name in TEMPERATURES
        for key in ("accepted_length", "small_fp32_accepted_length", "speedup")
    }
    results = {
        "shape": args.shape.numbers,
        "vocabulary": large.target.vocab_size,
        "settings": settings_of(args),
        "macro": values,
        "floors": against_floors(values, FLOORS),
        "check_fp32": check,
        **forwards,
        "domains": domains,
    }
    emit("inflated", environment(dtype), results)


if __name__ == "__main__":
    main()
