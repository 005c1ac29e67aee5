"""Same tokens with and without the drafter, in fp32, or in any dtype in batch-invariant mode.

Temperature 0: DSpark at batch sizes 1, 3 and 8 against plain decoding at batch size 1.
Coupled at temperature 1: DSpark under several block sizes and thresholds against plain decoding.
Every place where outputs part is listed with the gap between the two best scores there: a gap
below 1e-5 is rounding (docs/method.md, numerics); above, the exit status is 1. In batch-invariant
mode there is no such excuse.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.common import add_decoding_options, emit, environment, load_pair, longest, say
from benchmarks.prompts import DOMAINS, domain_requests
from dspark.attention.ragged_batch import RaggedBatch
from dspark.drafters.base import Drafter
from dspark.engine.engine import Engine
from dspark.engine.model import Model
from dspark.engine.speculation.schedule import Schedule
from dspark.request import Output, Request, SamplingParams, Verifier
from dspark.sampling.logits_processors import Chain, token_distribution
from dspark.sampling.noise import gumbel, seed_tensor
from dspark.targets.target import Target

TOLERATED_GAP = 1e-5
BATCH_SIZES = (1, 3, 8)
THRESHOLDS = (0.3, 0.7)
FULL = Schedule()


@dataclass(frozen=True)
class Setting:
    """One way to decode with the drafter."""

    verifier: Verifier
    batch_size: int
    schedule: Schedule = FULL
    block_size: int | None = None

    def __str__(self) -> str:
        """The setting's name in the results."""
        parts = [self.verifier, f"batch {self.batch_size}", f"block {self.block_size or 'full'}"]
        if self.schedule.threshold is not None:
            parts.append(f"threshold {self.schedule.threshold:g}")
        return ", ".join(parts)

    def run(
        self, target: Target, drafter: Drafter | None, requests: Sequence[Request]
    ) -> list[Output]:
        """Decode all requests."""
        engine = Engine(
            target,
            drafter,
            max_requests=self.batch_size,
            max_length=longest(requests),
            verifier=self.verifier,
            schedule=self.schedule,
            block_size=self.block_size,
        )
        return engine.run(requests)


def top_gap(target: Target, request: Request, tokens: Sequence[int]) -> float:
    """Gap between the two best scores for the token after prompt and `tokens`.

    Scores are logits at temperature 0, else the coupled verifier's: log law + noise.
    """
    ids = [*request.prompt_ids, *tokens]
    batch = RaggedBatch.fresh([ids], target.device)
    rows = torch.tensor([len(ids) - 1], device=target.device)
    score_NV = target.forward(batch, logit_rows=rows).logits_NV
    assert score_NV is not None
    if request.params.temperature > 0:
        law_NV = token_distribution(
            score_NV, Chain.of([request.params], target.device), None
        ).dense()
        seed_N = seed_tensor([request.params.seed], target.device)
        position_N = torch.tensor([len(ids)], device=target.device)
        score_NV = law_NV.double().log() + gumbel(
            seed_N, position_N, torch.arange(law_NV.shape[1], device=law_NV.device)
        )
    best = score_NV[0].topk(2).values
    return float(best[0] - best[1])


def differences(
    target: Target,
    requests: Sequence[Request],
    expected: Sequence[Output],
    outputs: Sequence[Output],
) -> list[dict[str, Any]]:
    """Per request whose tokens differ: where first, and the gap there."""
    found: list[dict[str, Any]] = []
    for i, (want, got) in enumerate(zip(expected, outputs, strict=True)):
        if want.token_ids == got.token_ids:
            continue
        pairs = enumerate(zip(want.token_ids, got.token_ids, strict=False))
        shorter = min(len(want.token_ids), len(got.token_ids))
        at = next((k for k, (a, b) in pairs if a != b), shorter)
        gap = top_gap(target, requests[i], want.token_ids[:at])
        tolerated = at < shorter and gap < TOLERATED_GAP and not target.batch_invariant
        found.append({"prompt": i, "position": at, "gap": gap, "tolerated": tolerated})
    return found


def compare(
    model: Model, requests: Sequence[Request], plain: Setting, settings: Sequence[Setting]
) -> dict[str, Any]:
    """Every setting against plain decoding."""
    expected = plain.run(model.target, None, requests)
    say(f"plain decoding of {len(requests)} prompts with {plain.verifier}: done")
    results: dict[str, Any] = {}
    for setting in settings:
        outputs = setting.run(model.target, model.drafter, requests)
        differing = differences(model.target, requests, expected, outputs)
        results[str(setting)] = {
            "prompts": len(requests),
            "identical": len(requests) - len(differing),
            "tolerated": sum(place["tolerated"] for place in differing),
            "differences": differing,
        }
        say(f"{setting}: {len(requests) - len(differing)} of {len(requests)} identical")
    return results


def mixed_requests(model: Model, args: argparse.Namespace, params: SamplingParams) -> list[Request]:
    """`args.prompts` prompts spread over the domains, each with its own seed."""
    share = -(-args.prompts // len(DOMAINS))
    by_domain = [domain_requests(model, args.data, d, share, params) for d in DOMAINS]
    mixed = [request for group in zip(*by_domain, strict=True) for request in group]
    return [
        replace(request, params=params.with_seed(params.seed + i))
        for i, request in enumerate(mixed[: args.prompts])
    ]


def coupled_settings(block_size: int, *, confidences: bool) -> list[Setting]:
    """Block sizes and thresholds at batch size 8."""
    blocks = sorted({1, (block_size + 1) // 2, block_size})
    settings = [Setting("coupled", 8, block_size=block) for block in blocks]
    if confidences:
        settings += [Setting("coupled", 8, Schedule("threshold", c)) for c in THRESHOLDS]
    return [*settings, Setting("coupled", 1)]


def main() -> None:
    """Check that drafting changes no token."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    add_decoding_options(parser, prompts=200, tokens=64)
    parser.add_argument("--coupled-prompts", type=int, default=60, help="at T = 1; 0 for none")
    parser.add_argument("--batch-invariant", action="store_true", help="in this mode")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype = args.dtype or ("bfloat16" if args.batch_invariant else "float32")
    model = load_pair(args.model, dtype, batch_invariant=args.batch_invariant)
    assert model.drafter is not None
    greedy = SamplingParams(max_new_tokens=args.max_new_tokens, seed=args.seed)
    requests = mixed_requests(model, args, greedy)
    schedule = Schedule(args.schedule, args.threshold)
    settings = [Setting(args.verifier, b, schedule, args.block_size) for b in BATCH_SIZES]
    results = {"temperature_0": compare(model, requests, Setting(args.verifier, 1), settings)}
    if args.coupled_prompts:
        args.prompts = args.coupled_prompts
        requests = mixed_requests(model, args, replace(greedy, temperature=1.0))
        with_head = model.drafter.config.confidence_head  # type: ignore[attr-defined]
        settings = coupled_settings(model.drafter.block_size, confidences=with_head)
        results["coupled_temperature_1"] = compare(model, requests, Setting("coupled", 1), settings)
    rows = [row for part in results.values() for row in part.values()]
    lost = any(row["identical"] + row["tolerated"] < row["prompts"] for row in rows)
    options = {
        "max_new_tokens": args.max_new_tokens,
        "seed": args.seed,
        "batch_invariant": args.batch_invariant,
    }
    emit("identity", environment(model.target.dtype), {"ok": not lost, **options, **results})
    sys.exit(int(lost))


if __name__ == "__main__":
    main()
