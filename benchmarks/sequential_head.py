"""What the sequential head costs: a round with it over the same round without, by block size.

One target of the named shape with random weights, and per head (none, vanilla, rnn) a drafter of
the same backbone, weights and block size. The engines step in turn in one process, one request
each, so that what slows the machine for a while slows all of them; the ratio is the median over
rounds of the paired ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.common import DTYPES, add_machine_options, emit, environment, rounded, say
from benchmarks.placement import QWEN3_06B, Shape
from dspark.drafters.config import BackboneConfig, DSparkConfig, evenly_spaced_taps
from dspark.drafters.dspark import DSparkDrafter
from dspark.engine.engine import Engine
from dspark.request import Request, SamplingParams
from dspark.targets.target import Target

QWEN3_4B = Shape(36, 2560, 32, 8, 128, 9728)
HEADS = ("none", "vanilla", "rnn")
CEILINGS = {"vanilla": 1.015, "rnn": 1.03}
WARM_UP = 3


def random_target(
    shape: Shape,
    vocab_size: int,
    dtype: torch.dtype,
    device: str,
    *,
    batch_invariant: bool = False,
) -> Target:
    """A Qwen3 model with random weights, made where it will run."""
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        dtype=dtype,
    )
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = Qwen3ForCausalLM(config)
    finally:
        torch.set_default_dtype(previous)
    return Target.from_model(model, batch_invariant=batch_invariant)


def drafter_config(target: Target, shape: Shape, head: str, args: Any, block: int) -> DSparkConfig:
    """A drafter of the target's width; only the head differs between configurations."""
    taps = evenly_spaced_taps(target.num_layers, min(5, target.num_layers - 3))
    backbone = BackboneConfig(
        shape.hidden_size,
        shape.intermediate_size,
        args.draft_layers,
        shape.num_heads,
        shape.num_kv_heads,
        shape.head_dim,
        num_taps=len(taps),
    )
    return DSparkConfig(
        backbone=backbone,
        vocab_size=target.vocab_size,
        block_size=block,
        mask_token_id=0,
        target_layer_ids=taps,
        num_target_layers=target.num_layers,
        markov_rank=0 if head == "none" else args.rank,
        markov_head_type="rnn" if head == "rnn" else "vanilla",
        confidence_head=False,
        confidence_head_with_markov=False,
    )


def engine_of(target: Target, shape: Shape, head: str, args: Any, block: int) -> Engine:
    """An engine with a drafter of random weights, its request running."""
    config = drafter_config(target, shape, head, args, block)
    random = torch.Generator().manual_seed(args.seed)
    drafter = DSparkDrafter.from_target(target.parts(), config, generator=random)
    drafter.to(device=target.device, dtype=target.dtype)
    # A round commits at most 1 + K tokens, and none may be drafted less near the limit.
    most = (args.rounds + WARM_UP + 2) * (block + 1)
    params = SamplingParams(
        max_new_tokens=most, temperature=args.temperature, ignore_eos=True, seed=args.seed
    )
    request = Request(prompt_ids=tuple(range(1, args.context + 1)), params=params)
    engine = Engine(target, drafter, max_requests=1, max_length=args.context + most)
    engine.add(request)
    return engine


def round_times(engines: dict[str, Engine], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every round of every engine, the engines in turn."""
    names = list(engines)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(WARM_UP + rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            started = time.perf_counter()
            engines[name].step()
            if number >= WARM_UP:
                times[name].append((time.perf_counter() - started) * 1e3)
    return times


def results_of(times: dict[str, list[float]]) -> dict[str, Any]:
    """Median round of every head, and the median ratio of each head's rounds to those without."""
    found: dict[str, Any] = {f"{name}_ms": statistics.median(row) for name, row in times.items()}
    for name in HEADS[1:]:
        pairs = zip(times[name], times["none"], strict=True)
        found[f"{name}_over_none"] = statistics.median(a / b for a, b in pairs)
    return found


def main() -> None:
    """Time rounds with and without a sequential head."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    add_machine_options(parser)
    cuda = torch.cuda.is_available()
    shape = QWEN3_4B if cuda else QWEN3_06B
    parser.add_argument("--shape", type=Shape.parse, default=shape, help=Shape.parse.__doc__)
    parser.add_argument("--vocab-size", type=int, default=151_936)
    parser.add_argument("--rank", type=int, default=256, help="r of the Markov head")
    parser.add_argument("--draft-layers", type=int, default=5)
    parser.add_argument("--block-sizes", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--context", type=int, default=256, help="tokens of the prompt")
    parser.add_argument("--rounds", type=int, default=100 if cuda else 10)
    parser.add_argument("--temperature", type=float, default=0.0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    dtype = DTYPES[args.dtype or "bfloat16"]
    target = random_target(args.shape, args.vocab_size, dtype, "cuda" if cuda else "cpu")
    blocks: dict[str, Any] = {}
    for block in args.block_sizes:
        engines = {head: engine_of(target, args.shape, head, args, block) for head in HEADS}
        blocks[str(block)] = results_of(round_times(engines, args.rounds))
        say(f"K = {block}: {rounded(blocks[str(block)])}")
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "shape": args.shape.numbers,
        "vocabulary": args.vocab_size,
        "rank": args.rank,
        "draft_layers": args.draft_layers,
        "temperature": args.temperature,
        "rounds": args.rounds,
        "blocks": blocks,
    }
    if cuda:  # the ceilings are a GPU's; a CPU reports
        results["ceilings"] = {
            name: {
                "value": max(row[f"{name}_over_none"] for row in blocks.values()),
                "ceiling": ceiling,
                "reached": all(row[f"{name}_over_none"] <= ceiling for row in blocks.values()),
            }
            for name, ceiling in CEILINGS.items()
        }
    emit("sequential_head", environment(dtype), results)


if __name__ == "__main__":
    main()
