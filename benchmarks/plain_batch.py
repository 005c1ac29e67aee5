"""Plain decoding beside transformers at the same batch, and beside what memory allows.

The bundled target, inflated as in `benchmarks.load`, decodes the same prompts to the same number
of tokens in three ways, in turn: this engine without a drafter, transformers' `generate` (prompts
padded on the left), and its continuous batching, `generate_batch`. Times are end to end, prompts
included; a first run of each is not counted, and no way may keep prompts from one run to the next.

At batch 1 a step must read every weight once (of the input embedding one row only). Their bytes
over the bandwidth of a large copy in the same run are the floor of a step.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from benchmarks.common import DTYPES, add_options, emit, environment, model_path, rounded, say
from benchmarks.inflate import inflate_target
from benchmarks.load import SHAPE
from benchmarks.placement import Shape
from benchmarks.prompts import DOMAINS, domain_requests
from dspark.engine.model import Model
from dspark.engine.profile import hardware_name
from dspark.evaluation.load.report import median, median_interval
from dspark.request import Request, SamplingParams
from dspark.targets.target import Target

OURS, GENERATE, CONTINUOUS = "ours", "generate", "generate_batch"
WAYS = (OURS, GENERATE, CONTINUOUS)
PAGE_SIZE = 256
NO_TOKEN = 1 << 30  # as an end token: none that the model has
FLOORS = {"ours_over_transformers": 1.0, "share_of_bandwidth": 0.8}
Answers = list[list[int]]
Decode = Callable[[Sequence[Request]], tuple[Answers, float]]
"""Requests -> their tokens, and the seconds that it took."""


def ours(target: Target) -> Decode:
    """This engine, a new one at every call, whose making is not counted."""

    def decode(requests: Sequence[Request]) -> tuple[Answers, float]:
        engine = Model(target).engine(requests, batch_size=len(requests))
        started = time.perf_counter()
        outputs = engine.run(requests)
        return [list(o.token_ids) for o in outputs], time.perf_counter() - started

    return decode


def generate(model: Any) -> Decode:
    """Transformers' `generate` with its cache, one padded batch."""
    device = model.device

    def decode(requests: Sequence[Request]) -> tuple[Answers, float]:
        longest = max(len(r.prompt_ids) for r in requests)
        pads = [longest - len(r.prompt_ids) for r in requests]
        ids_BT = torch.tensor(
            [[0] * n + list(r.prompt_ids) for n, r in zip(pads, requests, strict=True)]
        )
        mask_BT = torch.tensor([[0] * n + [1] * (longest - n) for n in pads])
        tokens = requests[0].params.max_new_tokens
        started = time.perf_counter()
        with torch.inference_mode():
            rows_BT = model.generate(
                ids_BT.to(device),
                attention_mask=mask_BT.to(device),
                generation_config=_greedy(tokens),
            )
        answers = rows_BT[:, longest:].tolist()
        return answers, time.perf_counter() - started

    return decode


