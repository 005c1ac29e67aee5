"""Step plan: the requests that decode in a step, and the prompt chunks read beside them.

Verification goes first; prompts share what the step's token budget leaves, so that a long prompt
holds up the others by one budget per step at most, and a short one behind a long one is read at
once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dspark.engine.requests.sequence import ActiveRequest

# Rows of a step: on a CPU a step of so many takes a few times as long as one of a few rows.
_CPU_STEP_TOKENS, _DEVICE_STEP_TOKENS = 512, 2048
# Of the budget prompts get at least this share, however many rows verification takes.
_PROMPT_SHARE = 0.25
# Rows of a step whose logits are kept for a prompt's log-probabilities: each holds V numbers.
_SCORED_ROWS = 128


@dataclass(frozen=True)
class Chunk:
    """A part of a prompt that is read without drawing a token from it.

    Attributes:
        request: whose it is.
        count: how many of its uncached tokens are read, from the first on.
    """

    request: ActiveRequest
    count: int


@dataclass(frozen=True)
class StepPlan:
    """Who takes part in a step.

    Attributes:
        ready: requests with a context: they draft and verify.
        opening: requests that read the last of their prompt and draw their first token.
        reading: parts of longer prompts.
        running: all that run, those included for whom this step has no room.
    """

    ready: tuple[ActiveRequest, ...]
    opening: tuple[ActiveRequest, ...]
    reading: tuple[Chunk, ...]
    running: tuple[ActiveRequest, ...]

    @property
    def judged(self) -> tuple[ActiveRequest, ...]:
        """Those of whom tokens are drawn; who drafts comes first."""
        return (*self.ready, *self.opening)

    @property
    def reads_prompts(self) -> bool:
        """Whether any part of a prompt is read."""
        return bool(self.opening or self.reading)


def default_step_tokens(device: torch.device) -> int:
    """Rows of a step at most."""
    return _CPU_STEP_TOKENS if device.type == "cpu" else _DEVICE_STEP_TOKENS


def plan_step(
    requests: Sequence[ActiveRequest], budget_tokens: int, num_drafts: int = 0
) -> StepPlan:
    """Divide one step among the running requests.

    Args:
        requests: all that run, in the order in which their rows are to lie; those that the drafter
            has failed behind the others.
        budget_tokens: rows of the step. Those of verification may exceed it; prompts get what
            they leave, and a quarter of the budget at least.
        num_drafts: drafts of a request at most.
    """
    ready = tuple(r for r in requests if r.ready)
    unread = [r for r in requests if not r.ready]
    left = max(
        budget_tokens - sum(1 + max(0, min(r.room - 1, num_drafts)) for r in ready),
        int(budget_tokens * _PROMPT_SHARE),
        1,
    )
    opening, reading = list[ActiveRequest](), list[Chunk]()
    wants = [min(r.unread, _SCORED_ROWS) if r.scores_prompt else r.unread for r in unread]
    for request, count in zip(unread, fair_shares(wants, left), strict=True):
        if count == request.unread and not request.resumed:
            opening.append(request)
        elif count:
            reading.append(Chunk(request, count))
    return StepPlan(ready, tuple(opening), tuple(reading), tuple(requests))


def fair_shares(wants: Sequence[int], total: int) -> list[int]:
    """Divide `total` so that nobody gets more than they want, and the smallest wants come first.

    Whoever wants more than an equal share gets an equal share of what the others leave; what does
    not divide goes to the first of them.
    """
    shares = [0] * len(wants)
    left, order = total, sorted(range(len(wants)), key=lambda i: wants[i])
    for rank, i in enumerate(order):
        heirs = len(order) - rank
        shares[i] = min(wants[i], left // heirs)
        left -= shares[i]
    for i, want in enumerate(wants):
        more = min(want - shares[i], left)
        shares[i] += more
        left -= more
    return shares
