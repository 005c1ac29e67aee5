"""Stages of a fit that prepare its data, prompts and answers; and the context of all stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspark.data.answers.engine_backend import EngineResponder
from dspark.data.answers.regenerate import regenerate
from dspark.data.answers.sampling import choose_sampling, recommended_sampling
from dspark.data.files.json_lines import read_json_lines, write_json_lines
from dspark.data.prompts.self_prompting import SelfPrompts, write_self_prompts
from dspark.data.samples import Sample, read_samples, usable
from dspark.engine.model import Model
from dspark.fitting.evaluation import fits
from dspark.fitting.plan import Plan
from dspark.fitting.progress import budget_text
from dspark.fitting.prompts import TRAIN, Collected, collect, self_written, split
from dspark.fitting.recipe import FEWEST_SUPERVISED, choose_vocabulary
from dspark.fitting.workload import FEWEST_ROWS

PROMPTS, ANSWERS = "prompts", "answers"
CHUNKS = (0.25, 0.7, 1.0)
"""Shares of the answers that fit into the remaining time; the first files measure the speed."""


@dataclass(frozen=True)
class FitOptions:
    """Options of a fit.

    Attributes:
        target: a directory, a hub id, bundled, ...; as named by the user.
        budget_s: total seconds.
        prompts: JSON-lines files, folders of them, data sets; without any the model writes them.
        out: folder of the run, in which the drafter stays; None uses `fit-NAME` and attaches the
            drafter to a target directory that has none.
        seed: of all randomness.
        offline: read only what is on this machine.
        waited_s: seconds spent since the command was given.
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
        """Folder of the run."""
        return self.out or Path(f"fit-{Path(self.target).name or 'model'}")

    @property
    def settings(self) -> Mapping[str, Any]:
        """Settings that a resumed run must share."""
        return {
            "model": self.target,
            "budget": budget_text(self.budget_s),
            "prompts": list(self.prompts),
            "seed": self.seed,
            "out": None if self.out is None else str(self.out),
        }


@dataclass
class Fit:
    """The context of a run's stages.

    Attributes:
        options: what the user asked for.
        served_as: name that the pair will be loaded by, which identifies its cost table.
        model: the target alone.
        plan: the plan.
        progress: called with (done, in all) of the running stage; also saves the time.
        say: receives remarks for the user.
        left_s: returns the remaining seconds of the budget.
    """

    options: FitOptions
    served_as: str
    model: Model
    plan: Plan
    progress: Callable[[float, float], None]
    say: Callable[[str], None]
    left_s: Callable[[], float]

    def path(self, *names: str) -> Path:
        """A path in the run's folder."""
        return self.options.folder.joinpath(*names)


def write_prompts(fit: Fit) -> dict[str, Any]:
    """Stage `prompts`: collect or self-write prompts, and split them."""
    plan = fit.plan
    if fit.options.prompts:
        collected = collect(fit.options.prompts, seed=fit.options.seed, offline=fit.options.offline)
    else:
        collected = _self_written(fit)
    counts = split(
        collected,
        fit.path(PROMPTS),
        heldout=plan.heldout,
        calibration=plan.calibration,
        answers=plan.answers,
        fits=lambda prompt: fits(fit.model, prompt, plan.answer_tokens),
    )
    return {
        "prompts": sum(counts.values()),
        "parts": counts,
        "domains": {name: len(prompts) for name, prompts in collected.domains.items()},
        "duplicates": collected.duplicates,
        "malformed": collected.malformed,
    }


def _self_written(fit: Fit) -> Collected:
    path, plan = fit.path(PROMPTS, "written.jsonl"), fit.plan
    report = write_self_prompts(
        SelfPrompts(fit.model, fit.options.seed, plan.speeds.batch_size),
        path,
        count=plan.prompts,
        seconds=plan.seconds["prompts"],
        progress=fit.progress,
    )
    for sentence in report.sentences(fit.options.target):
        fit.say(sentence)
    return self_written(path)


