"""Runs of a fit: every stage in order, each once, under one lock."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from dspark.data.files.atomic import only_run
from dspark.data.prompts.self_prompting import opening_of
from dspark.drafters.checkpoints.checkpoint import has_attached_drafter
from dspark.engine.model import Model
from dspark.errors import TrainingError, UsageError
from dspark.fitting import answers, stages, training
from dspark.fitting.answers import FitOptions
from dspark.fitting.evaluation import OVERALL, serving_commands
from dspark.fitting.measure import Speeds, generation_speeds, training_speeds
from dspark.fitting.plan import Plan, answer_limit, make_plan
from dspark.fitting.progress import STAGES, State, Watcher
from dspark.fitting.prompts import collect
from dspark.fitting.recipe import choose_block_size, choose_shape, training_dtype
from dspark.fitting.workload import PROMPT_TOKENS, anchors_per_s

BATCH_SIZES = {"cpu": 16, "cuda": 64}
SMALL_BUDGET_S, SMALL_BATCH = 120.0, 4
TRAINING_SHARE = 0.5
"""Assumed share of the budget for training, to choose the drafter's shape by."""
FEATURES_SHARE = 0.5
"""Of the free disk, for cached features at most."""


def fit(options: FitOptions, load: Callable[[], Model], watcher: Watcher) -> dict[str, Any]:
    """Train a drafter for a model and prepare it for serving, or resume that.

    Args:
        options: of the fit.
        load: loads the target, without a drafter.
        watcher: receives progress.

    Returns:
        The JSON object of `dspark fit`.

    Raises:
        UsageError: the budget is too small, another run holds the folder, or the folder holds a
            run with other options.
        DSparkError: as the stages; finished stages are kept, and the same call resumes.
    """
    with only_run(options.folder):
        return _Run(options, load, watcher).go()


def dry_run(options: FitOptions, load: Callable[[], Model], say: Callable[[str], object]) -> Plan:
    """The plan of a fit, without starting or writing anything.

    Raises: as `fit`.
    """
    state = State(Path(os.devnull), {}, options.waited_s)
    return _plan(options, load(), state, say)


