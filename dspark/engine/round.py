"""One round: draft, schedule, verify, commit. The heart of the engine.

A round works on all running requests at once. A request that has just been admitted takes part
with its prompt and no drafts: its last prompt row is then what an anchor row is to the others.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from dspark.attention.layout import RaggedBatch
from dspark.attention.slots import SlotCache
from dspark.drafters.base import Drafter, Proposal
from dspark.engine.context import DraftContext
from dspark.engine.drafting import Drafts, Drawing, choose, confidence_array, draft_limits, propose
from dspark.engine.judging import Verdict, verify
from dspark.engine.record import FloatArray, RoundRecord, Watch
from dspark.engine.scheduler import Offer, Scheduler
from dspark.engine.sequence import ActiveRequest, Piece
from dspark.engine.shield import Shield
from dspark.engine.state import RoundState
from dspark.errors import NumericsError
from dspark.targets.target import Target

# In place of a confidence where a draft cannot be used: as good as none.
_NO_CONFIDENCE = -30.0


@dataclass(frozen=True)
class Speculator:
    """A drafter with its context, the scheduler that trims what it proposes, and who watches.

    What the drafter does wrong stops at the shield.
    """

    drafter: Drafter
    context: DraftContext
    scheduler: Scheduler
    watch: Watch | None = None
    shield: Shield = field(default_factory=Shield)

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
    cache: SlotCache,
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
        The committed pieces of each request, and what the round's parts took. Requests that came
        to a row without a law have ended with an error; what the drafter did wrong is logged.
    """
    times = RoundTimes()
    drafts = Drafts.none(len(requests), target.device)
    if speculator is not None and speculator.shield.off:
        speculator = None
    if speculator is not None:
        with speculator.shield.over(requests):
            drafts = _draft(requests, state, speculator, times) or drafts
    started = time.perf_counter()
    batch, judged = target_batch(requests, drafts, target.device)
    taps = speculator.drafter.taps if speculator else ()
    output = target.forward(batch, cache, taps=taps, logit_rows=judged)
    assert output.logits_NV is not None
    verdict = verify(output.logits_NV, drafts, state)
    if speculator is not None and output.features_TF is not None:
        with speculator.shield.over(requests):
            _observe(speculator, requests, batch, output.features_TF, drafts, verdict)
    times.verify_ms = (time.perf_counter() - started) * 1e3
    if speculator is not None:
        _learn(speculator, requests, drafts, verdict, times)
    pieces = _commit(requests, verdict, drafts)
    for broken in verdict.broken:
        request = requests[broken]
        begin = 0 if request.finish_reason == "error" else request.cached
        cache.clear(request.slot, begin)
        if speculator is not None:
            speculator.context.clear(request.slot, begin)
    return pieces, times


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
    ready = [request for request in requests if request.drafts]
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
    logits_DK = _confidences(proposal, drawing)
    offer = Offer(len(ready), len(drawing.tokens), logits_DK, proposal.are_margins)
    wanted = scheduler.lengths(requests, limits, offer)
    drafts = choose(drawing, proposal, limits, wanted, logits_DK)
    times.draft_ms = (decided - started) * 1e3
    times.schedule_ms += (time.perf_counter() - decided) * 1e3
    _note_numbers(speculator, ready, drawing)
    return drafts


def _confidences(proposal: Proposal, drawing: Drawing) -> FloatArray | None:
    """The proposal's confidence logits; none to speak of where a draft is of no use."""
    logits_DK = confidence_array(proposal)
    if logits_DK is not None:
        for request, count in drawing.sound.items():
            logits_DK[request, count:] = _NO_CONFIDENCE
    return logits_DK


def _note_numbers(speculator: Speculator, ready: Sequence[ActiveRequest], drawing: Drawing) -> None:
    """Requests whose drafts were no numbers have plain rounds; that all are is a fault."""
    for broken in drawing.broken:
        speculator.context.clear(ready[broken].slot, ready[broken].cached)
    if drawing.broken and all(drawing.sound.get(i) == 0 for i in range(len(ready))):
        speculator.shield.record(
            NumericsError(
                "The drafter failed: its logits have NaN or no finite maximum; check the "
                "drafter's weights and dtype."
            )
        )
    elif drawing.tokens:
        speculator.shield.worked()


def target_batch(
    requests: Sequence[ActiveRequest], drafts: Drafts, device: torch.device
) -> tuple[RaggedBatch, Tensor | Literal["all"]]:
    """Lay out every request's uncached tokens and verified drafts, and name the rows to judge.

    Returns:
        (batch, rows whose logits verification needs: the last 1 + length of each request).
    """
    parts, judged, end = [], list[int](), 0
    for request, drafted in zip(requests, drafts.tokens, strict=True):
        new = [*request.tokens[request.cached :], *drafted]
        parts.append((request.slot, request.cached, new))
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

    Nothing of requests that end with a fault here, or that the drafter has failed.

    The token after each of these rows is known: it is the next row's, or has just been drawn.
    """
    slots_T, positions_T = batch.slots_T, batch.positions_T
    gone = [r.plain or i in verdict.faults or i in verdict.void for i, r in enumerate(requests)]
    rejected = [
        segment.length if drop else len(d) - n
        for segment, drop, d, n in zip(
            batch.segments, gone, drafts.tokens, verdict.accepted, strict=True
        )
    ]
    if any(rejected):
        ends = [end - count for end, count in zip(batch.offsets[1:], rejected, strict=True)]
        rows: slice | Tensor = slice(ends[0])
        if len(ends) > 1:
            spans = map(range, batch.offsets, ends)
            kept = [row for span in spans for row in span]
            rows = torch.tensor(kept, dtype=torch.int64, device=slots_T.device)
        slots_T, positions_T, features_TF = slots_T[rows], positions_T[rows], features_TF[rows]
    following = list[int]()
    for request, drop, committed in zip(requests, gone, verdict.committed, strict=True):
        if not drop:
            following += request.tokens[request.cached + 1 :]
            following += committed
    if not following:
        return
    next_tokens_T = torch.tensor(following, device=slots_T.device)
    speculator.context.hold(slots_T, positions_T, features_TF, next_tokens_T)


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
    for i, request in enumerate(requests):
        request.stats.drafted += drafts.proposed[i]
        if i in verdict.void:
            pieces.append(request.skip_round())
            continue
        logprobs = verdict.logprobs[i] if verdict.logprobs else None
        verified = len(drafts.tokens[i])
        pieces.append(request.commit(verdict.committed[i], verdict.accepted[i], verified, logprobs))
        if i in verdict.faults:
            request.end("error", verdict.faults[i])
    return pieces
