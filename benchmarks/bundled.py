"""The bundled pair on held-out prompts: accepted length, and speed against plain decoding.

Per domain and temperature, one request at a time, all ways in turn within each request: plain
decoding (an engine without drafter), DSpark, prompt lookup, and at temperature 0 transformers'
`generate` with its cache. Speeds are end to end, prefill included.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.common import (
    Decoder,
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
    say,
    settings_of,
    side_by_side,
    single_engine,
)
from benchmarks.prompts import DOMAINS, domain_requests
from dspark.data.answers.replay import repeats_gram
from dspark.drafters.ngram import NgramDrafter
from dspark.engine.model import Model
from dspark.request import Output, Request, SamplingParams, Stats
from dspark.targets.target import Target

TEMPERATURES = {"t0": 0.0, "t1": 1.0}
FLOORS = {
    "accepted_length_t0": 3.5,
    "accepted_length_t1": 3.0,
    "speedup_t0": 2.0,
    "speedup_t1": 1.5,
    "plain_over_transformers_t0": 1.0,
}
MOST_REPEATING = 0.1
GRAM = 8


def transformers_decoder(target: Target, source: str) -> Decoder:
    """Transformers' greedy `generate` with its cache, for the same checkpoint and dtype."""
    model: Any = AutoModelForCausalLM.from_pretrained(model_path(source), dtype=target.dtype)
    model.eval()

    def decode(request: Request) -> Output:
        ids_1T = torch.tensor([request.prompt_ids])
        with torch.inference_mode():
            row = model.generate(
                ids_1T,
                attention_mask=torch.ones_like(ids_1T),
                max_new_tokens=request.params.max_new_tokens,
                do_sample=False,
                use_cache=True,
                eos_token_id=sorted(target.eos_token_ids),
                pad_token_id=min(target.eos_token_ids),
            )[0]
        return Output("", "", tuple(row[ids_1T.shape[1] :].tolist()), "length", Stats())

    return decode


def domain_results(tallies: dict[str, Tally], temperature: float) -> dict[str, Any]:
    """The figures of one domain at one temperature."""
    plain, draft, lookup = tallies["plain"], tallies["dspark"], tallies["lookup"]
    same = identical(plain, draft)
    results: dict[str, Any] = {
        "accepted_length": draft.stats.accepted_length,
        "lookup_accepted_length": lookup.stats.accepted_length,
        "conditional_acceptance": draft.stats.conditional_acceptance,
        "plain_tokens_per_s": plain.tokens_per_s,
        "dspark_tokens_per_s": draft.tokens_per_s,
        "speedup": draft.tokens_per_s / plain.tokens_per_s,
        "lookup_speedup": lookup.tokens_per_s / plain.tokens_per_s,
        "tokens_per_answer": sum(len(o.token_ids) for o in plain.outputs) / len(plain.outputs),
    }
    answers = plain.outputs
    by_tokens = [repeats_gram(output.token_ids, GRAM) for output in answers]
    by_words = [repeats_gram(output.text.split(), GRAM) for output in answers]
    results["repeating_share_tokens"] = sum(by_tokens) / len(answers)
    results["repeating_share_words"] = sum(by_words) / len(answers)
    if temperature == 0:
        reference = tallies["transformers"]
        results |= {
            "identical": sum(same),
            "different_prompts": [i for i, equal in enumerate(same) if not equal],
            "identical_to_transformers": sum(identical(plain, reference)),
            "transformers_tokens_per_s": reference.tokens_per_s,
            "plain_over_transformers": plain.tokens_per_s / reference.tokens_per_s,
        }
    return results


def measure(model: Model, args: argparse.Namespace) -> dict[str, Any]:
    """All domains at both temperatures."""
    target = model.target
    lookup = NgramDrafter()
    lookup.bind(target.parts())
    generate = transformers_decoder(target, args.model)
    results: dict[str, Any] = {}
    for domain in DOMAINS:
        results[domain] = {}
        for name, temperature in TEMPERATURES.items():
            params = SamplingParams(
                max_new_tokens=args.max_new_tokens, temperature=temperature, seed=args.seed
            )
            requests = domain_requests(model, args.data, domain, args.prompts, params)
            drafters = {"plain": None, "dspark": model.drafter, "lookup": lookup}
            decoders = {
                way: decoder_of(single_engine(target, drafter, args, longest(requests)))
                for way, drafter in drafters.items()
            }
            if temperature == 0:
                decoders["transformers"] = generate
            label = f"{domain}, temperature {temperature:g}"
            tallies = side_by_side(decoders, requests, repeats=args.repeats, label=label)
            results[domain][name] = domain_results(tallies, temperature)
    return results


def macro_results(domains: dict[str, Any]) -> dict[str, float]:
    """Means over domains of what a single number can say."""
    values: dict[str, float] = {}
    for name in TEMPERATURES:
        rows = [domains[domain][name] for domain in DOMAINS]
        for key, value in rows[0].items():
            if isinstance(value, (int, float)) and not key.startswith("identical"):
                values[f"{key}_{name}"] = macro([row[key] for row in rows])
    return values


def main() -> None:
    """Measure the bundled pair, or any pair with its drafter attached."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    add_decoding_options(parser, prompts=50, tokens=128)
    parser.add_argument("--repeats", type=int, default=1, help="of each timing; medians count")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = load_pair(args.model, args.dtype or "float32")
    say(f"{args.model}: {len(DOMAINS)} domains x {args.prompts} prompts, {args.repeats} repeats")
    domains = measure(model, args)
    values = macro_results(domains)
    floors = against_floors(values, FLOORS)
    shares = {name: values[f"repeating_share_{name}_t0"] for name in ("tokens", "words")}
    floors["repeating_share_t0"] = {
        "value": shares,
        "ceiling": MOST_REPEATING,
        "reached": max(shares.values()) <= MOST_REPEATING,
    }
    results = {
        "settings": settings_of(args),
        "macro": values,
        "floors": floors,
        "domains": domains,
    }
    emit("bundled", environment(model.target.dtype), results)


if __name__ == "__main__":
    main()
