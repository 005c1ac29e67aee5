"""Stages of a fit after training, each using the functions of the command of the same name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dspark.data.conversations import as_prompt
from dspark.data.files.json_lines import read_json_lines
from dspark.drafters.checkpoints.checkpoint import load_drafter, save_attached
from dspark.drafters.checkpoints.files import ATTACHED_FOLDER
from dspark.drafters.checkpoints.registry import AnyDrafter
from dspark.engine.model import Model
from dspark.errors import DataError
from dspark.evaluation.calibration import record_rounds
from dspark.evaluation.check.live import render
from dspark.evaluation.evaluate import evaluate, settings_of
from dspark.evaluation.report.results import run_report
from dspark.evaluation.tasks import load_file
from dspark.fitting.answers import PROMPTS, Fit
from dspark.fitting.evaluation import (
    TEMPERATURES,
    HeldOutPrompt,
    calibration_error,
    domain_rows,
    limits_of,
    race,
)
from dspark.fitting.prompts import CALIBRATION, HELD_OUT
from dspark.fitting.training import TRAINING
from dspark.fitting.workload import FEWEST_HELD_OUT, expected_length
from dspark.request import Request, SamplingParams, Verifier
from dspark.scheduling.calibration import temperature_class
from dspark.scheduling.calibration_file import FILE_NAME, Calibration, calibrate
from dspark.scheduling.cost_table import CostTable

COSTS, LAPS = "costs.json", "laps"
VERIFIER: Verifier = "block"
ROUNDS_PER_CLASS = 4000


def place_drafter(fit: Fit) -> Path:
    """Write the trained drafter for serving, without the target's tables; returns its directory."""
    drafter = _bound(fit, load_drafter(fit.path(TRAINING)))
    return save_attached(drafter, fit.options.folder).directory


def _bound(fit: Fit, drafter: AnyDrafter) -> AnyDrafter:
    target = fit.model.target
    drafter.to(target.device)
    drafter.bind(target.parts(), num_target_layers=target.num_layers)
    drafter.eval()
    return drafter


def pair(fit: Fit, costs: CostTable | None = None) -> Model:
    """The target with the trained drafter, as served."""
    directory = fit.path(ATTACHED_FOLDER)
    calibration = directory / FILE_NAME
    return Model(
        fit.model.target,
        _bound(fit, load_drafter(directory)),
        name=fit.served_as,
        directory=directory,
        calibration=Calibration.load(calibration) if calibration.is_file() else None,
        costs=costs,
    )


def calibrate_pair(fit: Fit) -> dict[str, Any]:
    """Stage `calibration`: at temperatures 0 and 1, each for half of the time.

    A drafter without confidences has nothing to calibrate, and serves under `auto`.
    """
    place_drafter(fit)
    if not fit.plan.calibration:
        return {"calibration": {}}
    model = pair(fit)
    prompts = [as_prompt(r, where) for where, r in read_json_lines(fit.path(PROMPTS, CALIBRATION))]
    calibration, errors = Calibration(), dict[str, Any]()
    seconds = fit.plan.seconds["calibration"] / len(TEMPERATURES)
    for done, temperature in enumerate(TEMPERATURES):
        kind = temperature_class(temperature)
        params = SamplingParams(fit.plan.answer_tokens, temperature=temperature)
        requests = [
            Request(ids, params.with_seed(fit.options.seed + i))
            for i, ids in enumerate(render(model, prompts))
        ]
        try:
            rounds = record_rounds(
                model,
                requests,
                batch_size=fit.plan.speeds.batch_size,
                most=ROUNDS_PER_CLASS,
                seconds=seconds,
                progress=_recorded(fit, done),
            )
            entry = calibrate(rounds, VERIFIER, kind)
        except DataError as error:  # too few rounds
            fit.say(f"The confidences for {kind} requests stay uncalibrated: {error}")
            continue
        calibration = calibration.with_entry(entry)
        errors[kind] = {
            "rounds": len(rounds.accepted_N),
            "ece_before": _mean([r.ece for r in entry.before]),
            "ece_after": _mean([r.ece for r in entry.after]),
        }
    if calibration.entries:
        calibration.save(fit.path(ATTACHED_FOLDER, FILE_NAME))
    return {"calibration": errors}


