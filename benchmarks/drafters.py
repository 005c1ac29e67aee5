"""The drafters of the bundled model side by side: what each gets accepted on held-out prompts.

Per domain and temperature, many requests at once and every draft verified, so that accepted
lengths are the drafters' own and no speed is measured: prompt lookup, MTP-1, Eagle3, DFlash and
DSpark, the trained ones on the same data and in as many steps.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

import dspark
from benchmarks.common import add_decoding_options, emit, environment, macro, say
from benchmarks.prompts import DOMAINS, domain_requests
from dspark.request import SamplingParams, merge_stats

DRAFTERS = {
    "prompt lookup": "ngram",
    "MTP-1": "bundled-mtp",
    "Eagle3": "bundled-eagle3",
    "DFlash": "bundled-dflash",
    "DSpark": None,
}
TEMPERATURES = {"t0": 0.0, "t1": 1.0}


def main() -> None:
    """Decode every domain with every drafter."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    add_decoding_options(parser, prompts=50, tokens=64)
    parser.add_argument("--batch-size", type=int, default=25)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found: dict[str, Any] = {}
    for name, draft in DRAFTERS.items():
        model = dspark.load("bundled", draft, dtype="float32", offline=True)
        found[name] = {"domains": {}}
        for domain in DOMAINS:
            row: dict[str, Any] = {}
            for key, temperature in TEMPERATURES.items():
                params = SamplingParams(
                    args.max_new_tokens, temperature=temperature, seed=args.seed
                )
                requests = domain_requests(model, args.data, domain, args.prompts, params)
                engine = model.engine(
                    requests,
                    batch_size=args.batch_size,
                    verifier=args.verifier,
                    schedule="fixed",
                )
                stats = merge_stats(engine.run(requests))
                row[key] = {
                    "accepted_length": stats.accepted_length,
                    "conditional_acceptance": stats.conditional_acceptance,
                    "rounds": stats.rounds,
                }
            found[name]["domains"][domain] = row
        for key in TEMPERATURES:
            found[name][f"accepted_length_{key}"] = macro(
                [row[key]["accepted_length"] for row in found[name]["domains"].values()]
            )
        lengths = (f"{key} {found[name][f'accepted_length_{key}']:.2f}" for key in TEMPERATURES)
        say(f"{name}: accepted length {', '.join(lengths)}")
    gains = {
        f"dspark_over_{other.lower()}_{key}": found["DSpark"][f"accepted_length_{key}"]
        / found[other][f"accepted_length_{key}"]
        - 1
        for other in ("DFlash", "Eagle3", "MTP-1")
        for key in TEMPERATURES
    }
    figures = {
        "prompts": args.prompts,
        "max_new_tokens": args.max_new_tokens,
        "verifier": args.verifier,
        "drafters": found,
        "gains": gains,
    }
    emit("drafters", environment(torch.float32), figures)


if __name__ == "__main__":
    main()
