"""One round: draft, schedule, verify, commit. The heart of the engine.

A round works on all running requests at once. A request whose prompt ends in this round takes part
with that end and no drafts: its last prompt row is then what an anchor row is to the others. Parts
of longer prompts ride along in the same forward, and nothing is drawn from them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from dspark.attention.paged_cache import PagedCache
from dspark.attention.ragged_batch import Part, RaggedBatch, with_trees
from dspark.engine.requests.logprobs import score_prompts, scored_rows, with_rows
from dspark.engine.requests.sequence import ActiveRequest, Piece
from dspark.engine.requests.step_plan import StepPlan
from dspark.engine.speculation.draft import Drafts
from dspark.engine.speculation.round_record import RoundRecord, RoundTimes, Spent
from dspark.engine.speculation.sampling_state import RoundState
from dspark.engine.speculation.speculator import Speculator, draft
from dspark.engine.speculation.trees.forest import compact, in_order_of_paths
from dspark.engine.speculation.trees.verify import verify_trees
from dspark.engine.speculation.verify import Verdict, verify
from dspark.targets.forward import TargetOutput
from dspark.targets.target import Target


def play(
    plan: StepPlan,
    state: RoundState | None,
    target: Target,
    cache: PagedCache,
    speculator: Speculator | None,
) -> tuple[list[tuple[Piece, ...]], RoundTimes]:
    """Run one round.

    Args:
        plan: who takes part.
        state: sampling and keys of randomness of the judged requests; None if there are none.
        target: the model whose outputs are wanted.
        cache: its keys and values.
        speculator: who proposes; None decodes plainly.

    Returns:
        The committed pieces of each judged request, and what the round's parts took. Requests that
        came to a row without a distribution have ended with an error; faults of the drafter are
        logged.
    """
    times, requests = RoundTimes(), plan.judged
    drafts = Drafts.none(len(requests), target.device)
    if speculator is not None and speculator.shield.off:
        speculator = None
    sleeps = speculator is None or state is None or speculator.sleeps(state)
    if speculator is not None and state is not None and not sleeps:
        with speculator.shield.over(plan.running):
            drafts = draft(requests, state, speculator, times) or drafts
    started = time.perf_counter()
    batch, judged = target_batch(plan, drafts, target.device)
    scored = scored_rows(plan, batch)
    wanted = with_rows(judged, scored, batch.offsets[-1], target.device)
    observes = speculator is not None and not all(request.plain for request in plan.running)
    taps = speculator.drafter.taps if speculator is not None and observes else ()
    output = target.forward(batch, cache, taps=taps, logit_rows=wanted)
    verdict = Verdict((), ())
    if state is not None:
        assert output.logits_NV is not None
        verified = len(output.logits_NV) - sum(len(rows) for _, rows in scored)
        verdict = _judge(output.logits_NV[:verified], drafts, state)
        if drafts.forest is not None:
            compact(cache, requests, verdict.paths)
    if scored:
        assert output.logits_NV is not None
        score_prompts(output.logits_NV, scored)
    if speculator is not None and output.features_TF is not None:
        with speculator.shield.over(plan.running):
            if sleeps and _is_plain(plan, verdict) and speculator.collector is None:
                following = [tokens[0] for tokens in verdict.committed]
                ones = [1] * len(following)
                speculator.context.hold(batch, ones, output.features_TF, following)
            else:
                _observe(speculator, plan, batch, output, drafts, verdict)
    times.verify_ms = (time.perf_counter() - started) * 1e3
    if speculator is not None and requests and not (sleeps and speculator.watch is None):
        _learn(speculator, requests, drafts, verdict, times, batch.offsets[-1], sleeps)
    for chunk in plan.reading:
        chunk.request.cached += chunk.count
    pieces = _commit(requests, verdict, drafts)
    for broken in verdict.broken:
        table, begin = requests[broken].table, requests[broken].cached
        cache.clear(table.rows(begin, table.capacity))
        if speculator is not None:
            speculator.context.clear(table, begin)
    return pieces, times


def _judge(logits_NV: Tensor, drafts: Drafts, state: RoundState) -> Verdict:
    if drafts.forest is None:
        return verify(logits_NV, drafts, state)
    most = max(map(len, drafts.forest.trees))
    return verify_trees(logits_NV, drafts.forest, replace(state, num_drafts=max(most, 1)))


def target_batch(
    plan: StepPlan, drafts: Drafts, device: torch.device
) -> tuple[RaggedBatch, Tensor | Literal["all"] | None]:
    """Lay out every request's uncached tokens and verified drafts, and name the rows to judge.

    Returns:
        (batch, rows whose logits verification needs: the last 1 + length of each judged request).
    """
    parts, judged, end = list[Part](), list[int](), 0
    for request, drafted in zip(plan.judged, drafts.tokens, strict=True):
        new = [*request.tokens[request.cached :], *drafted]
        parts.append((request.table, request.cached, new))
        end += len(new)
        judged += range(end - len(drafted) - 1, end)
    for request, count in ((chunk.request, chunk.count) for chunk in plan.reading):
        begin = request.cached
        parts.append((request.table, begin, request.tokens[begin : begin + count]))
        end += count
    batch = RaggedBatch.build(parts, device)
    if drafts.forest is not None and any(map(len, drafts.forest.trees)):
        trees = [tree.parents for tree in drafts.forest.trees]
        batch = with_trees(batch, [*trees, *((),) * len(plan.reading)])
    if not judged:
        return batch, None
    return batch, "all" if len(judged) == end else torch.tensor(judged, device=device)


def _is_plain(plan: StepPlan, verdict: Verdict) -> bool:
    """Whether a round without drafts adds one row, which the drafter may want, to each request."""
    if plan.opening or plan.reading or verdict.faults or verdict.void:
        return False
    return not any(request.plain for request in plan.ready)


def _observe(
    speculator: Speculator,
    plan: StepPlan,
    batch: RaggedBatch,
    output: TargetOutput,
    drafts: Drafts,
    verdict: Verdict,
) -> None:
    """Keep for the drafter the features of the rows that stay: all but the rejected drafts.

    Nothing of requests that end with a fault here, or that the drafter has failed.

    The token after each of these rows is known: it is the next row's, or has just been drawn.
    """
    features_TF, hidden_TH = output.features_TF, output.hidden_TH
    assert features_TF is not None
    stay = [segment.length for segment in batch.segments]
    following = list[int]()
    for i, (request, committed) in enumerate(zip(plan.judged, verdict.committed, strict=True)):
        if request.plain or i in verdict.faults or i in verdict.void:
            stay[i] = 0
            continue
        stay[i] -= len(drafts.tokens[i]) - verdict.accepted[i]
        following += request.tokens[request.cached + 1 :]
        following += committed
    for i, chunk in enumerate(plan.reading, start=len(plan.judged)):
        if chunk.request.plain:
            stay[i] = 0
            continue
        begin = chunk.request.cached + 1
        following += chunk.request.tokens[begin : begin + chunk.count]
    if drafts.forest is not None:
        ends, trees = batch.offsets[1 : len(plan.judged) + 1], drafts.forest.trees
        order = in_order_of_paths(len(features_TF), ends, trees, verdict.paths)
        if order is not None:
            features_TF, hidden_TH = features_TF[order], hidden_TH[order]
    if following:
        speculator.context.hold(batch, stay, features_TF, following)
    if speculator.collector is None:
        return
    requests = (*plan.judged, *(chunk.request for chunk in plan.reading))
    for request, segment, begin, count in zip(
        requests, batch.segments, batch.offsets, stay, strict=False
    ):
        if request.request.learn and count:
            rows = slice(begin, begin + count)
            speculator.collector.rows(request, segment.start, features_TF[rows], hidden_TH[rows])


def _learn(
    speculator: Speculator,
    requests: Sequence[ActiveRequest],
    drafts: Drafts,
    verdict: Verdict,
    times: RoundTimes,
    rows: int,
    sleeps: bool,
) -> None:
    """Tell the scheduler, unless it sleeps, and who watches, how the round went."""
    survival_RK = None
    if not sleeps:
        spent = Spent(rows, times.draft_ms, times.schedule_ms, times.verify_ms, times.catch_up_ms)
        survival_RK = speculator.learn(requests, drafts, verdict, spent)
    if speculator.watch is None:
        return
    offered = zip(drafts.tokens_RK.tolist(), drafts.proposed, strict=True)
    speculator.watch(
        RoundRecord(
            request_ids=tuple(request.request_id for request in requests),
            rounds=tuple(request.round for request in requests),
            anchors=tuple(request.tokens[-1] for request in requests),
            greedy=tuple(request.request.params.temperature == 0 for request in requests),
            drafts=tuple(tuple(row[:count]) for row, count in offered),
            confidence_logits_RK=drafts.confidence_logits_RK,
            are_margins=drafts.are_margins,
            survival_RK=survival_RK,
            lengths=drafts.lengths,
            accepted=tuple(verdict.accepted),
            committed=tuple(map(tuple, verdict.committed)),
            rows=rows,
            budget=speculator.deciding.budget,
            parents=tuple(tree.parents for tree in drafts.grown) if drafts.grown else None,
            paths=tuple(map(tuple, verdict.paths)) if drafts.grown else None,
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
        verified, reach = len(drafts.tokens[i]), None
        if drafts.forest is not None:
            reach = drafts.forest.trees[i].reach(verdict.paths[i])
        tokens, accepted = verdict.committed[i], verdict.accepted[i]
        pieces.append(request.commit(tokens, accepted, verified, logprobs, reach))
        if i in verdict.faults:
            request.end("error", verdict.faults[i])
    return pieces