def _recorded(fit: Fit, done: int) -> Callable[[int], None]:
    return lambda rounds: fit.progress(done + min(rounds / 1000, 1), len(TEMPERATURES))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def measure_costs(fit: Fit) -> dict[str, Any]:
    """Stage `costs`: the cost table, in the run's folder and in the user's cache."""
    model = pair(fit)
    table = model.profile(
        max_requests=fit.plan.profile_requests,
        repeats=fit.plan.profile_repeats,
        progress=fit.progress,
    )
    table.save(fit.path(COSTS))
    try:
        table.save()
    except DataError as error:
        fit.say(f"{error} A server will measure its own.")
    return {"points": len(table.points), "plain_ms": table.off_ms(1), "draft_ms": table.draft_ms(1)}


def evaluate_pair(fit: Fit) -> dict[str, Any]:
    """Stage `evaluation`: accepted length and speed-up on held-out prompts."""
    costs = CostTable.load(fit.path(COSTS))
    model, plan = pair(fit, costs), fit.plan
    records = list(read_json_lines(fit.path(PROMPTS, HELD_OUT)))
    held = [HeldOutPrompt(as_prompt(r, where), str(r["category"])) for where, r in records]
    count = _measurable(fit, costs, len(held))
    reports = {
        f"t{temperature:g}": _measured(fit, model, temperature, count, place)
        for place, temperature in enumerate(TEMPERATURES)
    }
    laps = race(
        model,
        held,
        fit.path(f"{LAPS}.jsonl"),
        temperatures=TEMPERATURES,
        max_new_tokens=plan.evaluation_tokens,
        least=min(2, len(held)),
        is_over=lambda: fit.left_s() <= 0.01 * plan.budget_s,
        progress=lambda done, total: fit.progress(2 + done / total, 3),
    )
    return {
        "domains": domain_rows(reports, laps),
        "ece": calibration_error(reports),
        "limits": limits_of(costs, reports, plan.shape.block_size),
        "heldout": count,
        "raced": len({lap.prompt for lap in laps}),
    }


def _measurable(fit: Fit, costs: CostTable, available: int) -> int:
    """Number of held-out prompts that fit into half of the remaining time, in a batch."""
    at_once = fit.plan.profile_requests
    rows = min(at_once * (fit.plan.shape.block_size + 1), costs.most_tokens(at_once))
    round_s = (costs.verify_ms(rows, at_once) + costs.draft_ms(at_once)) / 1000 / at_once
    rounds = fit.plan.evaluation_tokens / expected_length(fit.plan.shape.block_size)
    prompt_s = len(TEMPERATURES) * rounds * round_s
    wanted = int(0.5 * max(fit.left_s(), 0.0) / prompt_s)
    return min(max(wanted, FEWEST_HELD_OUT), available)


def _measured(fit: Fit, model: Model, temperature: float, count: int, place: int) -> dict[str, Any]:
    """Accepted length of whole blocks at a temperature, measured as in `dspark eval`."""
    tasks = load_file(fit.path(PROMPTS, HELD_OUT))
    share = -(-count // len(tasks))
    tasks = [replace(t, questions=t.questions[:share]).with_turns(1) for t in tasks]
    total, done = sum(len(task.questions) for task in tasks), 0

    def tell(*_: object) -> None:
        nonlocal done
        done += 1
        fit.progress(place + done / total, 3)

    settings = settings_of(
        model,
        fit.options.target,
        "fit",
        fit.served_as,
        temperature=temperature,
        top_p=1.0,
        top_k=0,
        max_new_tokens=fit.plan.evaluation_tokens,
        seed=fit.options.seed,
        verifier=VERIFIER,
        schedule="fixed",
        threshold=None,
        block_size=None,
        batch_size=fit.plan.profile_requests,
        thinking=False,
        raw=False,
        turns=1,
    )
    command = f"dspark fit {fit.options.target}"
    return run_report(evaluate(model, settings, tasks, fit.path("evaluation"), command, tell))


def attach(fit: Fit, directory: Path | None) -> dict[str, Any]:
    """Stage `attach`: copy the drafter and its calibration into the target's directory.

    Args:
        fit: the run.
        directory: of the target; None leaves the drafter in the run's folder.
    """
    if directory is None:
        return {"attached": None}
    save_attached(_bound(fit, load_drafter(fit.path(ATTACHED_FOLDER))), directory)
    calibration = fit.path(ATTACHED_FOLDER, FILE_NAME)
    if calibration.is_file():
        Calibration.load(calibration).save(directory / ATTACHED_FOLDER / FILE_NAME)
    return {"attached": str(directory / ATTACHED_FOLDER)}
