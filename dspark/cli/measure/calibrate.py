"""`dspark calibrate`: fits a drafter's confidences to what becomes of its drafts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from dspark.cli.groups import Batch, Pair, Prompts, Sampling, Speculation
from dspark.cli.inputs import encode, load_pair, named_prompts
from dspark.cli.options import Command, option, pick
from dspark.cli.screen import Screen, table
from dspark.data.conversations import Prompt, read_prompts
from dspark.errors import UsageError
from dspark.request import Request, SamplingParams, Verifier

if TYPE_CHECKING:
    from dspark.engine.model import Model
    from dspark.scheduling.calibration import Rounds
    from dspark.scheduling.calibration_file import CalibrationEntry

EXAMPLE = """\
  dspark calibrate bundled --prompts questions.jsonl --temperature 1 --out calibration.json
  dspark calibrate ./target --draft ./drafter --prompts questions.jsonl --verifier token"""


@dataclass(frozen=True)
class _Rounds:
    TITLE: ClassVar = "rounds"

    temperature: float = pick(Sampling, "temperature")
    verifier: Verifier = pick(Speculation, "verifier")
    block_size: int | None = pick(Speculation, "block_size")
    tree_nodes: int | None = pick(
        Speculation,
        "tree_nodes",
        help="decode the prompts again with draft trees of so many nodes, and fit how often second "
        "and further children of a node stay (default: chains alone)",
    )
    max_new_tokens: int = pick(
        Sampling, "max_new_tokens", 128, help="per prompt (default: {default})", least=1
    )
    batch_size: int = pick(Batch, "batch_size", 16)
    rounds: int | None = option(
        None, "stop after N rounds (default: all prompts)", metavar="N", least=1
    )
    temperatures_only: bool = option(
        False, "fit no shifts beside the temperatures: the paper's form, and what SGLang reads"
    )
    held_out: str | None = option(
        None,
        "prompts whose rounds the errors are measured on (default: the fit takes the first half of "
        "all rounds, and the second half is measured)",
        metavar="FILE",
    )
    out: Path | None = option(
        None,
        "a file whose other entries are kept (default: calibration.json beside the drafter)",
        metavar="FILE",
    )


@dataclass(frozen=True)
class Options(Prompts, _Rounds, Pair):
    """Options of `calibrate`."""

    draft: str | None = pick(
        Pair,
        "draft",
        help="a drafter's directory or hub id; by default the drafter attached to TARGET",
    )


def run(options: Options, screen: Screen) -> dict[str, Any]:
    """Run the command; its JSON object."""
    params = SamplingParams(
        options.max_new_tokens, temperature=options.temperature, seed=options.seed or 0
    )
    if options.tree_nodes is not None and not options.temperature:
        raise UsageError(
            "--tree-nodes fits how often further children stay, which only sampled requests look "
            "at; give a --temperature as well."
        )
    if options.tree_nodes is not None and options.verifier == "coupled":
        raise UsageError("--tree-nodes fits nothing for the verifier 'coupled'; leave it out.")
    prompts = named_prompts(options)
    model = load_pair(options, screen)
    from dspark.scheduling.calibration import temperature_class
    from dspark.scheduling.calibration_file import Calibration, calibrate

    path = _out(options, model)
    known = Calibration.load(path) if path.is_file() else Calibration()
    rounds = _record(options, model, prompts, params, screen)
    if options.held_out is None:
        rounds, held_out = rounds.halves()
    else:
        others = read_prompts(options.held_out)
        held_out = _record(options, model, others, params, screen)
    entry = calibrate(
        rounds,
        options.verifier,
        temperature_class(options.temperature),
        held_out,
        shifts=not options.temperatures_only,
    )
    if options.tree_nodes is not None:
        rates = _child_rates(options, options.tree_nodes, model, prompts, params, screen)
        entry = replace(entry, child_rates=rates)
        screen.say(f"Children after the first stay: {', '.join(f'{rate:.1%}' for rate in rates)}.")
    known.with_entry(entry).save(path)
    _show(entry, screen)
    screen.say(f"Written to {path}.")
    return {
        "temperatures": list(entry.scaling.temperatures),
        "shifts": list(entry.scaling.shifts),
        "ece_before": [r.ece for r in entry.before],
        "ece_after": [r.ece for r in entry.after],
        "ece_by_chance": [r.ece_by_chance for r in entry.after],
        "auc": [r.auc for r in entry.after],
        "brier_before": [r.brier for r in entry.before],
        "brier_after": [r.brier for r in entry.after],
        "child_rates": list(entry.child_rates),
        "rounds": len(rounds.accepted_N),
        "held_out_rounds": len(held_out.accepted_N),
        "block_size": entry.block_size,
        "verifier": entry.verifier,
        "temperature_class": entry.temperature_class,
        "out": str(path),
    }


def _record(
    options: Options,
    model: Model,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    screen: Screen,
) -> Rounds:
    from dspark.evaluation.calibration import record_rounds

    requests = _requests(options, model, prompts, params)
    with screen.log.status("Recording rounds ...") as status:
        return record_rounds(
            model,
            requests,
            verifier=options.verifier,
            block_size=options.block_size,
            batch_size=options.batch_size,
            most=options.rounds,
            progress=lambda n: status.update(f"Recording rounds ... {n}"),
        )


def _child_rates(
    options: Options,
    nodes: int,
    model: Model,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    screen: Screen,
) -> tuple[float, ...]:
    from dspark.evaluation.calibration import record_child_rates

    with screen.log.status("Recording trees ...") as status:
        return record_child_rates(
            model,
            _requests(options, model, prompts, params),
            nodes,
            verifier=options.verifier,
            block_size=options.block_size,
            batch_size=options.batch_size,
            most=options.rounds,
            progress=lambda n: status.update(f"Recording trees ... {n}"),
        )


def _requests(
    options: Options, model: Model, prompts: Sequence[Prompt], params: SamplingParams
) -> list[Request]:
    return [
        Request(encode(prompt, model, raw=options.raw), params.with_seed(params.seed + i))
        for i, prompt in enumerate(prompts)
    ]


def _out(options: Options, model: Model) -> Path:
    from dspark.scheduling.calibration_file import FILE_NAME

    if options.out is not None:
        return options.out
    if model.directory is None:
        raise UsageError("There is no drafter's directory to write to; give a file with --out.")
    return model.directory / FILE_NAME


def _show(entry: CalibrationEntry, screen: Screen) -> None:
    numbers = ("ECE before", "after", "by chance", "AUC", "Brier before", "after")
    shown = table("position", "temperature", "shift", right=numbers)
    shifts = entry.scaling.shifts or (0.0,) * entry.block_size
    rows = zip(entry.scaling.temperatures, shifts, entry.before, entry.after, strict=True)
    for k, (temperature, shift, before, after) in enumerate(rows, start=1):
        shown.add_row(
            str(k),
            f"{temperature:.2f}",
            f"{shift:+.1f}",
            f"{100 * before.ece:.1f} %",
            f"{100 * after.ece:.1f} %",
            f"{100 * after.ece_by_chance:.1f} %",
            "-" if after.auc is None else f"{after.auc:.3f}",
            f"{before.brier:.3f}",
            f"{after.brier:.3f}",
        )
    screen.out.print(shown)


COMMAND = Command(
    "calibrate", "fit a drafter's confidences to what becomes of its drafts", EXAMPLE, Options, run
)
