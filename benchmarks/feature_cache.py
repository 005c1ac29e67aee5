"""The feature cache against the published one and against features computed in the step.

Bytes: what a token of the target's own answers takes, beside the 2 (T + 1) H + 6 bytes of the
published cache. Accepted length: per seed, one small DSpark drafter is trained on features that the
target computes in the step, and one per cache on what it holds; data, initial weights, batches,
anchors and steps of a seed are the same. The engine then decodes held-out prompts with each.
Differences are taken per seed and prompt; their interval is a bootstrap over both.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from benchmarks.cache_size import caches, size_of
from benchmarks.common import (
    add_machine_options,
    emit,
    environment,
    model_path,
    rounded,
    say,
    settings_of,
)
from benchmarks.paired_lengths import compare, merged_length
from benchmarks.prompts import DOMAINS, domain_requests
from dspark.data.corpus import read_source
from dspark.drafters.checkpoints.checkpoint import load_drafter
from dspark.engine.loading import load
from dspark.engine.model import Model
from dspark.request import Request, SamplingParams, Stats
from dspark.training.drafters.new_drafter import load_frozen_target
from dspark.training.drafters.objectives import DrafterObjective
from dspark.training.recipe import DSparkRecipe, load_recipe
from dspark.training.run import run_recipe

CORPUS = {
    "gsm8k": ("gsm8k", "gsm8k_train.jsonl.gz"),
    "code": ("tldr", "tldr_pages_en.jsonl.gz"),
    "chat": ("messages", "sgd_dialogues_train.jsonl.gz"),
}
CEILING = 0.25  # of the published cache's bytes
TEMPERATURES = {"t0": 0.0, "t1": 1.0}
ONLINE = "online"


def training_prompts(model: Model, args: argparse.Namespace) -> list[Request]:
    """Prompts of the training corpora, of all domains alike, to be answered at temperature 1."""
    requests: list[Request] = []
    for domain in DOMAINS:
        kind, name = CORPUS[domain]
        conversations = list(read_source(kind, args.data / "corpus" / name))  # type: ignore[arg-type]
        random.Random(f"{domain} {args.seed}").shuffle(conversations)
        for messages in conversations[: args.train_prompts]:
            asked = list(messages)
            while asked and asked[-1]["role"] != "user":
                asked.pop()
            ids = model.encode(asked) if asked else ()
            if ids and len(ids) + args.answer_tokens <= args.max_length:
                params = SamplingParams(
                    max_new_tokens=args.answer_tokens, temperature=1.0, seed=len(requests)
                )
                requests.append(Request(ids, params))
    return requests


def write_answers(model: Model, requests: Sequence[Request], path: Path, batch_size: int) -> int:
    """Answer requests plainly, and write prompt and answer as training samples; their tokens."""
    engine = Model(model.target).engine(requests, batch_size=batch_size, strict=True)
    tokens = 0
    with path.open("w", encoding="utf-8") as file:
        for request, output in zip(requests, engine.run(requests), strict=True):
            ids = [*request.prompt_ids, *output.token_ids]
            tokens += len(ids)
            print(json.dumps({"input_ids": ids, "prompt_len": len(request.prompt_ids)}), file=file)
    return tokens


def write_recipe(model: Model, args: argparse.Namespace, folder: Path) -> Path:
    """A small DSpark drafter, trained on the answers."""
    last = model.target.num_layers
    taps = [1, 5, 9, 12, 14] if last == 16 else [*range(max(last - 4, 0), last - 1)] or [0]
    recipe = {
        "kind": "drafter",
        "target": str(model_path(args.model)),
        "drafter": {
            "num_layers": args.draft_layers,
            "block_size": 7,
            "markov_rank": 64,
            "target_layer_ids": taps,
        },
        "samples": {
            "root": str(folder),
            "paths": ["train.jsonl"],
            "max_length": args.max_length,
            "min_supervised": 4,
            "num_anchors": args.anchors,
        },
        "loss": {"ce_first_steps": args.steps // 5},
        "optimiser": {
            "name": "muon",
            "learning_rate": 0.004,
            "matrix_learning_rate": 0.006,
            "betas": [0.9, 0.98],
        },
        "run": {
            "output_dir": str(folder / "run"),
            "steps": args.steps,
            "rows": args.rows,
            "dtype": args.dtype or "float32",
            "save_every": args.steps,
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def train_one(path: Path, overrides: list[str], seed: int, folder: Path, name: str) -> Path:
    """Train a drafter; its directory."""
    output = folder / f"{name.replace('/', '-')}-{seed}"
    run_recipe(
        str(path),
        [*overrides, f"run.seed={seed}", f"run.output_dir={output}"],
        device="cpu",
        console=Console(quiet=True),
    )
    return output


def decode(
    model: Model, drafter: Path, requests: dict[str, list[Request]], batch_size: int
) -> dict[str, list[Stats]]:
    """Per temperature, the statistics of every request."""
    found: dict[str, list[Stats]] = {}
    drafts = load_drafter(drafter)
    drafts.to(model.target.dtype)
    drafts.bind(model.target.parts())
    drafts.eval()
    for name, asked in requests.items():
        engine = Model(model.target, drafts).engine(
            asked, batch_size=batch_size, schedule="fixed", strict=True
        )
        found[name] = [output.stats for output in engine.run(asked)]
    return found


def law_length(path: Path, drafter: Path, heldout: Path, parts: int) -> float:
    """Accepted length that the laws give on held-out answers, features computed in the step."""
    overrides = [f"samples.root={heldout.parent}", f"samples.paths=[{heldout.name}]"]
    recipe = load_recipe(str(path), [*overrides, "run.seed=123"])
    assert isinstance(recipe, DSparkRecipe)
    objective = DrafterObjective(recipe, load_frozen_target(recipe, "cpu", recipe.run.dtype))
    objective.drafter.load_state_dict(load_drafter(drafter).state_dict(), strict=False)
    with torch.no_grad():
        lengths = [objective.loss(i, 0, 1)[1]["accepted_length"] for i in range(parts)]
    return sum(lengths) / len(lengths)


def measure(model: Model, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train and decode with every source and seed."""
    tokens = write_answers(
        model, training_prompts(model, args), folder / "train.jsonl", args.batch_size
    )
    say(f"{tokens} tokens of the target's answers to train on")
    params = SamplingParams(max_new_tokens=args.max_new_tokens, temperature=0.0, seed=args.seed)
    asked = [
        request
        for domain in DOMAINS
        for request in domain_requests(model, args.data, domain, args.prompts, params)
    ]
    requests = {
        name: [Request(r.prompt_ids, replace(r.params, temperature=t)) for r in asked]
        for name, t in TEMPERATURES.items()
    }
    heldout = folder / "heldout.jsonl"
    write_answers(model, requests["t1"], heldout, args.batch_size)
    path = write_recipe(model, args, folder)
    ways = {ONLINE: list[str](), **caches(args, folder)}
    sizes = {
        name: size_of(model.target, load_recipe(str(path), overrides), args)
        for name, overrides in ways.items()
        if name != ONLINE
    }
    for name, size in sizes.items():
        say(f"{name}: {rounded(size['bytes_per_token'])} bytes a token, {rounded(size['ratio'])}")
    if not args.seeds:
        return sizes
    stats: dict[str, list[dict[str, list[Stats]]]] = {name: [] for name in ways}
    laws: dict[str, list[float]] = {name: [] for name in ways}
    for seed in range(args.seeds):
        for name, overrides in ways.items():
            drafter = train_one(path, overrides, seed, folder, name)
            stats[name].append(decode(model, drafter, requests, args.batch_size))
            laws[name].append(law_length(path, drafter, heldout, 4))
            lengths = {t: merged_length(row) for t, row in stats[name][-1].items()}
            say(f"seed {seed}, {name}: {rounded(lengths)}, by laws {rounded(laws[name][-1])}")
    return {name: results_of(name, sizes[name], stats, laws, args) for name in sizes}


