"""Several drafters of one target on the same held-out prompts, and a report ready for the docs.

The three domains that the bundled target knows, at each temperature; for the drafters named with
`--sweep`, also a sweep over confidence thresholds and one over block lengths. Accepted lengths are
paired prompt by prompt. What is finished stays in `--records`: an interrupted study goes on there.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import dspark
from benchmarks.common import add_machine_options, emit, environment, say
from benchmarks.prompts import DOMAINS, domain_prompts
from dspark.data.conversations import Message, Prompt
from dspark.engine.loading import load_draft
from dspark.engine.model import Model
from dspark.evaluation.evaluate import evaluate, settings_of
from dspark.evaluation.records import RunRecords, Settings
from dspark.evaluation.report.results import report_of
from dspark.evaluation.report.write import write_report
from dspark.evaluation.sweeps import sweep_values, varied
from dspark.evaluation.tasks import Task
from dspark.request import VERIFIERS
from dspark.sources.names import BUNDLED as BUNDLED_TARGET

BUNDLED = (
    "DSpark=bundled", "DFlash=bundled-dflash", "Eagle3=bundled-eagle3", "MTP-1=bundled-mtp",
    "prompt lookup=ngram",
)  # fmt: skip
TASK_DOMAINS = {"gsm8k": "math", "code": "code", "chat": "chat"}


def main() -> None:
    """Evaluate every drafter, and write the report."""
    args = _parser().parse_args()
    torch.set_num_threads(args.threads)
    drafts = dict(word.split("=", 1) for word in args.draft or BUNDLED)
    if not set(args.sweep) <= set(drafts):
        raise SystemExit(f"--sweep names {args.sweep}, but the drafters are {list(drafts)}.")
    target = dspark.load(args.model, "none", dtype=args.dtype or "float32", offline=True).target
    pairs = {
        name: load_draft(target, _place(draft), offline=True) for name, draft in drafts.items()
    }
    tasks = [domain_task(args.data, name, args.prompts, args.seed) for name in DOMAINS]
    command = shlex.join(["python", "-m", "benchmarks.study", *sys.argv[1:]])
    runs = list[RunRecords]()
    for name, model in pairs.items():
        for settings in _settings(args, model, name, drafts[name]):
            runs.append(evaluate(model, settings, tasks, args.records, command))
            _tell(runs[-1])
    report = report_of(runs)
    args.out.mkdir(parents=True, exist_ok=True)
    write_report(report, args.out, say)
    say(f"Written to {args.out}.")
    emit("study", environment(target.dtype), _figures(report))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", default="bundled", help="the target's directory")
    parser.add_argument(
        "--draft",
        action="append",
        metavar="NAME=DIR",
        help="a drafter; repeatable (default: those of the bundled model)",
    )
    add_machine_options(parser)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="its folder")
    parser.add_argument("--prompts", type=int, default=100, help="per domain")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--verifier", choices=VERIFIERS, default="block")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--sweep", nargs="*", default=[], metavar="NAME", help="of the drafters")
    parser.add_argument("--records", type=Path, default=Path("runs/study"))
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    return parser


def domain_task(data: Path, name: str, count: int, seed: int) -> Task:
    """So many held-out prompts of a domain, dialogues up to their second user turn."""
    messages = domain_prompts(data, name, seed)
    prompts = [_prompt(each) for each in messages[:count]]
    task = Task.of(name, TASK_DOMAINS[name], prompts, f"held-out {name} prompts")
    return replace(task, available=len(messages))


def _prompt(messages: Sequence[Message]) -> Prompt:
    return Prompt(tuple(messages), messages[-1]["content"])


def _place(draft: str) -> str | Path:
    """What `load_draft` takes: the drafter attached to the bundled target is a folder's."""
    return BUNDLED_TARGET if draft == "bundled" else draft


def _settings(args: argparse.Namespace, model: Model, name: str, draft: str) -> list[Settings]:
    base = settings_of(
        model,
        args.model,
        name,
        draft,
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
        verifier=args.verifier,
        batch_size=args.batch_size,
        schedule="off" if model.drafter is None else "fixed",
    )
    found = [replace(base, temperature=temperature) for temperature in args.temperature]
    if name in args.sweep and model.drafter is not None:
        at = replace(base, temperature=max(args.temperature))
        for sweep in ("threshold", "block"):
            values = sweep_values(sweep)
            found += varied(at, sweep, values, model.drafter.block_size)
    return found


def _tell(run: RunRecords) -> None:
    row = report_of([run])["runs"][0]
    length = row["macro"]["accepted_length"]
    seconds = row["timings"]["seconds"]
    shown = "none" if length is None else f"{length:.2f}"
    settings = run.settings
    say(
        f"{settings.drafter}, T={settings.temperature:g}, {settings.schedule} "
        f"{settings.threshold or ''}, K={settings.block_size or 'own'}: accepted length {shown} in "
        f"{seconds:.0f} s"
    )


def _figures(report: dict[str, Any]) -> dict[str, Any]:
    """Accepted lengths of whole runs, and gains."""
    return {
        "runs": [
            {
                "drafter": run["name"],
                "temperature": run["settings"]["temperature"],
                "threshold": run["settings"]["threshold"],
                "block_size": run["drafter"]["block_size"],
                "accepted_length": run["macro"]["accepted_length"],
                "ci95": run["macro"]["ci95"],
                "tokens_per_s": run["timings"]["tokens_per_s"],
                "seconds": run["timings"]["seconds"],
            }
            for run in report["runs"]
        ],
        "gains": [
            {
                "a": pair["a"],
                "b": pair["b"],
                "temperature": pair["setting"]["temperature"],
                "gain": pair["macro"]["ratio"] - 1,
                "ci95": None
                if pair["macro"]["ci95"] is None
                else [end - 1 for end in pair["macro"]["ci95"]],
            }
            for pair in report["comparisons"]
            if pair["macro"] is not None
        ],
    }


if __name__ == "__main__":
    main()