def generate_batch(model: Any, batch: int, tokens: int) -> Decode:
    """Transformers' continuous batching, its pages large enough for a batch of so many tokens."""
    pages = batch * (-(-tokens // PAGE_SIZE) + 1)
    config = ContinuousBatchingConfig(
        page_size=PAGE_SIZE,
        num_blocks=pages,
        max_batch_tokens=max(512, batch),
        max_requests_per_batch=batch,
        allow_block_sharing=False,
    )

    def decode(requests: Sequence[Request]) -> tuple[Answers, float]:
        started = time.perf_counter()
        outputs = model.generate_batch(
            [list(r.prompt_ids) for r in requests],
            generation_config=_greedy(requests[0].params.max_new_tokens),
            continuous_batching_config=config,
            persistent_manager=True,
            warmup=False,
        )
        seconds = time.perf_counter() - started
        answers = sorted(outputs.values(), key=lambda o: int(o.request_id.rpartition("_")[2]))
        return [list(o.generated_tokens) for o in answers], seconds

    return decode


def _greedy(tokens: int) -> GenerationConfig:
    """So many of the likeliest tokens; no token ends an answer."""
    return GenerationConfig(
        max_new_tokens=tokens, do_sample=False, eos_token_id=NO_TOKEN, pad_token_id=0
    )


def in_turn(
    decoders: dict[str, Decode], requests: Sequence[Request], repeats: int
) -> tuple[dict[str, list[float]], dict[str, Answers]]:
    """Tokens per second of every way, repeat by repeat, and what each said first."""
    names = list(decoders)
    speeds: dict[str, list[float]] = {name: [] for name in names}
    said: dict[str, Answers] = {}
    for repeat in range(-1, repeats):
        start = (repeat + 1) % len(names)
        for name in (*names[start:], *names[:start]):
            answers, seconds = decoders[name](requests)
            said.setdefault(name, answers)
            if repeat >= 0:  # the first visit warms up
                speeds[name].append(sum(map(len, answers)) / seconds)
    return speeds, said


def batch_results(speeds: dict[str, list[float]], said: dict[str, Answers]) -> dict[str, Any]:
    """The figures of one batch size: ratios are taken repeat by repeat."""
    found: dict[str, Any] = {f"{name}_tokens_per_s": median(s) for name, s in speeds.items()}
    for name in (n for n in speeds if n != OURS):
        ratios = [a / b for a, b in zip(speeds[OURS], speeds[name], strict=True)]
        same = [a == b for a, b in zip(said[OURS], said[name], strict=True)]
        found[f"ours_over_{name}"] = median(ratios)
        found[f"ours_over_{name}_ci95"] = median_interval(ratios)
        found[f"identical_to_{name}"] = sum(same) / len(same)
    found["reached"] = all(
        found[f"ours_over_{n}"] >= FLOORS["ours_over_transformers"] for n in speeds if n != OURS
    )
    return found


def copy_bandwidth(device: torch.device, size: int, repeats: int = 7) -> float:
    """Bytes per second of a copy, read and written bytes both counted."""
    source = torch.empty(size, dtype=torch.uint8, device=device).fill_(1)
    sink = torch.empty_like(source)
    seconds = []
    for _ in range(repeats + 1):
        _wait(device)
        started = time.perf_counter()
        sink.copy_(source)
        _wait(device)
        seconds.append(time.perf_counter() - started)
    return 2 * size / median(seconds[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def weight_bytes(model: Any) -> int:
    """Bytes of the weights that a step of one token reads."""
    weights = {id(p): p.numel() * p.element_size() for p in model.parameters()}
    embedding, head = (
        m.weight for m in (model.get_input_embeddings(), model.get_output_embeddings())
    )
    return sum(weights.values()) - (0 if embedding is head else weights[id(embedding)])


def step_ms(target: Target, request: Request, repeats: int) -> float:
    """Median milliseconds between the tokens of one request, the whole engine included."""
    times: list[float] = []
    for _ in range(repeats):
        engine = Model(target).engine([request])
        engine.add(request)
        engine.step()  # reads the prompt
        before = time.perf_counter()
        while engine.has_work:
            engine.step()
            now = time.perf_counter()
            times.append((now - before) * 1e3)
            before = now
    return median(times)


def bandwidth_results(
    target: Target, model: Any, request: Request, args: argparse.Namespace
) -> dict[str, Any]:
    """A step at batch 1 beside the time that reading the weights takes."""
    bandwidth = copy_bandwidth(target.device, args.copy_mb << 20)
    size = weight_bytes(model)
    floor_ms, ms = 1e3 * size / bandwidth, step_ms(target, request, args.repeats)
    return {
        "weight_bytes": size,
        "copy_bytes_per_s": bandwidth,
        "floor_ms": floor_ms,
        "step_ms": ms,
        "share_of_bandwidth": floor_ms / ms,
        "reached": floor_ms / ms >= FLOORS["share_of_bandwidth"],
    }


def main() -> None:
    """Measure plain decoding against transformers and against memory bandwidth."""
    args = options()
    torch.set_num_threads(args.threads)
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)
    source, device = model_path(args.model), torch.device(args.device)
    dtype = DTYPES[args.dtype or "bfloat16"]
    small = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    mine, theirs, batching = (
        inflate_target(small, args.shape, dtype=dtype, seed=args.seed).to(device) for _ in range(3)
    )
    tokenizer = Target.load(source, dtype="float32", offline=True).tokenizer
    target = Target.from_model(mine, tokenizer=tokenizer)
    requests = requests_of(target, max(args.batch), args)
    longest = max(len(r.prompt_ids) for r in requests) + args.max_new_tokens
    batches: dict[str, Any] = {}
    for batch in args.batch:
        decoders = {
            OURS: ours(target),
            GENERATE: generate(theirs),
            CONTINUOUS: generate_batch(batching, batch, longest),
        }
        decoders = {name: decoders[name] for name in WAYS if name == OURS or name in args.ways}
        batches[str(batch)] = batch_results(*in_turn(decoders, requests[:batch], args.repeats))
        if CONTINUOUS in decoders:
            batching.destroy_cached_continuous_batching_manager()
        say(f"batch {batch}: {rounded(batches[str(batch)])}")
    results = {
        "device": hardware_name(device),
        "shape": args.shape.numbers,
        "vocabulary": target.vocab_size,
        "settings": {
            name: getattr(args, name) for name in ("ways", "max_new_tokens", "repeats", "copy_mb")
        },
        "batches": batches,
        "bandwidth": bandwidth_results(target, mine, requests[0], args),
    }
    emit("plain_batch", environment(dtype), results)


def requests_of(target: Target, count: int, args: argparse.Namespace) -> list[Request]:
    """Held-out prompts of the three domains in turn, each continued to the same length."""
    params = SamplingParams(args.max_new_tokens, ignore_eos=True, seed=args.seed)
    each = -(-count // len(DOMAINS))
    columns = [domain_requests(Model(target), args.data, d, each, params) for d in DOMAINS]
    rows = [request for row in zip(*columns, strict=True) for request in row]
    return [replace(request, params=params) for request in rows[:count]]


def options() -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    add_options(parser)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="its folder")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--shape", type=Shape.parse, default=SHAPE, help=Shape.parse.__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=(1, 8, 32))
    parser.add_argument("--ways", choices=WAYS[1:], nargs="+", default=WAYS[1:], help="beside ours")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--copy-mb", type=int, default=1024, help="MiB of the copy")
    return parser.parse_args()


if __name__ == "__main__":
    main()