def results_of(
    name: str,
    size: dict[str, Any],
    stats: dict[str, list[dict[str, list[Stats]]]],
    laws: dict[str, list[float]],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """The figures of one cache."""
    lengths = {
        t: compare([run[t] for run in stats[name]], [run[t] for run in stats[ONLINE]], args.seed)
        for t in TEMPERATURES
    }
    pairs = zip(laws[name], laws[ONLINE], strict=True)
    return {
        **size,
        "accepted_length": lengths,
        "laws": {
            "online": laws[ONLINE],
            "cache": laws[name],
            "relative_differences": [a / b - 1 for a, b in pairs],
        },
        "size_reached": size["ratio"] <= CEILING,
        "no_measurable_loss": all(row["ci95"][1] >= 0 for row in lengths.values()),
    }


def main() -> None:
    """Measure size and accepted length of feature caches."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    add_machine_options(parser)
    parser.add_argument("--model", default="bundled", help="target directory")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="its folder")
    parser.add_argument(
        "--caches",
        nargs="+",
        default=["0.1/0.02"],
        help="relative errors of features/teacher, or bfloat16 (default: %(default)s)",
    )
    parser.add_argument(
        "--seeds", type=int, default=3, help="training runs per source; 0 measures sizes alone"
    )
    parser.add_argument("--steps", type=int, default=300, help="of each training run")
    parser.add_argument("--rows", type=int, default=8, help="samples per step")
    parser.add_argument("--anchors", type=int, default=24, help="blocks per sample")
    parser.add_argument("--draft-layers", type=int, default=1)
    parser.add_argument("--train-prompts", type=int, default=150, help="per domain")
    parser.add_argument("--answer-tokens", type=int, default=96)
    parser.add_argument("--max-length", type=int, default=320, help="tokens of a sample")
    parser.add_argument("--prompts", type=int, default=40, help="held-out, per domain")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=40)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = load(str(model_path(args.model)), "none", device="cpu", dtype="float32", offline=True)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(model, args, Path(folder))
    results = {
        "settings": settings_of(args),
        "minutes": (time.perf_counter() - started) / 60,
        "ceiling": CEILING,
        "online_bytes_per_token": 0,
        "caches": found,
    }
    emit("feature_cache", environment(model.target.dtype), results)


if __name__ == "__main__":
    main()
