"""The plan of a fit: sizes and seconds of every stage, from the budget and measured speeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dspark.errors import UsageError
from dspark.fitting.measure import Speeds
from dspark.fitting.progress import budget_text, duration
from dspark.fitting.recipe import BLOCK_SIZE, Shape

CALIBRATION_SHARE, COSTS_SHARE, EVALUATION_SHARE, SLACK_SHARE = 0.06, 0.02, 0.10, 0.02
PASSES = 3
"""Target number of times that each answer token is an anchor; more passes add little."""
GENERATION_SHARE = (0.15, 0.45)
"""Bounds of the share of prompts and answers in the time for prompts, answers and training."""
KEPT_SHARE, ANSWER_SHARE = 0.8, 0.7
"""Expected share of self-written prompts kept, and of an answer's token limit used."""
PROMPT_TOKENS = 48
ROUNDS = 500
"""Calibration rounds per temperature class."""
FEWEST_ROWS, ROWS = 4, 8
FEWEST_HELD_OUT, MOST_HELD_OUT, MOST_CALIBRATED = 3, 150, 64
FEWEST_STEPS = 300
"""With fewer steps, rows get fewer anchors to allow more steps."""
FEWEST_ANCHORS, MOST_ANCHORS = 8, 128
PROFILE_ROWS, LITTLE_PROFILE_ROWS = 600, 80
"""Approximate rows per repeat of a cost table for up to 8 requests, and for 1."""
BYTES_PER_TOKEN = 8
EVALUATION_TOKENS = (24, 64)


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

    Raises:
        UsageError: the budget is too small (the message names the smallest sufficient one), or
            there are too few prompts.
    """
    least = smallest_budget(spent_s, speeds, answer_tokens, writes_prompts=writes_prompts)
    if budget_s < least:
        raise UsageError(
            f"A budget of {budget_text(budget_s)} is too small for one training step and what "
            f"belongs to it on this machine; give --budget {budget_text(least)} or more."
        )
    work = _Work(speeds, answer_tokens, writes_prompts)
    evaluation = max(EVALUATION_SHARE * budget_s, work.evaluation_s(FEWEST_HELD_OUT))
    costs = max(COSTS_SHARE * budget_s, LITTLE_PROFILE_ROWS * 2 / speeds.batch_tokens_per_s)
    calibration = CALIBRATION_SHARE * budget_s
    rest = budget_s * (1 - SLACK_SHARE) - spent_s - evaluation - costs - calibration
    generation = rest * _generation_share(speeds)
    answers, heldout, calibrated = _prompt_counts(work, generation, evaluation, available)
    prompts_s = (answers + heldout + calibrated) * work.prompt_s
    answers_s = answers * work.answer_s
    training = rest - prompts_s - answers_s
    rows = min(ROWS, answers)
    anchors, steps = _steps(training, rows, speeds, answer_tokens)
    requests, repeats = _profile(costs, speeds)
    return Plan(
        budget_s=budget_s,
        seconds={
            "plan": spent_s,
            "prompts": prompts_s,
            "answers": answers_s,
            "training": training,
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
        profile_requests=requests,
        profile_repeats=repeats,
        memory_bytes=speeds.memory_bytes,
        disk_bytes=speeds.checkpoint_bytes
        + 2 * speeds.parameters
        + BYTES_PER_TOKEN * answers * (answer_tokens + 2 * PROMPT_TOKENS),
        speeds=speeds,
    )


def smallest_budget(
    spent_s: float, speeds: Speeds, answer_tokens: int, *, writes_prompts: bool
) -> float:
    """Least seconds of a fit: one training step and the minimum of every other stage.

    Args: as `make_plan`.
    """
    work = _Work(speeds, answer_tokens, writes_prompts)
    prompts = FEWEST_ROWS + 2 * FEWEST_HELD_OUT
    needed = (
        spent_s
        + prompts * work.prompt_s
        + FEWEST_ROWS * work.answer_s
        + speeds.step_s(FEWEST_ROWS, FEWEST_ANCHORS)
        + LITTLE_PROFILE_ROWS * 2 / speeds.batch_tokens_per_s
        + work.evaluation_s(FEWEST_HELD_OUT)
    )
    return needed / (1 - SLACK_SHARE - CALIBRATION_SHARE)


@dataclass(frozen=True)
class _Work:
    """Times of units of work."""

    speeds: Speeds
    answer_tokens: int
    writes_prompts: bool

    @property
    def prompt_s(self) -> float:
        """Seconds per kept prompt."""
        if not self.writes_prompts:
            return 0.0
        return PROMPT_TOKENS / KEPT_SHARE / self.speeds.batch_tokens_per_s

    @property
    def answer_s(self) -> float:
        """Seconds per answer, prefill included."""
        tokens = ANSWER_SHARE * self.answer_tokens + PROMPT_TOKENS / 4
        return tokens / self.speeds.batch_tokens_per_s

    @property
    def pair_s(self) -> float:
        """Seconds per prompt with its answer."""
        return self.prompt_s + self.answer_s

    @property
    def evaluation_tokens(self) -> int:
        """Token limit of an answer in the evaluation."""
        return _clamp(self.answer_tokens // 2, *EVALUATION_TOKENS)

    @property
    def raced_s(self) -> float:
        """Seconds per raced prompt: plainly and with the drafter, alone, at both temperatures."""
        return 4 * self.evaluation_tokens / self.speeds.single_tokens_per_s

    @property
    def measured_s(self) -> float:
        """Seconds per evaluated prompt: in a batch with whole blocks, at both temperatures."""
        return 2 * self.evaluation_tokens / 2 * self.speeds.round_s(BLOCK_SIZE)

    def evaluation_s(self, prompts: int) -> float:
        """Seconds of an evaluation in which all prompts are raced."""
        return prompts * (self.raced_s + self.measured_s)

    def held_out_in(self, seconds: float) -> int:
        """Prompts that fit into an evaluation, half of its time spent on races."""
        return int(max(0.5 * seconds / self.measured_s, seconds / (self.raced_s + self.measured_s)))


def _generation_share(speeds: Speeds) -> float:
    """The share of generation in the time of generation and training together.

    Each answer token is to be an anchor `PASSES` times: a T = PASSES g G, where training takes T at
    a anchors per second and generation G at g tokens per second.
    """
    anchors_per_s = MOST_ANCHORS / (speeds.row_s + MOST_ANCHORS * speeds.anchor_s)
    share = anchors_per_s / (anchors_per_s + PASSES * speeds.batch_tokens_per_s)
    return min(max(share, GENERATION_SHARE[0]), GENERATION_SHARE[1])


def _prompt_counts(
    work: _Work, generation_s: float, evaluation_s: float, available: int | None
) -> tuple[int, int, int]:
    """Prompts to train with, to hold out and to calibrate with, as many as the times allow.

    Of a limited number of prompts at most a tenth each is held out and calibrated with.
    """
    heldout = _clamp(work.held_out_in(evaluation_s), FEWEST_HELD_OUT, MOST_HELD_OUT)
    rounds = max(heldout, ROUNDS * 2 // work.answer_tokens)
    calibrated = _clamp(rounds, FEWEST_HELD_OUT, MOST_CALIBRATED)
    pairs = (generation_s - (heldout + calibrated) * work.prompt_s) / work.pair_s
    answers = max(int(pairs), FEWEST_ROWS)
    if available is None:
        return answers, heldout, calibrated
    least = FEWEST_ROWS + 2 * FEWEST_HELD_OUT
    if available < least:
        raise UsageError(
            f"There are {available} prompts, but {least} are needed to train, calibrate and "
            "evaluate; give more, or none, and the model writes them itself."
        )
    heldout = min(heldout, max(available // 10, FEWEST_HELD_OUT))
    calibrated = min(calibrated, max(available // 10, FEWEST_HELD_OUT))
    return min(answers, available - heldout - calibrated), heldout, calibrated


def _steps(seconds: float, rows: int, speeds: Speeds, answer_tokens: int) -> tuple[int, int]:
    """Anchors per row and steps: as many anchors as answers have, if enough steps remain.

    Fewer anchors allow more steps as long as anchors, not rows, dominate the time.
    """
    most = _clamp(int(ANSWER_SHARE * answer_tokens), FEWEST_ANCHORS, MOST_ANCHORS)
    least = _clamp(int(speeds.row_s / speeds.anchor_s), FEWEST_ANCHORS, most)
    anchors = most
    while anchors > least and seconds / speeds.step_s(rows, anchors) < FEWEST_STEPS:
        anchors = max(anchors // 2, least)
    return anchors, max(int(seconds / speeds.step_s(rows, anchors)), 1)


def _profile(seconds: float, speeds: Speeds) -> tuple[int, int]:
    """Requests and repeats of a cost table for this time, with one extra repeat to warm up."""
    for requests, rows in ((8, PROFILE_ROWS), (1, LITTLE_PROFILE_ROWS)):
        repeats = int(seconds * speeds.batch_tokens_per_s / rows) - 1
        if repeats >= 1:
            return requests, min(repeats, 5)
    return 1, 1


def _clamp(value: int, least: int, most: int) -> int:
    return min(max(value, least), most)


def plan_rows(plan: Plan) -> list[tuple[str, str, str]]:
    """The plan as rows of (stage, description, duration)."""
    shape, speeds = plan.shape, plan.speeds
    knows = "the whole vocabulary"
    if shape.draft_vocabulary is not None:
        knows = f"about {shape.draft_vocabulary:,} tokens, chosen by the answers"
    layers = f"{shape.layers} layer{'s' if shape.layers > 1 else ''}"
    what = {
        "plan": f"measured: {speeds.batch_tokens_per_s:,.0f} tokens/s of {speeds.batch_size} "
        f"requests, {speeds.single_tokens_per_s:,.0f} of one, "
        f"{speeds.step_s(plan.rows, plan.anchors):.3g} s a training step",
        "prompts": f"{plan.answers:,} to train, {plan.calibration} to calibrate, {plan.heldout} "
        "held out",
        "answers": f"{plan.answers:,} of up to {plan.answer_tokens} tokens",
        "training": f"{layers}, rank {shape.rank}, taps {', '.join(map(str, shape.taps))}, {knows}"
        f"; {plan.steps:,} steps of {plan.rows} rows with up to {plan.anchors} anchors, rate "
        f"{shape.learning_rate:g}",
        "calibration": "of the confidences, at temperature 0 and above",
        "costs": f"of steps with up to {plan.profile_requests} requests, "
        f"{plan.profile_repeats} rounds a point",
        "evaluation": f"{plan.heldout} prompts, answers of up to {plan.evaluation_tokens} tokens, "
        "at temperature 0 and 1",
    }
    return [(name, text, duration(plan.seconds[name])) for name, text in what.items()]
