"""Runs: from the name of a recipe to a trained model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from torch import nn
from torch._dynamo.exc import TorchDynamoException

from dspark.data.conversations import read_prompts
from dspark.data.files.atomic import only_run
from dspark.errors import RecipeError, first_line
from dspark.targets.target import Target
from dspark.training.budget import PROBED_FROM, Budget, budget_of, probe, refuse_small_disk
from dspark.training.checkpoints import BEST, put_in_place
from dspark.training.drafters.new_drafter import load_frozen_target
from dspark.training.drafters.objectives import (
    Decode,
    DrafterObjective,
    Eagle3Objective,
    Encode,
    HeldOut,
    export,
    prompts_of,
    requests_of,
)
from dspark.training.drafters.warm_start import start_from
from dspark.training.language_model import LanguageModelObjective, prepare_tokenizer
from dspark.training.loop import Training
from dspark.training.losses.chunked import suitable_rows
from dspark.training.objective import DataOrder, Evaluation, TrainingResult
from dspark.training.parallel import World, barrier, pick_device, start_parallel, wants_sharding
from dspark.training.progress import Pace
from dspark.training.recipe import (
    BlockRecipe,
    ChainRecipe,
    DrafterRecipe,
    Eagle3Recipe,
    MTPRecipe,
    Recipe,
    TargetRecipe,
    load_recipe,
)

AnyObjective = DrafterObjective | Eagle3Objective


@dataclass(frozen=True)
class Judge:
    """Functions that measure a drafter's real accepted length.

    Attributes:
        decode: decodes requests with a drafter and returns counts.
        encode: encodes prompts.
    """

    decode: Decode
    encode: Encode


@dataclass(frozen=True)
class _Prepared:
    """A prepared run."""

    training: Training
    evaluation: Evaluation | None
    budget: Callable[[bool], Budget]  # (whether to probe whatever the number of steps)
    say: Callable[[str], None]


def run_recipe(
    name: str,
    overrides: Sequence[str] = (),
    *,
    resume: bool = False,
    device: str = "auto",
    console: Console | None = None,
    judge: Judge | None = None,
    target: Target | None = None,
    pace: Pace | None = None,
) -> TrainingResult:
    """Train what a recipe describes.

    Under torchrun, processes share the rows of a step.

    Args:
        name: a YAML file or the name of a bundled recipe.
        overrides: `key.subkey=value` strings.
        resume: continue from the last checkpoint in the output directory, if there is one.
        device: overrides the recipe's device unless `auto`.
        console: of the budget and the progress bar; standard error by default.
        judge: measures real accepted lengths, for recipes that require them.
        target: of a drafter recipe, if already in memory; with its layers.
        pace: adjusts the number of steps to a time budget.

    Raises:
        RecipeError: the recipe cannot be used.
        UsageError: another run writes to the same output_dir.
        DataError, CheckpointError, CompatibilityError: as its parts raise.
        TrainingError: the run cannot go on.
    """
    console = console or Console(stderr=True)
    recipe = load_recipe(name, overrides)
    prepared = _prepare(recipe, device, console, judge, target)
    training = prepared.training
    with only_run(training.output) if training.world.rank == 0 else nullcontext():
        training.start(resume)
        budget = prepared.budget(False)
        prepared.say(budget.line())
        refuse_small_disk(budget, training.output)
        return training.go(console=console, evaluation=prepared.evaluation, pace=pace)


def plan_recipe(
    name: str,
    overrides: Sequence[str] = (),
    *,
    device: str = "auto",
    console: Console | None = None,
    judge: Judge | None = None,
    target: Target | None = None,
) -> Budget:
    """Prepare a run as `run_recipe` does and report its cost without starting it.

    Args, Raises: as `run_recipe`.
    """
    console = console or Console(stderr=True)
    prepared = _prepare(load_recipe(name, overrides), device, console, judge, target)
    budget = prepared.budget(True)
    prepared.say(budget.line())
    return budget


def _prepare(
    recipe: Recipe, device: str, console: Console, judge: Judge | None, target: Target | None = None
) -> _Prepared:
    run = recipe.run
    place = pick_device(run.device if device == "auto" else device)
    rank, ranks = start_parallel(place)
    world = World(rank, ranks, wants_sharding(run.parallel, place, ranks))

    def say(line: str) -> None:
        if rank == 0:
            console.print(Text(line), soft_wrap=True)

    _check_division(recipe, ranks)
    if isinstance(recipe, TargetRecipe):
        if rank == 0:
            prepare_tokenizer(recipe)  # read by the other ranks
        barrier()
        model = LanguageModelObjective(recipe, place)
        order = _stream_order(recipe, model)
        training = Training(model, run, recipe.optimiser, order, world)
        return _Prepared(training, None, partial(_budget, training, None), say)
    objective = _drafter_objective(recipe, place, target)
    if recipe.initial is not None:
        new = start_from(objective.drafter, recipe.initial)
        say(f"Starts from the weights of {recipe.initial}; new are {', '.join(new) or 'none'}.")
    if run.compile:
        compile_forward(objective.drafter, say)
    evaluation = _evaluation(recipe, objective, world, judge)
    order = _sample_order(recipe, objective)
    training = Training(objective, run, recipe.optimiser, order, world)
    return _Prepared(training, evaluation, partial(_budget, training, objective), say)


def _check_division(recipe: Recipe, ranks: int) -> None:
    parts = ranks * recipe.run.accumulate
    if recipe.run.rows % parts:
        raise RecipeError(
            f"run.rows is {recipe.run.rows}, but must be a multiple of the {parts} parts that a "
            f"step has ({ranks} processes, run.accumulate {recipe.run.accumulate})."
        )


def _drafter_objective(
    recipe: BlockRecipe | ChainRecipe, device: str, target: Target | None
) -> AnyObjective:
    target = target or load_frozen_target(recipe, device, recipe.run.dtype)
    if isinstance(recipe, Eagle3Recipe | MTPRecipe):
        return Eagle3Objective(recipe, target)
    return DrafterObjective(recipe, target)


def _stream_order(recipe: TargetRecipe, objective: LanguageModelObjective) -> DataOrder:
    run = recipe.run

    def names(step: int, part: int, parts: int) -> str:
        share = run.rows // parts
        first = step * run.rows + part * share
        return f"rows {first} to {first + share - 1} of the token stream"

    per_epoch = objective.stream.rows_per_epoch / run.rows
    return DataOrder(per_epoch, run.rows * run.row_tokens, names)


def _sample_order(recipe: DrafterRecipe, objective: AnyObjective) -> DataOrder:
    stream, rows = objective.samples.stream, recipe.run.rows

    def names(step: int, part: int, parts: int) -> str:
        share = rows // parts
        mine = stream.indices(step)[part * share : (part + 1) * share]
        return f"samples {', '.join(map(str, mine))}, counted from 0 among the usable ones"

    tokens = sum(len(sample.input_ids) for sample in stream.samples) / len(stream.samples)
    return DataOrder(stream.batches_per_epoch, tokens * rows, names)


def _evaluation(
    recipe: DrafterRecipe, objective: AnyObjective, world: World, judge: Judge | None
) -> Evaluation | None:
    settings, every, samples = recipe.evaluation, recipe.run.evaluate_every, objective.samples
    if settings is None or every is None:
        return None
    if judge is None:
        raise RecipeError(
            "run.evaluate_every is set, but nothing was given to measure with; start the run by "
            "dspark train, or hand run_recipe a judge."
        )
    if settings.prompts is None:
        prompts: Sequence[Sequence[int]] = prompts_of(samples.held_out)
    else:
        prompts = judge.encode(samples.target, read_prompts(settings.prompts, settings.limit))
    held_out = HeldOut(
        target=samples.target,
        drafter=objective.drafter,
        requests=requests_of(prompts, settings),
        temperatures=settings.temperatures,
        decode=judge.decode,
        rank=world.rank,
        ranks=world.ranks,
    )
    beside = recipe.model_copy(update={"layout": "published"})

    def keep() -> None:
        best = Path(recipe.run.output_dir) / BEST
        fresh = best.with_name(f"{best.name}.new")
        export(objective.drafter, beside, fresh)
        put_in_place(fresh, best)

    return Evaluation(every, held_out.measure, keep)


def _budget(training: Training, objective: AnyObjective | None, always: bool) -> Budget:
    done = training.position.step
    features = vocabulary = 0
    if objective is not None:
        target = objective.samples.target
        parts = training.world.ranks * training.run.accumulate
        width = (len(objective.drafter.taps) + 1) * target.hidden_size
        features = round(training.data.tokens_per_step / parts * width * target.dtype.itemsize)
        rows = suitable_rows(target.device, target.vocab_size)
        vocabulary = 3 * rows * target.vocab_size * 4  # both distributions and the gradient
    due = always or training.steps - done >= PROBED_FROM
    return budget_of(
        training,
        features_bytes=features,
        vocabulary_bytes=vocabulary,
        probed=probe(training, done) if due and done < training.steps else None,
        steps_done=done,
    )


def compile_forward(module: nn.Module, say: Callable[[str], None]) -> None:
    """Compile a module's forward, falling back to the uncompiled one if that fails.

    Args:
        module: changed in place; its other methods stay uncompiled.
        say: called once with the reason of a fallback.
    """
    plain = module.forward
    chosen: list[Callable[..., Any]] = [torch.compile(plain, dynamic=True)]

    def forward(*args: Any, **kwargs: Any) -> Any:
        try:
            return chosen[0](*args, **kwargs)
        except TorchDynamoException as error:
            if chosen[0] is plain:
                raise
            chosen[0] = plain
            reason = first_line(error)
            say(f"run.compile is true, but torch.compile failed ({reason}); training runs plainly.")
            return plain(*args, **kwargs)

    module.forward = forward