def _plan(options: FitOptions, model: Model, state: State, say: Callable[[str], object]) -> Plan:
    """Measure the machine and divide the budget."""
    target = model.target
    training_dtype(target)  # raises if it cannot be trained
    available = None
    if options.prompts:
        available = collect(options.prompts, seed=options.seed, offline=options.offline).count
    else:
        opening_of(target)  # raises if the model cannot write prompts
    shape = choose_shape(target, TRAINING_SHARE * options.budget_s)
    tokens = answer_limit(options.budget_s, target.max_context)
    say("Measuring how fast this machine generates and trains ...")
    batch = BATCH_SIZES.get(target.device.type, BATCH_SIZES["cpu"])
    if options.budget_s <= SMALL_BUDGET_S:
        batch = SMALL_BATCH
    trial = {"row_tokens": min(PROMPT_TOKENS + tokens, target.max_context), "seed": options.seed}
    speeds = Speeds(
        **generation_speeds(model, batch_size=batch, seed=options.seed),
        **training_speeds(model, shape, **trial),
    )
    block_size = choose_block_size(TRAINING_SHARE * options.budget_s * anchors_per_s(speeds))
    if block_size != shape.block_size:
        shape = choose_shape(target, TRAINING_SHARE * options.budget_s, block_size)
        speeds = replace(speeds, **training_speeds(model, shape, **trial))
    folder = next(p for p in (options.folder, *options.folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(folder).free
    plan = make_plan(
        options.budget_s,
        state.elapsed_s,
        shape,
        speeds,
        answer_tokens=tokens,
        writes_prompts=not options.prompts,
        available=available,
        disk_bytes=FEATURES_SHARE * free,
    )
    if plan.disk_bytes > free:
        raise UsageError(
            f"A run needs {plan.disk_bytes / 1e9:.2g} GB of disk, but {folder} has "
            f"{free / 1e9:.2g} GB free; make room, or name another --out."
        )
    return plan


class _Run:
    """One start of a fit."""

    def __init__(self, options: FitOptions, load: Callable[[], Model], watcher: Watcher) -> None:
        self.options, self.watcher = options, watcher
        self.state = State(options.folder, options.settings, options.waited_s)
        self._load = load
        self._skipped = {name for name in STAGES if self.state.is_done(name)}
        self._model: Model | None = None

    def go(self) -> dict[str, Any]:
        """Run every unfinished stage."""
        plan = Plan.of(self._stage("plan", self._planned)["plan"])
        attach_to = self.state.result("plan")["attach_to"]
        at = None if attach_to is None else Path(attach_to)
        tasks: dict[str, Callable[[answers.Fit], dict[str, Any]]] = {
            "prompts": answers.write_prompts,
            "answers": answers.write_answers,
            "features": lambda fit: training.write_features(fit, self.state.result("answers")),
            "training": self._trained,
            "calibration": stages.calibrate_pair,
            "costs": stages.measure_costs,
            "evaluation": stages.evaluate_pair,
            "attach": lambda fit: stages.attach(fit, at),
        }
        for name, act in tasks.items():
            self._stage(name, partial(self._act, act, plan, at), plan.seconds[name])
        return self._report(plan, at)

    def _act(
        self, act: Callable[[answers.Fit], dict[str, Any]], plan: Plan, attach_to: Path | None
    ) -> dict[str, Any]:
        return act(self._fit(plan, attach_to))

    def _stage(
        self, name: str, act: Callable[[], dict[str, Any]], planned_s: float | None = None
    ) -> dict[str, Any]:
        if self.state.is_done(name):
            self.watcher.end(name, self.state.seconds(name), skipped=True)
            return self.state.result(name)
        self.watcher.begin(name, planned_s)
        self.state.begin(name)
        self.state.end(act())
        self.watcher.end(name, self.state.seconds(name), skipped=False)
        return self.state.result(name)

    def _planned(self) -> dict[str, Any]:
        plan = _plan(self.options, self._loaded(), self.state, self.watcher.say)
        return {"plan": asdict(plan), "attach_to": _attach_to(self.options)}

    def _trained(self, fit: answers.Fit) -> dict[str, Any]:
        try:
            return training.train(fit, self.state.result("answers"))
        except TrainingError as error:  # its remedy is for `dspark train`
            raise TrainingError(str(error).replace("--resume", "the same command")) from error

    def _loaded(self) -> Model:
        if self._model is None:
            self._model = self._load()
        return self._model

    def _fit(self, plan: Plan, attach_to: Path | None) -> answers.Fit:
        options = self.options
        return answers.Fit(
            options,
            served_as=options.target if attach_to is not None else str(options.folder),
            model=self._loaded(),
            plan=plan,
            progress=self._advance,
            say=self.watcher.say,
            left_s=self._left_s,
        )

    def _left_s(self) -> float:
        return self.options.budget_s - self.state.elapsed_s

    def _advance(self, done: float, total: float) -> None:
        self.state.beat()
        self.watcher.advance(done, total, max(self._left_s(), 0.0))

    def _report(self, plan: Plan, attach_to: Path | None) -> dict[str, Any]:
        results = {name: self.state.result(name) for name in STAGES}
        evaluation = results["evaluation"]
        overall = evaluation["domains"][OVERALL]
        keys = ("t0", "t1")
        return {
            "stages": [
                {
                    "name": name,
                    "seconds": self.state.seconds(name),
                    "skipped": name in self._skipped,
                }
                for name in STAGES
            ],
            "prompts": results["prompts"]["prompts"],
            "answers": results["answers"]["answers"],
            "anchors": results["training"]["anchors"],
            "accepted_length": {key: overall[key]["accepted_length"] for key in keys},
            "speedup": {key: overall[key]["speedup"] for key in keys},
            "ece": evaluation["ece"],
            "output_dir": str(self.options.folder),
            "attached": results["attach"]["attached"],
            "budget_s": self.options.budget_s,
            "seconds": self.state.elapsed_s,
            "plan": asdict(plan),
            "training": results["training"],
            "vocabulary": {
                name: results["answers"][name] for name in ("draft_vocabulary", "coverage")
            },
            "calibration": results["calibration"]["calibration"],
            "domains": evaluation["domains"],
            "heldout": evaluation["heldout"],
            "limits": evaluation["limits"],
            "commands": serving_commands(
                self.options.target,
                str(self.options.folder),
                plan.shape,
                attached=attach_to is not None,
                reduced=results["answers"]["draft_vocabulary"] is not None,
            ),
        }


def _attach_to(options: FitOptions) -> str | None:
    """The target's directory, if it is writable and has no drafter."""
    directory = Path(options.target)
    if options.out is not None or not directory.is_dir() or not os.access(directory, os.W_OK):
        return None
    return None if has_attached_drafter(directory) else str(directory)
