"""What the measurements share: options, the machine, timed decoding side by side, the JSON line."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers

import dspark
from dspark.drafters.base import Drafter
from dspark.drafters.ngram import NgramDrafter
from dspark.engine.engine import Engine
from dspark.engine.model import Model
from dspark.engine.profile import hardware_name
from dspark.engine.speculation.schedule import SCHEDULES, Schedule
from dspark.request import VERIFIERS, Output, Request, Stats, merge_stats
from dspark.sources.names import BUNDLED, target_source
from dspark.targets.target import Target

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Decoder = Callable[[Request], Output]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of every measurement of a pair."""
    parser.add_argument("--model", default="bundled", help="target directory, drafter attached")
    add_machine_options(parser)


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    """Options of every measurement."""
    parser.add_argument("--dtype", choices=DTYPES, help="default: what the measurement is about")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--seed", type=int, default=0, help="names prompts and randomness")


def add_decoding_options(parser: argparse.ArgumentParser, *, prompts: int, tokens: int) -> None:
    """Options of measurements that decode prompts with a drafter."""
    add_options(parser)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="its folder")
    parser.add_argument("--prompts", type=int, default=prompts, help="per domain")
    parser.add_argument("--max-new-tokens", type=int, default=tokens)
    parser.add_argument("--verifier", choices=VERIFIERS, default="block")
    parser.add_argument("--schedule", choices=SCHEDULES[1:], default="fixed")
    parser.add_argument("--threshold", type=float, help="of the schedule 'threshold'")
    parser.add_argument("--block-size", type=int, help="default: the drafter's own")


def model_path(name: str) -> Path:
    """The directory that a name, or a GGUF file, stands for."""
    return BUNDLED if name == "bundled" else Path(target_source(name))


def load_pair(
    name: str, dtype: str, draft: str | None = None, *, batch_invariant: bool = False
) -> Model:
    """A target with its attached drafter, or with another one.

    Raises:
        SystemExit: there is no drafter beside the target.
    """
    model = dspark.load(name, draft, dtype=dtype, offline=True, batch_invariant=batch_invariant)
    if model.drafter is None:
        raise SystemExit(f"{name} has no drafter attached; give a directory with dspark/ in it.")
    return model


def environment(dtype: torch.dtype) -> dict[str, Any]:
    """Hardware, threads, dtype and versions."""
    return {
        "cpu": hardware_name(torch.device("cpu")),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dspark": dspark.__version__,
    }


def say(text: str) -> None:
    """Print progress to the standard error stream."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def emit(name: str, machine: Mapping[str, Any], results: Mapping[str, Any]) -> None:
    """Print the JSON line that ends a measurement; numbers are cut to 4 significant digits."""
    line = {"benchmark": name, "environment": dict(machine), **rounded(dict(results))}
    print(json.dumps(line), flush=True)


def rounded(value: Any) -> Any:
    """The value with its floats cut to 4 significant digits."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    return value


@dataclass
class Tally:
    """What one way of decoding gave: per request its output and its seconds, end to end."""

    outputs: list[Output] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def stats(self) -> Stats:
        """Statistics of all requests together."""
        return merge_stats(self.outputs)

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens per second, prefill included."""
        return sum(len(o.token_ids) for o in self.outputs) / sum(self.seconds)


def side_by_side(
    decoders: Mapping[str, Decoder], requests: Sequence[Request], *, repeats: int = 1, label: str
) -> dict[str, Tally]:
    """Decode every request in every way, one after the other, and time it.

    The ways take turns within each request, each time another one first, so that what slows the
    machine for a while slows all of them. Before, a few tokens are decoded untimed.

    Args:
        decoders: the ways, by name.
        requests: what to decode.
        repeats: of each measurement; its median counts.
        label: says in the progress what this is.
    """
    tallies = {name: Tally() for name in decoders}
    names = list(decoders)
    first = requests[0]
    few = replace(first.params, max_new_tokens=min(8, first.params.max_new_tokens))
    for decode in decoders.values():
        decode(replace(first, params=few))
    for i, request in enumerate(requests):
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for repeat in range(repeats):
            turn = (i + repeat) % len(names)
            for name in names[turn:] + names[:turn]:
                started = time.perf_counter()
                output = decoders[name](request)
                seconds[name].append(time.perf_counter() - started)
                if repeat == 0:
                    tallies[name].outputs.append(output)
        for name in names:
            tallies[name].seconds.append(statistics.median(seconds[name]))
        if (i + 1) % max(1, len(requests) // 5) == 0:
            speeds = ", ".join(f"{n} {t.tokens_per_s:.1f}" for n, t in tallies.items())
            say(f"{label}: {i + 1} of {len(requests)} requests; tokens/s: {speeds}")
    return tallies


def schedule_of(args: argparse.Namespace) -> Schedule:
    """The schedule that the options name."""
    return Schedule(args.schedule, args.threshold)


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """The options that a figure depends on, for the results."""
    elsewhere = ("model", "data", "dtype", "threads", "shape")
    return {name: value for name, value in vars(args).items() if name not in elsewhere}


def single_engine(
    target: Target, drafter: Drafter | None, args: argparse.Namespace, max_length: int
) -> Engine:
    """An engine for one request at a time, as the options say; plain without a drafter."""
    has_own = drafter is not None and not isinstance(drafter, NgramDrafter)
    return Engine(
        target,
        drafter,
        max_requests=1,
        max_length=max_length,
        verifier=args.verifier,
        schedule=schedule_of(args) if has_own else None,
        block_size=args.block_size if has_own else None,
    )


def decoder_of(engine: Engine) -> Decoder:
    """Decode one request on an idle engine."""
    return lambda request: engine.run([request])[0]


def longest(requests: Sequence[Request]) -> int:
    """Tokens that the longest request can reach."""
    return max(len(r.prompt_ids) + r.params.max_new_tokens for r in requests)


def identical(a: Tally, b: Tally) -> list[bool]:
    """Per request, whether both gave the same tokens."""
    return [x.token_ids == y.token_ids for x, y in zip(a.outputs, b.outputs, strict=True)]


def macro(values: Sequence[float]) -> float:
    """The mean over domains."""
    return sum(values) / len(values)


def against_floors(values: Mapping[str, float], floors: Mapping[str, float]) -> dict[str, Any]:
    """Each figure beside its floor, and whether it is reached."""
    return {
        name: {"value": values[name], "floor": floor, "reached": values[name] >= floor}
        for name, floor in floors.items()
    }
