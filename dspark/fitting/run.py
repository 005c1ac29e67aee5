"""Runs of a fit: every stage in order, each once, under one lock."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dspark.data.files.atomic import only_run
from dspark.data.prompts.self_prompting import opening_of
from dspark.drafters.checkpoint import has_attached_drafter
from dspark.engine.model import Model
from dspark.errors import TrainingError, UsageError
from dspark.fitting import stages
from dspark.fitting.evaluation import OVERALL, serving_commands
from dspark.fitting.measure import measure
from dspark.fitting.plan import (
    PROMPT_TOKENS,
    Plan,
    answer_limit,
    make_plan,
)
from dspark.fitting.progress import STAGES, State, Watcher, budget_text
from dspark.fitting.prompts import collect
from dspark.fitting.recipe import BLOCK_SIZE, choose_shape, training_dtype

BATCH_SIZES = {"cpu": 16, "cuda": 64}
SMALL_BUDGET_S, SMALL_BATCH = 120.0, 4
TRAINING_SHARE = 0.5
"""Of the budget, about: what a drafter's shape is chosen for before anything is measured."""


@dataclass(frozen=True)
class Wish:
    """What a fit is asked.

    Attributes:
        target: a directory, a hub id, bundled, ...; as the user names it.
        budget_s: seconds in all.
        prompts: JSON-lines files, folders of them, data sets; none lets the model write them.
        out: folder of the run, in which the drafter then stays; None takes `fit-NAME`, and attaches
            the drafter to a target that is a directory without one.
        seed: names all randomness.
        offline: read what is on this machine only.
        waited_s: seconds that have gone by since the command was given.
    """

    target: str
    budget_s: float
    prompts: tuple[str, ...] = ()
    out: Path | None = None
    seed: int = 0
    offline: bool = False
    waited_s: float = 0.0

    @property
    def folder(self) -> Path:
        """Where the run lies."""
        return self.out or Path(f"fit-{Path(self.target).name or 'model'}")

    @property
    def settings(self) -> Mapping[str, Any]:
        """What a run that is gone on with must have been asked too."""
        return {
            "model": self.target,
            "budget": budget_text(self.budget_s),
            "prompts": list(self.prompts),
            "seed": self.seed,
            "out": None if self.out is None else str(self.out),
        }


def fit(wish: Wish, load: Callable[[], Model], watcher: Watcher) -> dict[str, Any]:
    """Make a drafter for a model, or go on with making it.

    Args:
        wish: what is asked.
        load: loads the target, without a drafter.
        watcher: is told what goes on.

    Returns:
        The JSON object of `dspark fit`.

    Raises:
        UsageError: the budget is too small, another run holds the folder, or the folder holds a
            run that was asked something else.
        DSparkError: as the stages; what was finished before is kept, and the same call goes on.
    """
    with only_run(wish.folder):
        return _Run(wish, load, watcher).go()


def dry_run(wish: Wish, load: Callable[[], Model], watcher: Watcher) -> Plan:
    """The plan of a fit; nothing is started and nothing written.

    Raises: as `fit`.
    """
    state = State(Path(os.devnull), {}, wish.waited_s)
    return _plan(wish, load(), state, watcher)


def _plan(wish: Wish, model: Model, state: State, watcher: Watcher) -> Plan:
    """Measure the machine and split the budget."""
    target = model.target
    training_dtype(target)  # refuses what cannot be trained
    available = None
    if wish.prompts:
        available = collect(wish.prompts, seed=wish.seed, offline=wish.offline).count
    else:
        opening_of(target)  # refuses a model that cannot write prompts
    shape = choose_shape(target, TRAINING_SHARE * wish.budget_s)
    tokens = answer_limit(wish.budget_s, target.max_context)
    watcher.say("Measuring how fast this machine generates and trains ...")
    batch = BATCH_SIZES.get(target.device.type, BATCH_SIZES["cpu"])
    speeds = measure(
        model,
        shape,
        batch_size=SMALL_BATCH if wish.budget_s <= SMALL_BUDGET_S else batch,
        row_tokens=min(PROMPT_TOKENS + tokens, target.max_context),
        seed=wish.seed,
    )
    plan = make_plan(
        wish.budget_s,
        state.elapsed_s,
        shape,
        speeds,
        answer_tokens=tokens,
        writes_prompts=not wish.prompts,
        available=available,
    )
    folder = next(p for p in (wish.folder, *wish.folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(folder).free
    if plan.disk_bytes > free:
        raise UsageError(
            f"A run needs {plan.disk_bytes / 1e9:.2g} GB of disk, but {folder} has "
            f"{free / 1e9:.2g} GB free; make room, or name another --out."
        )
    return plan


class _Run:
    """One sitting."""

    def __init__(self, wish: Wish, load: Callable[[], Model], watcher: Watcher) -> None:
        self.wish, self.watcher = wish, watcher
        self.state = State(wish.folder, wish.settings, wish.waited_s)
        self._load = load
        self._skipped = {name for name in STAGES if self.state.is_done(name)}
        self._model: Model | None = None

    def go(self) -> dict[str, Any]:
        """Every stage that is not done."""
        plan = Plan.of(self._stage("plan", self._planned)["plan"])
        attach_to = self.state.result("plan")["attach_to"]
        at = None if attach_to is None else Path(attach_to)
        tasks: dict[str, Callable[[stages.Fit], dict[str, Any]]] = {
            "prompts": stages.write_prompts,
            "answers": stages.write_answers,
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
        self, act: Callable[[stages.Fit], dict[str, Any]], plan: Plan, attach_to: Path | None
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
        plan = _plan(self.wish, self._loaded(), self.state, self.watcher)
        return {"plan": plan.as_dict(), "attach_to": _attach_to(self.wish)}

    def _trained(self, fit: stages.Fit) -> dict[str, Any]:
        try:
            return stages.train(fit, self.state.result("answers"))
        except TrainingError as error:  # which advises users of `dspark train`
            raise TrainingError(str(error).replace("--resume", "the same command")) from error

    def _loaded(self) -> Model:
        if self._model is None:
            self._model = self._load()
        return self._model

    def _fit(self, plan: Plan, attach_to: Path | None) -> stages.Fit:
        wish = self.wish
        return stages.Fit(
            target_name=wish.target,
            served_as=wish.target if attach_to is not None else str(wish.folder),
            folder=wish.folder,
            model=self._loaded(),
            sources=wish.prompts,
            seed=wish.seed,
            offline=wish.offline,
            plan=plan,
            progress=self._advance,
            say=self.watcher.say,
            left_s=self._left_s,
        )

    def _left_s(self) -> float:
        return self.wish.budget_s - self.state.elapsed_s

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
            "output_dir": str(self.wish.folder),
            "attached": results["attach"]["attached"],
            "budget_s": self.wish.budget_s,
            "seconds": self.state.elapsed_s,
            "plan": plan.as_dict(),
            "training": results["training"],
            "vocabulary": {
                name: results["answers"][name] for name in ("draft_vocabulary", "coverage")
            },
            "calibration": results["calibration"]["calibration"],
            "domains": evaluation["domains"],
            "heldout": evaluation["heldout"],
            "limits": evaluation["limits"],
            "commands": serving_commands(
                self.wish.target,
                str(self.wish.folder),
                BLOCK_SIZE,
                attached=attach_to is not None,
            ),
        }


def _attach_to(wish: Wish) -> str | None:
    """The target's directory, where the drafter may be put into it and would replace none."""
    directory = Path(wish.target)
    if wish.out is not None or not directory.is_dir() or not os.access(directory, os.W_OK):
        return None
    return None if has_attached_drafter(directory) else str(directory)
