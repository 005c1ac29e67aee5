"""One round: draft, schedule, verify, commit. The heart of the engine.

A round works on all running requests at once. A request that has just been admitted takes part
with its prompt and no drafts: its last prompt row is then what an anchor row is to the others.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dspark.attention.layout import Part, RaggedBatch
from dspark.attention.pages import PagedCache
from dspark.drafters.base import Drafter
from dspark.engine.context import DraftContext
from dspark.engine.drafting import Drafts, choose, confidence_array, draft_limits, propose
from dspark.engine.judging import Verdict, verify
from dspark.engine.record import RoundRecord, Watch
from dspark.engine.scheduler import Offer, Scheduler
from dspark.engine.sequence import ActiveRequest, Piece
from dspark.engine.state import RoundState
from dspark.targets.target import Target


@dataclass(frozen=True)
class Speculator:
    """A drafter with its context, the scheduler that trims what it proposes, and who watches."""

    drafter: Drafter
    context: DraftContext
    scheduler: Scheduler
    watch: Watch | None = None

    @property
    def reads_confidences(self) -> bool:
        """Whether drafting must come up with confidences."""
        return self.scheduler.reads_confidences or self.watch is not None


@dataclass
class RoundTimes:
    """Milliseconds of one round: drafting, scheduling, and target forward with verification."""

    draft_ms: float = 0.0
    schedule_ms: float = 0.0
    verify_ms: float = 0.0


def play(
    requests: Sequence[ActiveRequest],
    state: RoundState,
    target: Target,
    cache: PagedCache,
    speculator: Speculator | None,
) -> tuple[list[tuple[Piece, ...]], RoundTimes]:
    """Run one round.

    Args:
        requests: who takes part; those without a context come last.
        state: their laws and keys of randomness.
        target: the model whose outputs are wanted.
        cache: its keys and values.
        speculator: who proposes; None decodes plainly.

    Returns:
        The committed pieces of each request, and what the round's parts took.

    Raises:
        NumericsError: target or drafter produced NaN or infinite logits. Nothing is committed.
    """
    times = RoundTimes()
    drafts = Drafts.none(len(requests), target.device)
    if speculator is not None:
        drafts = _draft(requests, state, speculator, times) or drafts
    started = time.perf_counter()
    batch, judged = target_batch(requests, drafts, target.device)
    taps = speculator.drafter.taps if speculator else ()
    output = target.forward(batch, cache, taps=taps, logit_rows=judged)
    assert output.logits_NV is not None
    verdict = verify(output.logits_NV, drafts, state)
    if speculator is not None and output.features_TF is not None:
        _observe(speculator, requests, batch, output.features_TF, drafts, verdict)
    times.verify_ms = (time.perf_counter() - started) * 1e3
    if speculator is not None:
        _learn(speculator, requests, drafts, verdict, times)
    return _commit(requests, verdict, drafts), times


def _draft(
    requests: Sequence[ActiveRequest],
    state: RoundState,
    speculator: Speculator,
    times: RoundTimes,
) -> Drafts | None:
    """Drafts of the requests that have a context; None where none can be of use, or pays."""
    started = time.perf_counter()
    scheduler = speculator.scheduler
    limits = scheduler.limits(requests, draft_limits(requests, state.num_drafts))
    most = max(limits)
    times.schedule_ms = (time.perf_counter() - started) * 1e3
    if most <= 0:
        return None
    started = time.perf_counter()
    ready = [request for request in requests if request.cached > 0]
    speculator.context.flush()
    drawing, proposal = propose(
        speculator.drafter,
        speculator.context.cache,
        ready,
        state.first(len(ready)),
        most,
        confidences=speculator.reads_confidences,
    )
    decided = time.perf_counter()
    logits_DK = confidence_array(proposal)
    offer = Offer(len(ready), len(drawing.tokens), logits_DK, proposal.are_margins)
    wanted = scheduler.lengths(requests, limits, offer)
    drafts = choose(drawing, proposal, limits, wanted, logits_DK)
    times.draft_ms = (decided - started) * 1e3
    times.schedule_ms += (time.perf_counter() - decided) * 1e3
    return drafts


def target_batch(
    requests: Sequence[ActiveRequest], drafts: Drafts, device: torch.device
) -> tuple[RaggedBatch, Tensor | Literal["all"]]:
    """Lay out every request's uncached tokens and verified drafts, and name the rows to judge.

    Returns:
        (batch, rows whose logits verification needs: the last 1 + length of each request).
    """
    parts, judged, end = list[Part](), list[int](), 0
    for request, drafted in zip(requests, drafts.tokens, strict=True):
        new = [*request.tokens[request.cached :], *drafted]
        parts.append((request.table, request.cached, new))
        end += len(new)
        judged += range(end - len(drafted) - 1, end)
    batch = RaggedBatch.build(parts, device)
    return batch, "all" if len(judged) == end else torch.tensor(judged, device=device)


def _observe(
    speculator: Speculator,
    requests: Sequence[ActiveRequest],
    batch: RaggedBatch,
    features_TF: Tensor,
    drafts: Drafts,
    verdict: Verdict,
) -> None:
    """Keep for the drafter the features of the rows that stay: all but the rejected drafts.

    The token after each of these rows is known: it is the next row's, or has just been drawn.
    """
    lengths = [
        segment.length - len(drafted) + kept
        for segment, drafted, kept in zip(
            batch.segments, drafts.tokens, verdict.accepted, strict=True
        )
    ]
    following = list[int]()
    for request, committed in zip(requests, verdict.committed, strict=True):
        following += request.tokens[request.cached + 1 :]
        following += committed
    speculator.context.hold(batch, lengths, features_TF, following)


def _learn(
    speculator: Speculator,
    requests: Sequence[ActiveRequest],
    drafts: Drafts,
    verdict: Verdict,
    times: RoundTimes,
) -> None:
    """Tell the scheduler, and who watches, how the round went."""
    survival_RK = speculator.scheduler.learn(requests, drafts, verdict.accepted)
    if speculator.watch is None:
        return
    offered = zip(drafts.tokens_RK.tolist(), drafts.proposed, strict=True)
    speculator.watch(
        RoundRecord(
            request_ids=tuple(request.request_id for request in requests),
            greedy=tuple(request.request.params.temperature == 0 for request in requests),
            drafts=tuple(tuple(row[:count]) for row, count in offered),
            confidence_logits_RK=drafts.confidence_logits_RK,
            are_margins=drafts.are_margins,
            survival_RK=survival_RK,
            lengths=drafts.lengths,
            accepted=tuple(verdict.accepted),
            committed=tuple(map(tuple, verdict.committed)),
            draft_ms=times.draft_ms,
            schedule_ms=times.schedule_ms,
            verify_ms=times.verify_ms,
        )
    )


def _commit(
    requests: Sequence[ActiveRequest], verdict: Verdict, drafts: Drafts
) -> list[tuple[Piece, ...]]:
    """Commit every request's tokens and count what the round did."""
    pieces = []
    for request, tokens, kept, drafted, proposed in zip(
        requests, verdict.committed, verdict.accepted, drafts.tokens, drafts.proposed, strict=True
    ):
        request.stats.drafted += proposed
        pieces.append(request.commit(tokens, kept, len(drafted)))
    return pieces
