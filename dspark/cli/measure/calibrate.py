"""`dspark calibrate`: fits a drafter's confidences to what becomes of its drafts."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from dspark.cli.common import (
    Commands,
    Screen,
    add_common_options,
    add_loading_options,
    add_pair_options,
    check_positive,
    load_model,
    new_parser,
)
from dspark.cli.prompts import PromptText, add_prompt_options, read_prompt_texts
from dspark.errors import UsageError
from dspark.request import VERIFIERS, Request, SamplingParams

if TYPE_CHECKING:
    from dspark.engine.model import Model
    from dspark.scheduling.calibration import Rounds
    from dspark.scheduling.calibration_file import CalibrationEntry

EXAMPLE = """\
  dspark calibrate bundled --prompts questions.jsonl --temperature 1 --out calibration.json
  dspark calibrate ./target --draft ./drafter --prompts questions.jsonl --verifier token"""


def add_parser(commands: Commands) -> None:
    """Add `calibrate`."""
    summary = "fit a drafter's confidences to what becomes of its drafts"
    parser = new_parser(commands, "calibrate", summary, EXAMPLE)
    add_pair_options(parser, lookup=False)
    add_prompt_options(parser)
    group = parser.add_argument_group("rounds")
    group.add_argument("--temperature", type=float, default=0.0, metavar="T", help="default: 0")
    group.add_argument(
        "--verifier", choices=VERIFIERS, default="block", help="default: %(default)s"
    )
    group.add_argument(
        "--block-size", type=int, metavar="K", help="drafts per round (default: the drafter's)"
    )
    group.add_argument(
        "--max-new-tokens", type=int, default=128, metavar="N", help="per prompt (default: 128)"
    )
    group.add_argument(
        "--batch-size", type=int, default=16, metavar="R", help="requests at once (default: 16)"
    )
    group.add_argument(
        "--rounds", type=int, metavar="N", help="stop after so many (default: all prompts)"
    )
    group.add_argument(
        "--temperatures-only",
        action="store_true",
        help="fit no shifts beside the temperatures: the paper's form, and what SGLang reads",
    )
    group.add_argument(
        "--held-out",
        metavar="FILE",
        help="prompts whose rounds the errors are measured on (default: the fit takes the first "
        "half of all rounds, and the second half is measured)",
    )
    group.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="a file that other entries stay in (default: calibration.json beside the drafter)",
    )
    add_loading_options(parser)
    add_common_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    """Run the command; its JSON object."""
    check_positive(options, "batch_size", "max_new_tokens", "rounds")
    params = SamplingParams(
        options.max_new_tokens, temperature=options.temperature, seed=options.seed or 0
    )
    prompts = read_prompt_texts(options)
    model = load_model(options, options.draft, screen)
    from dspark.data.conversations import read_prompts
    from dspark.evaluation.calibration import halves
    from dspark.scheduling.calibration import temperature_class
    from dspark.scheduling.calibration_file import Calibration, calibrate

    path = _out(options, model)
    known = Calibration.load(path) if path.is_file() else Calibration()
    rounds = _record(options, model, prompts, params, screen)
    if options.held_out is None:
        rounds, held_out = halves(rounds)
    else:
        others = [PromptText(p.text, p.messages or ()) for p in read_prompts(options.held_out)]
        held_out = _record(options, model, others, params, screen)
    entry = calibrate(
        rounds,
        options.verifier,
        temperature_class(options.temperature),
        held_out,
        shifts=not options.temperatures_only,
    )
    known.with_entry(entry).save(path)
    _show(entry, screen)
    screen.out.print(f"Written to {path}.", soft_wrap=True)
    return {
        "temperatures": list(entry.scaling.temperatures),
        "shifts": list(entry.scaling.shifts),
        "ece_before": [r.ece for r in entry.before],
        "ece_after": [r.ece for r in entry.after],
        "auc": [r.auc for r in entry.after],
        "brier_before": [r.brier for r in entry.before],
        "brier_after": [r.brier for r in entry.after],
        "rounds": len(rounds.accepted_N),
        "held_out_rounds": len(held_out.accepted_N),
        "block_size": entry.block_size,
        "verifier": entry.verifier,
        "temperature_class": entry.temperature_class,
        "out": str(path),
    }


def _record(
    options: argparse.Namespace,
    model: Model,
    prompts: Sequence[PromptText],
    params: SamplingParams,
    screen: Screen,
) -> Rounds:
    from dspark.evaluation.calibration import record_rounds

    requests = [
        Request(prompt.encode(model, raw=options.raw), params.with_seed(params.seed + i))
        for i, prompt in enumerate(prompts)
    ]
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


def _out(options: argparse.Namespace, model: Model) -> Path:
    from dspark.scheduling.calibration_file import FILE_NAME

    if options.out is not None:
        return Path(options.out)
    if model.directory is None:
        raise UsageError("There is no drafter's directory to write to; give a file with --out.")
    return model.directory / FILE_NAME


def _show(entry: CalibrationEntry, screen: Screen) -> None:
    table = Table("position", "temperature", "shift", box=None, pad_edge=False)
    for name in ("ECE before", "after", "AUC", "Brier before", "after"):
        table.add_column(name, justify="right")
    shifts = entry.scaling.shifts or (0.0,) * entry.block_size
    rows = zip(entry.scaling.temperatures, shifts, entry.before, entry.after, strict=True)
    for k, (temperature, shift, before, after) in enumerate(rows, start=1):
        table.add_row(
            str(k),
            f"{temperature:.2f}",
            f"{shift:+.1f}",
            f"{100 * before.ece:.1f} %",
            f"{100 * after.ece:.1f} %",
            "-" if after.auc is None else f"{after.auc:.3f}",
            f"{before.brier:.3f}",
            f"{after.brier:.3f}",
        )
    screen.out.print(table)
