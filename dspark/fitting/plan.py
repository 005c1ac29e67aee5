"""The plan of a fit: sizes and seconds of every stage, from the budget and measured speeds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dspark.errors import UsageError
from dspark.fitting.measure import Speeds
from dspark.fitting.progress import budget_text, duration
from dspark.fitting.recipe import BLOCK_SIZE, Shape
from dspark.fitting.workload import (
    FEWEST_HELD_OUT,
    FEWEST_ROWS,
    LITTLE_PROFILE_ROWS,
    PROMPT_TOKENS,
    ROWS,
    Work,
    generation_share,
    profile_size,
    prompt_counts,
    training_steps,
)

CALIBRATION_SHARE, COSTS_SHARE, EVALUATION_SHARE, SLACK_SHARE = 0.06, 0.02, 0.10, 0.02
BYTES_PER_TOKEN = 8


@dataclass(frozen=True)
class Plan:
    """The plan of a fit.

    Attributes:
        budget_s: total seconds.
        seconds: by stage.
        shape: of the drafter.
        answers: prompts answered for training.
        calibration, heldout: prompts for calibration and for evaluation.
        answer_tokens: token limit of an answer.
        evaluation_tokens: token limit of an answer in the evaluation.
        rows, anchors, steps: of the training; anchors per row at most.
        cached: whether features are computed once and kept on disk.
        profile_requests, profile_repeats: of the cost table.
        memory_bytes, disk_bytes: requirements.
        speeds: the measurements behind the plan.
    """

    budget_s: float
    seconds: Mapping[str, float]
    shape: Shape
    answers: int
    calibration: int
    heldout: int
    answer_tokens: int
    evaluation_tokens: int
    rows: int
    anchors: int
    steps: int
    cached: bool
    profile_requests: int
    profile_repeats: int
    memory_bytes: int
    disk_bytes: int
    speeds: Speeds

    @property
    def prompts(self) -> int:
        """All prompts."""
        return self.answers + self.calibration + self.heldout

    @property
    def step_s(self) -> float:
        """Seconds of a training step of a full batch."""
        return self.training_speeds.whole_step_s(self.rows, self.anchors)

    @property
    def training_speeds(self) -> Speeds:
        """The speeds of training steps, from cached features or not."""
        return self.speeds.from_cache if self.cached else self.speeds

    @property
    def after_training_s(self) -> float:
        """Seconds of all stages after training."""
        return sum(self.seconds[name] for name in ("calibration", "costs", "evaluation", "attach"))

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Plan:
        """The plan from `asdict`."""
        values = dict(record)
        shape, speeds = Shape.of(values.pop("shape")), Speeds(**values.pop("speeds"))
        return cls(shape=shape, speeds=speeds, **values)


def answer_limit(budget_s: float, max_context: int) -> int:
    """Token limit of an answer, shorter for small budgets."""
    wanted = 256 if budget_s >= 600 else 128 if budget_s >= 120 else 64
    return max(min(wanted, max_context // 2), BLOCK_SIZE + 1)


def make_plan(
    budget_s: float,
    spent_s: float,
    shape: Shape,
    speeds: Speeds,
    *,
    answer_tokens: int,
    writes_prompts: bool,
    available: int | None = None,
    disk_bytes: float = math.inf,
) -> Plan:
    """Divide a budget.

    Args:
        budget_s: total seconds.
        spent_s: seconds already spent.
        shape: of the drafter.
        speeds: of this machine.
        answer_tokens: token limit of an answer.
        writes_prompts: whether the model writes its prompts, which takes time.
        available: number of prompts; None for any number.
        disk_bytes: that cached features may take.

    Raises:
        UsageError: the budget is too small (the message names the smallest sufficient one), or
            there are too few prompts.
    """
    work = Work(
        speeds, answer_tokens, writes_prompts, shape.block_size, whole_answers=shape.whole_answers
    )
    least = smallest_budget(spent_s, work)
    if budget_s < least:
        raise UsageError(
            f"A budget of {budget_text(budget_s)} is too small for one training step and what "
            f"belongs to it on this machine; give --budget {budget_text(least)} or more."
        )
    evaluation = max(EVALUATION_SHARE * budget_s, work.evaluation_s(FEWEST_HELD_OUT))
    costs = max(COSTS_SHARE * budget_s, LITTLE_PROFILE_ROWS * 2 / speeds.batch_tokens_per_s)
    calibration = _calibration_share(work) * budget_s
    rest = budget_s * (1 - SLACK_SHARE) - spent_s - evaluation - costs - calibration
    generation = rest * generation_share(work)
    answers, heldout, calibrated = prompt_counts(work, generation, evaluation, available)
    prompts_s = (answers + heldout + calibrated) * work.prompt_s
    answers_s = answers * work.answer_s
    training = rest - prompts_s - answers_s
    rows = min(ROWS, answers)
    features_s, anchors, steps = training_steps(work, training, rows, answers, disk_bytes)
    requests, repeats = profile_size(costs, speeds)
    return Plan(
        budget_s=budget_s,
        seconds={
            "plan": spent_s,
            "prompts": prompts_s,
            "answers": answers_s,
            "features": features_s,
            "training": training - features_s,
            "calibration": calibration,
            "costs": costs,
            "evaluation": evaluation,
            "attach": 0.0,
        },
        shape=shape,
        answers=answers,
        calibration=calibrated,
        heldout=heldout,
        answer_tokens=answer_tokens,
        evaluation_tokens=work.evaluation_tokens,
        rows=rows,
        anchors=anchors,
        steps=steps,
        cached=features_s > 0,
        profile_requests=requests,
        profile_repeats=repeats,
        memory_bytes=speeds.memory_bytes,
        disk_bytes=_disk_bytes(work, answers, cached=features_s > 0),
        speeds=speeds,
    )


def smallest_budget(spent_s: float, work: Work) -> float:
    """Least seconds of a fit: one training step and the minimum of every other stage.

    Args:
        spent_s: as `make_plan`.
        work: what the units of it take.
    """
    prompts = FEWEST_ROWS + 2 * FEWEST_HELD_OUT
    needed = (
        spent_s
        + prompts * work.prompt_s
        + FEWEST_ROWS * work.answer_s
        + work.speeds.whole_step_s(FEWEST_ROWS, work.fewest_anchors)
        + LITTLE_PROFILE_ROWS * 2 / work.speeds.batch_tokens_per_s
        + work.evaluation_s(FEWEST_HELD_OUT)
    )
    return needed / (1 - SLACK_SHARE - _calibration_share(work))


def _disk_bytes(work: Work, answers: int, *, cached: bool) -> int:
    speeds = work.speeds
    features = answers * speeds.feature_bytes if cached else 0
    texts = BYTES_PER_TOKEN * answers * (work.answer_tokens + 2 * PROMPT_TOKENS)
    return speeds.checkpoint_bytes + 2 * speeds.parameters + features + texts


def _calibration_share(work: Work) -> float:
    return 0.0 if work.whole_answers else CALIBRATION_SHARE


def plan_rows(plan: Plan) -> list[tuple[str, str, str]]:
    """The plan as rows of (stage, description, duration)."""
    shape, speeds = plan.shape, plan.speeds
    knows = "the whole vocabulary"
    if shape.draft_vocabulary is not None:
        knows = f"about {shape.draft_vocabulary:,} tokens, chosen by the answers"
    layers = f"{shape.layers} layer{'s' if shape.layers > 1 else ''}"
    kind = f"DSpark, {layers}, blocks of {shape.block_size}, rank {shape.rank}"
    anchors = f"up to {plan.anchors} anchors"
    if shape.whole_answers:
        kind, anchors = "Eagle3, one draft a round", f"about {plan.anchors} anchors"
    calibrate = f"{plan.calibration} to calibrate, " if plan.calibration else ""
    what = {
        "plan": f"measured: {speeds.batch_tokens_per_s:,.0f} tokens/s of {speeds.batch_size} "
        f"requests, {speeds.single_tokens_per_s:,.0f} of one; about "
        f"{plan.step_s:.3g} s a training step",
        "prompts": f"{plan.answers:,} to train, {calibrate}{plan.heldout} held out",
        "answers": f"{plan.answers:,} of up to {plan.answer_tokens} tokens",
        "features": "the target's states of the answers, kept on disk",
        "training": f"{kind}, taps {', '.join(map(str, shape.taps))}, {knows}; {plan.steps:,} "
        f"steps of {plan.rows} rows with {anchors}, rate {shape.learning_rate:g}",
        "calibration": "of the confidences, at temperature 0 and above",
        "costs": f"of steps with up to {plan.profile_requests} requests, "
        f"{plan.profile_repeats} rounds a point",
        "evaluation": f"{plan.heldout} prompts, answers of up to {plan.evaluation_tokens} tokens, "
        "at temperature 0 and 1",
    }
    if not plan.cached:
        del what["features"]
    if not plan.calibration:
        del what["calibration"]
    return [(name, text, duration(plan.seconds[name])) for name, text in what.items()]
