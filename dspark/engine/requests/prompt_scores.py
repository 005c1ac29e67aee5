"""Log-probabilities of prompt tokens: which rows of a step predict them, and what is noted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from dspark.attention.ragged_batch import RaggedBatch
from dspark.engine.requests.logprobs import logprobs_of
from dspark.engine.requests.sequence import ActiveRequest
from dspark.engine.requests.step_plan import StepPlan


def scored_rows(plan: StepPlan, batch: RaggedBatch) -> list[tuple[ActiveRequest, range]]:
    """Rows of the step that predict prompt tokens whose log-probabilities are wanted."""
    found = []
    everyone = (*plan.judged, *(chunk.request for chunk in plan.reading))
    for i, request in enumerate(everyone):
        if not request.scores_prompt:
            continue
        begin, end = batch.offsets[i], batch.offsets[i + 1]
        first = begin + len(request.prompt_logprobs) - request.cached
        last = begin + len(request.request.prompt_ids) - 1 - request.cached
        rows = range(max(begin, first), min(end, last))
        if rows:
            found.append((request, rows))
    return found


def with_rows(
    judged: Tensor | Literal["all"] | None,
    scored: Sequence[tuple[ActiveRequest, range]],
    count: int,
    device: torch.device,
) -> Tensor | Literal["all"] | None:
    """The rows to verify, and behind them those of prompts."""
    if not scored:
        return judged
    more = torch.tensor([row for _, rows in scored for row in rows], device=device)
    if judged is None:
        return more
    if isinstance(judged, str):
        judged = torch.arange(count, device=device)
    return torch.cat([judged, more])


def score_prompts(logits_NV: Tensor, scored: Sequence[tuple[ActiveRequest, range]]) -> None:
    """Note the log-probabilities of prompt tokens; their rows are the last of the logits."""
    begin = len(logits_NV) - sum(len(rows) for _, rows in scored)
    for request, rows in scored:
        count, first = request.request.prompt_logprobs, len(request.prompt_logprobs) + 1
        assert count is not None
        tokens = request.request.prompt_ids[first : first + len(rows)]
        rows_MV = logits_NV[begin : begin + len(rows)]
        request.prompt_logprobs += logprobs_of(rows_MV, tokens, count)
        begin += len(rows)