def write_answers(fit: Fit) -> dict[str, Any]:
    """Stage `answers`: the model answers, file after file, while time remains.

    Each file is a separate, resumable run of `regenerate`; its number of prompts follows from the
    speed of the earlier files.
    """
    folder = fit.path(ANSWERS)
    prompts = [record for _, record in read_json_lines(fit.path(PROMPTS, TRAIN))]
    later_s = sum(fit.plan.seconds[name] for name in ("features", "training"))
    later_s += fit.plan.after_training_s
    ends = min(later_s, fit.left_s() - fit.plan.seconds["answers"])
    responder, asked, records, number = _responder(fit), 0, 0, 0
    left_before, timed = fit.left_s(), 0
    expected = fit.plan.seconds["answers"] / max(fit.plan.answers, 1)  # seconds per answer
    while asked < len(prompts):
        asking, out = folder / f"prompts-{number:03d}.jsonl", folder / f"{number:03d}.jsonl"
        if not asking.is_file():
            per_answer = (left_before - fit.left_s()) / timed if timed else expected
            share = CHUNKS[min(number, len(CHUNKS) - 1)]
            size = int(share * max(fit.left_s() - ends, 0.0) / per_answer)
            # A partial batch takes nearly as long as a full one.
            whole = -(-size // responder.batch_size) * responder.batch_size
            size = min(max(whole, FEWEST_ROWS - asked), len(prompts) - asked)
            if size <= 0:
                break
            with write_json_lines(asking) as write:
                for record in prompts[asked : asked + size]:
                    write(record)
        size = sum(1 for _ in read_json_lines(asking))
        if not out.is_file():
            tell = _counted(fit, asked, len(prompts))
            report = regenerate(responder, asking, out, progress=tell)
            timed += size - report.resumed
        found = [record for _, record in read_json_lines(out)]
        records += len(found)
        asked, number = asked + size, number + 1
    samples = samples_of(fit)
    answers = [_answer_ids(sample) for sample in samples]
    known, share = choose_vocabulary(answers, fit.model.target.vocab_size)
    if known is not None:
        fit.say(
            f"The drafter knows {known:,} of {fit.model.target.vocab_size:,} tokens, the answers' "
            f"most frequent: {100 * share:.1f} % of answers that were not looked at."
        )
    return {
        "answers": records,
        "asked": asked,
        "usable": len(samples),
        "tokens": sum(map(len, answers)),
        "draft_vocabulary": known,
        "coverage": share,
    }


def _counted(fit: Fit, before: int, total: int) -> Callable[[int, int], None]:
    return lambda done, _: fit.progress(before + done, total)


def _answer_ids(sample: Sample) -> list[int]:
    return [i for i, own in zip(sample.input_ids, sample.loss_mask, strict=True) if own]


def _responder(fit: Fit) -> EngineResponder:
    source = fit.model.target.name
    sampling = choose_sampling({}, recommended_sampling(source, offline=fit.options.offline))
    params = sampling.params(fit.plan.answer_tokens, fit.options.seed)
    return EngineResponder(fit.model, params, batch_size=fit.plan.speeds.batch_size)


def answer_files(fit: Fit) -> list[Path]:
    """The files of answers so far."""
    return sorted(p for p in fit.path(ANSWERS).glob("[0-9]*.jsonl") if p.stem.isdigit())


def max_length(fit: Fit) -> int:
    """Tokens of a sample at most."""
    return min(4 * fit.plan.answer_tokens, fit.model.target.max_context)


def samples_of(fit: Fit) -> list[Sample]:
    """The samples of the answers that can be trained on."""
    tokenizer = fit.model.target.tokenizer
    found = [s for path in answer_files(fit) for s in read_samples(path, tokenizer)]
    return usable(found, max_length(fit), FEWEST_SUPERVISED)
