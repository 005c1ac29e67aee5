"""What the stages of a fit cost, and how much of each fits into a time."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from dspark.errors import UsageError
from dspark.fitting.measure import Speeds
from dspark.fitting.recipe import BLOCK_SIZE

PASSES = 3
"""Target number of times that each answer token is an anchor; more passes add little."""
GENERATION_SHARE = (0.15, 0.6)
"""Bounds of the share of prompts and answers in the time for prompts, answers and training."""
KEPT_SHARE, ANSWER_SHARE = 0.8, 0.7
"""Expected share of self-written prompts kept, and of an answer's token limit used."""
ANSWER_COST = 1.4
"""An answer's time over that of as many tokens in the trial, whose contexts are short and whose
batch stays full."""
PROMPT_TOKENS = 48
ROUNDS = 500
"""Calibration rounds per temperature class."""
FEWEST_ROWS, ROWS = 4, 8
FEWEST_HELD_OUT, MOST_HELD_OUT, MOST_CALIBRATED = 3, 150, 64
FEWEST_STEPS = 300
"""With fewer steps, rows get fewer anchors to allow more steps."""
FEWEST_ANCHORS, MOST_ANCHORS = 8, 128
CACHE_GAIN = 1.1
"""Times as many anchors that a feature cache must allow."""
PROFILE_ROWS, LITTLE_PROFILE_ROWS = 600, 80
"""Approximate rows per repeat of a cost table for up to 8 requests, and for 1."""
EVALUATION_TOKENS = (24, 64)


@dataclass(frozen=True)
class Work:
    """Times of units of work.

    Where `whole_answers`, every token of an answer is an anchor, and nothing is calibrated.
    """

    speeds: Speeds
    answer_tokens: int
    writes_prompts: bool
    block_size: int = BLOCK_SIZE
    whole_answers: bool = False

    @property
    def anchors(self) -> int:
        """Anchors of an answer, at most."""
        most = self.answer_tokens if self.whole_answers else MOST_ANCHORS
        return _clamp(int(ANSWER_SHARE * self.answer_tokens), FEWEST_ANCHORS, most)

    @property
    def fewest_anchors(self) -> int:
        """Anchors of an answer, at least."""
        return self.anchors if self.whole_answers else FEWEST_ANCHORS

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
        return ANSWER_COST * tokens / self.speeds.batch_tokens_per_s

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
        rounds = self.evaluation_tokens / expected_length(self.block_size)
        return 2 * rounds * self.speeds.round_s(self.block_size)

    def evaluation_s(self, prompts: int) -> float:
        """Seconds of an evaluation in which all prompts are raced."""
        return prompts * (self.raced_s + self.measured_s)

    def held_out_in(self, seconds: float) -> int:
        """Prompts that fit into an evaluation, half of its time spent on races."""
        return int(max(0.5 * seconds / self.measured_s, seconds / (self.raced_s + self.measured_s)))


def expected_length(block_size: int) -> float:
    """Tokens per round that a young drafter of such blocks may keep, for estimates of time."""
    return min(1 + 0.3 * block_size, 2.0)


def anchors_per_s(speeds: Speeds, anchors: int = MOST_ANCHORS) -> float:
    """Anchors per second of a training that sees each row a few times, its features computed once.

    Args:
        speeds: of this machine.
        anchors: of a row.
    """
    seen = replace(speeds, row_s=speeds.row_s / PASSES)
    return ROWS * anchors / seen.whole_step_s(ROWS, anchors)


def generation_share(work: Work) -> float:
    """The share of generation in the time of generation and training together.

    Each answer token is to be an anchor `PASSES` times: a T = PASSES g G, where training takes T at
    a anchors per second and generation G at g tokens per second. Features are computed once.
    """
    anchors = anchors_per_s(work.speeds, work.anchors)
    share = anchors / (anchors + PASSES * work.speeds.batch_tokens_per_s / ANSWER_COST)
    return min(max(share, GENERATION_SHARE[0]), GENERATION_SHARE[1])


def prompt_counts(
    work: Work, generation_s: float, evaluation_s: float, available: int | None
) -> tuple[int, int, int]:
    """Prompts to train with, to hold out and to calibrate with, as many as the times allow.

    Of a limited number of prompts at most a tenth each is held out and calibrated with.
    """
    heldout = _clamp(work.held_out_in(evaluation_s), FEWEST_HELD_OUT, MOST_HELD_OUT)
    rounds = max(heldout, ROUNDS * 2 // work.answer_tokens)
    calibrated = 0 if work.whole_answers else _clamp(rounds, FEWEST_HELD_OUT, MOST_CALIBRATED)
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


def training_steps(
    work: Work, seconds: float, rows: int, answers: int, disk_bytes: float
) -> tuple[float, int, int]:
    """Seconds for features that are computed once, and anchors and steps of what is left.

    0 seconds where computing them in every step allows nearly as many anchors, or the disk is too
    small: coding, writing and reading them take time that was not measured.
    """
    speeds = work.speeds
    features_s = answers * speeds.row_s
    online = _steps(work, seconds, rows, speeds)
    if features_s >= seconds or answers * speeds.feature_bytes > disk_bytes:
        return 0.0, *online
    cached = _steps(work, seconds - features_s, rows, speeds.from_cache)
    gains = math.prod(cached) > CACHE_GAIN * math.prod(online)
    return (features_s, *cached) if gains else (0.0, *online)


def _steps(work: Work, seconds: float, rows: int, speeds: Speeds) -> tuple[int, int]:
    """Anchors per row and steps: as many anchors as answers have, if enough steps remain.

    Fewer anchors allow more steps as long as anchors dominate the time.
    """
    anchors = least = work.anchors
    if not work.whole_answers:
        beside = speeds.whole_step_s(rows, 0) / rows
        least = _clamp(int(beside / speeds.anchor_s), FEWEST_ANCHORS, anchors)
    while anchors > least and seconds / speeds.whole_step_s(rows, anchors) < FEWEST_STEPS:
        anchors = max(anchors // 2, least)
    return anchors, max(int(seconds / speeds.whole_step_s(rows, anchors)), 1)


def profile_size(seconds: float, speeds: Speeds) -> tuple[int, int]:
    """Requests and repeats of a cost table for this time, with one extra repeat to warm up."""
    for requests, rows in ((8, PROFILE_ROWS), (1, LITTLE_PROFILE_ROWS)):
        repeats = int(seconds * speeds.batch_tokens_per_s / rows) - 1
        if repeats >= 1:
            return requests, min(repeats, 5)
    return 1, 1


def _clamp(value: int, least: int, most: int) -> int:
    return min(max(value, least), most)
