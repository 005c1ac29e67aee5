"""Log-probabilities of committed tokens and of prompts, each from the row that predicts it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from dspark.attention.ragged_batch import RaggedBatch
from dspark.drafters.heads import at_least_fp32
from dspark.engine.requests.sequence import ActiveRequest
from dspark.engine.requests.step_plan import StepPlan
from dspark.request import Logprob


def emitted_logprobs(
    logits_NV: Tensor,
    lengths: Sequence[int],
    committed: Sequence[Sequence[int]],
    wanted: Sequence[int | None],
) -> tuple[tuple[Logprob, ...] | None, ...]:
    """Log-probabilities of each committed token and of the most likely ones beside it.

    Raw log-softmax, at least in fp32, before any processor (docs/losslessness.md): row k of a
    request emitted its committed token k, whether as a draft that stayed or as the token after.

    Args:
        logits_NV: raw logits of every request's 1 + length rows, request by request.
        lengths: verified drafts of each request.
        committed: the tokens of each request.
        wanted: how many most likely tokens each request asks for; None computes nothing for it.

    Returns:
        One entry per committed token; None where nothing was asked.
    """
    if all(count is None for count in wanted):
        return (None,) * len(wanted)
    found, begin = list[tuple[Logprob, ...] | None](), 0
    for length, tokens, count in zip(lengths, committed, wanted, strict=True):
        rows_MV = logits_NV[begin : begin + len(tokens)]
        found.append(None if count is None else logprobs_of(rows_MV, tokens, count))
        begin += length + 1
    return tuple(found)


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
    """The rows to verify, followed by those that predict prompt tokens."""
    if not scored:
        return judged
    more = torch.tensor([row for _, rows in scored for row in rows], device=device)
    if judged is None:
        return more
    if isinstance(judged, str):
        judged = torch.arange(count, device=device)
    return torch.cat([judged, more])


def score_prompts(logits_NV: Tensor, scored: Sequence[tuple[ActiveRequest, range]]) -> None:
    """Add log-probabilities of prompt tokens to their requests; their rows come last."""
    begin = len(logits_NV) - sum(len(rows) for _, rows in scored)
    for request, rows in scored:
        count, first = request.request.prompt_logprobs, len(request.prompt_logprobs) + 1
        assert count is not None
        tokens = request.request.prompt_ids[first : first + len(rows)]
        rows_MV = logits_NV[begin : begin + len(rows)]
        request.prompt_logprobs += logprobs_of(rows_MV, tokens, count)
        begin += len(rows)


def logprobs_of(logits_MV: Tensor, tokens: Sequence[int], count: int) -> tuple[Logprob, ...]:
    """Log-probabilities of one token per row and of the `count` most likely ones."""
    logprobs_MV = torch.log_softmax(at_least_fp32(logits_MV), dim=1)
    tokens_M1 = torch.tensor(tokens, dtype=torch.int64, device=logits_MV.device)[:, None]
    own = logprobs_MV.gather(1, tokens_M1).squeeze(1).tolist()
    tops = _tops(logprobs_MV, count) if count else [()] * len(tokens)
    return tuple(
        Logprob(token, value, top) for token, value, top in zip(tokens, own, tops, strict=True)
    )


def _tops(logprobs_MV: Tensor, count: int) -> list[tuple[tuple[int, float], ...]]:
    """The most likely tokens of each row: ties to the lowest ids, impossible tokens left out."""
    count = min(count, logprobs_MV.shape[1])
    values_MK, ids_MK = _likeliest(logprobs_MV, count)
    return [
        tuple(
            (token, value)
            for value, token in sorted(
                zip(values, ids, strict=True), key=lambda pair: (-pair[0], pair[1])
            )
            if value > float("-inf")
        )
        for values, ids in zip(values_MK.tolist(), ids_MK.tolist(), strict=True)
    ]


def _likeliest(values_MV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The highest values of each row and their ids, of equal ones those with the lowest ids."""
    values_MK, ids_MK = values_MV.topk(count, dim=1)
    cutoff_M1 = values_MK[:, -1:]
    if bool(((values_MV >= cutoff_M1).sum(dim=1) > count).any()):
        tied_MV = values_MV == cutoff_M1
        places_M1 = count - (values_MV > cutoff_M1).sum(dim=1, keepdim=True)
        late_MV = tied_MV & (tied_MV.cumsum(dim=1) > places_M1)
        values_MK, ids_MK = values_MV.masked_fill(late_MV, float("-inf")).topk(count, dim=1)
    return values_MK, ids_MK
