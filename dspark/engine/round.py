"""One round: draft, schedule, verify, commit. The heart of the engine.

A round works on all running requests at once. A request that has just been admitted takes part
with its prompt and no drafts: its last prompt row is then what an anchor row is to the others.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dspark.attention.layout import RaggedBatch
from dspark.attention.slots import SlotCache
from dspark.drafters.base import DraftBatch, Drafter, Proposal
from dspark.engine.schedule import Schedule
from dspark.engine.sequence import ActiveRequest, Piece
from dspark.request import Verifier
from dspark.sampling.counts import TokenCounts
from dspark.sampling.noise import Stream, seed_tensor, uniform
from dspark.sampling.processors import Chain, greedy_tokens, law, sample
from dspark.sampling.verification import (
    accepted_by_identity,
    accepted_lengths,
    coupled_tokens,
    keep_probabilities,
    next_law,
)
from dspark.targets.target import Target


@dataclass(frozen=True)
class RowState:
    """What the laws of R requests need in one round.

    Attributes:
        chain: their processors.
        seeds_R: their seeds, int64.
        rounds_R: their round numbers, int64.
        positions_R: position of each anchor (the last committed token), int64.
        counts: token counts where a request has penalties, else None.
        verifier: which rule decides.
    """

    chain: Chain
    seeds_R: Tensor
    rounds_R: Tensor
    positions_R: Tensor
    counts: TokenCounts | None
    verifier: Verifier

    @classmethod
    def of(
        cls, requests: Sequence[ActiveRequest], chain: Chain, target: Target, verifier: Verifier
    ) -> RowState:
        """Read the state of `requests`, whose processors are `chain`."""
        device = target.device
        counts = None
        if chain.penalised:
            counts = TokenCounts.of(
                [r.request.prompt_ids for r in requests],
                [r.output_ids for r in requests],
                target.vocab_size,
                device,
            )
        return cls(
            chain=chain,
            seeds_R=seed_tensor([r.request.params.seed for r in requests], device),
            rounds_R=torch.tensor([r.round for r in requests], device=device),
            positions_R=torch.tensor([len(r.tokens) - 1 for r in requests], device=device),
            counts=counts,
            verifier=verifier,
        )

    def first(self, count: int) -> RowState:
        """The state of the first `count` requests."""
        if count == len(self.seeds_R):
            return self
        rows = torch.arange(count, device=self.seeds_R.device)
        counts = self.counts
        if counts is not None:
            counts = TokenCounts(counts.prompt_NV[:count], counts.output_NV[:count])
        return RowState(
            chain=self.chain.rows(rows),
            seeds_R=self.seeds_R[:count],
            rounds_R=self.rounds_R[:count],
            positions_R=self.positions_R[:count],
            counts=counts,
            verifier=self.verifier,
        )


@dataclass
class Drawing:
    """The engine's side of a proposal: draws each draft token and remembers its very law.

    Implements `drafters.base.Draw`.
    """

    state: RowState
    tokens: list[Tensor] = field(default_factory=list)
    laws: list[Tensor] = field(default_factory=list)

    def __call__(self, step: int, logits_RV: Tensor) -> Tensor:
        """Draw draft `step` of every request from its processed logits."""
        s = self.state
        counts = self._counts(step)
        if s.chain.greedy:
            tokens_R = greedy_tokens(logits_RV, s.chain, counts)
        else:
            law_RV = law(logits_RV, s.chain, counts)
            self.laws.append(law_RV)
            if s.verifier == "coupled":
                tokens_R = coupled_tokens(law_RV, s.seeds_R, s.positions_R + step + 1)
            else:
                tokens_R = sample(law_RV, uniform(s.seeds_R, s.rounds_R, step, Stream.DRAFT))
        self.tokens.append(tokens_R)
        return tokens_R

    def _counts(self, step: int) -> TokenCounts | None:
        counts = self.state.counts
        if counts is None or step == 0:
            return counts
        requests_R = torch.arange(len(self.tokens[0]), device=self.tokens[0].device)
        steps_R = torch.full_like(requests_R, step)
        return counts.after_drafts(requests_R, steps_R, torch.stack(self.tokens, dim=1))


@dataclass(frozen=True)
class Drafts:
    """What a round verifies: R requests, the first D of which were drafted for.

    Attributes:
        tokens_DK: draft tokens.
        laws_DKV: the laws they were drawn from; None when all requests are greedy.
        lengths: drafts of each of the R requests that are verified.
        proposed: drafts of each of the R requests that were proposed.
    """

    tokens_DK: Tensor
    laws_DKV: Tensor | None
    lengths: tuple[int, ...]
    proposed: tuple[int, ...]


def propose(
    drafter: Drafter,
    context: SlotCache,
    requests: Sequence[ActiveRequest],
    state: RowState,
    num_drafts: int,
) -> tuple[Drawing, Proposal]:
    """Ask the drafter for up to `num_drafts` tokens of each request."""
    anchors = [request.tokens[-1] for request in requests]
    batch = DraftBatch(
        slots=tuple(request.slot for request in requests),
        anchors_R=torch.tensor(anchors, device=state.seeds_R.device),
        lengths=tuple(request.cached for request in requests),
        tokens=tuple(request.tokens for request in requests),
        num_drafts=num_drafts,
    )
    drawing = Drawing(state)
    return drawing, drafter.propose(context, batch, drawing)


def draft(
    drafter: Drafter,
    context: SlotCache,
    requests: Sequence[ActiveRequest],
    state: RowState,
    schedule: Schedule,
    num_drafts: int,
) -> tuple[Drafts, float, float]:
    """Draft for the requests that have a context, and decide how much of it to verify.

    Returns:
        (drafts, milliseconds of drafting, milliseconds of scheduling).
    """
    started = time.perf_counter()
    ready = [request for request in requests if request.cached > 0]
    # The last token a request may take is the one after its drafts, so a draft there is wasted.
    room = [min(request.room - 1, num_drafts) for request in ready]
    most = max(room, default=0)
    none = (0,) * len(requests)
    if most <= 0:
        empty_DK = torch.zeros(0, 0, dtype=torch.int64, device=state.seeds_R.device)
        return Drafts(empty_DK, None, none, none), _ms(started), 0.0
    drawing, proposal = propose(drafter, context, ready, state.first(len(ready)), most)
    drawn = len(drawing.tokens)
    decided = time.perf_counter()
    proposed = [min(drawn, r) for r in proposal.lengths or (drawn,) * len(ready)]
    lengths = schedule.lengths(proposal, len(ready), drawn)
    kept = [min(*each) for each in zip(lengths, proposed, room, strict=True)]
    rest = none[len(ready) :]
    drafts = Drafts(
        tokens_DK=torch.stack(drawing.tokens, dim=1)
        if drawn
        else torch.zeros(len(ready), 0, dtype=torch.int64, device=state.seeds_R.device),
        laws_DKV=torch.stack(drawing.laws, dim=1) if drawing.laws else None,
        lengths=(*(max(0, k) for k in kept), *rest),
        proposed=(*proposed, *rest),
    )
    return drafts, (decided - started) * 1e3, _ms(decided)


def verify(
    logits_NV: Tensor, drafts: Drafts, state: RowState
) -> tuple[list[list[int]], list[int]]:
    """Decide what stays and draw the token after it.

    Args:
        logits_NV: the target's logits of every request's last 1 + length rows, request by request.
        drafts: what was verified.
        state: of the R requests.

    Returns:
        Per request the committed tokens (kept drafts and one more), and the number of kept drafts.
    """
    rows = _Rows.of(drafts, logits_NV.device)
    counts = None
    if state.counts is not None:
        counts = state.counts.after_drafts(rows.request_N, rows.step_N, rows.drafts_RK)
    chain = state.chain.rows(rows.request_N) if len(rows.request_N) > len(drafts.lengths) else None
    chain_N = chain or state.chain
    if state.chain.greedy:
        own_RL = greedy_tokens(logits_NV, chain_N, counts)[rows.row_RL]
        return _by_identity(own_RL, rows)
    law_NV = law(logits_NV, chain_N, counts)
    if state.verifier == "coupled":
        positions_N = state.positions_R[rows.request_N] + rows.step_N + 1
        own_N = coupled_tokens(law_NV, state.seeds_R[rows.request_N], positions_N)
        return _by_identity(own_N[rows.row_RL], rows)
    return _by_rejection(law_NV[rows.row_RL], rows, drafts, state)


@dataclass(frozen=True)
class _Rows:
    """Where the ragged rows of R requests stand in a padded table of L = 1 + longest length.

    Attributes:
        request_N: request of each ragged row.
        step_N: drafts before each ragged row, within its request.
        row_RL: ragged row of (request, step); steps past a length repeat its last row.
        drafts_RK: draft tokens, K = L - 1, padded with 0.
        lengths_R: verified drafts.
    """

    request_N: Tensor
    step_N: Tensor
    row_RL: Tensor
    drafts_RK: Tensor
    lengths_R: Tensor

    @classmethod
    def of(cls, drafts: Drafts, device: torch.device) -> _Rows:
        longest = max(drafts.lengths)
        request, step, table, row = [], [], [], 0
        for r, length in enumerate(drafts.lengths):
            request += [r] * (length + 1)
            step += range(length + 1)
            table.append([row + min(k, length) for k in range(longest + 1)])
            row += length + 1
        drafts_RK = torch.zeros(len(drafts.lengths), longest, dtype=torch.int64, device=device)
        if longest:
            drafts_RK[: len(drafts.tokens_DK)] = drafts.tokens_DK[:, :longest]
        return cls(
            request_N=torch.tensor(request, device=device),
            step_N=torch.tensor(step, device=device),
            row_RL=torch.tensor(table, device=device),
            drafts_RK=drafts_RK,
            lengths_R=torch.tensor(drafts.lengths, device=device),
        )


def _by_identity(own_RL: Tensor, rows: _Rows) -> tuple[list[list[int]], list[int]]:
    accepted = accepted_by_identity(own_RL, rows.drafts_RK, rows.lengths_R).tolist()
    # Kept drafts equal the target's own tokens, so those are what is committed.
    own = own_RL.tolist()
    return [own[r][: n + 1] for r, n in enumerate(accepted)], accepted


def _by_rejection(
    p_RLV: Tensor, rows: _Rows, drafts: Drafts, state: RowState
) -> tuple[list[list[int]], list[int]]:
    longest = rows.drafts_RK.shape[1]
    q_RKV = p_RLV.new_zeros(len(drafts.lengths), longest, p_RLV.shape[2])
    if longest and drafts.laws_DKV is not None:
        q_RKV[: len(drafts.laws_DKV)] = drafts.laws_DKV[:, :longest]
    rule = "token" if state.verifier == "token" else "block"
    keep_RK = keep_probabilities(rule, p_RLV, q_RKV, rows.drafts_RK, rows.lengths_R)
    slots_K = torch.arange(longest, device=p_RLV.device)
    uniforms_RK = uniform(
        state.seeds_R[:, None], state.rounds_R[:, None], slots_K, Stream.VERIFY
    )
    accepted_R = accepted_lengths(rule, keep_RK, uniforms_RK, rows.lengths_R)
    law_RV = next_law(rule, p_RLV, q_RKV, rows.drafts_RK, rows.lengths_R, accepted_R)
    next_R = sample(law_RV, uniform(state.seeds_R, state.rounds_R, accepted_R, Stream.NEXT))
    accepted, following = accepted_R.tolist(), next_R.tolist()
    kept = rows.drafts_RK.tolist()
    return [[*kept[r][:n], following[r]] for r, n in enumerate(accepted)], accepted


def target_batch(
    requests: Sequence[ActiveRequest], drafts: Drafts, device: torch.device
) -> tuple[RaggedBatch, list[int]]:
    """Lay out every request's uncached tokens and verified drafts, and name the rows to judge.

    Returns:
        (batch, rows whose logits verification needs: the last 1 + length of each request).
    """
    tokens = drafts.tokens_DK.tolist()
    parts, judged, end = [], [], 0
    for r, (request, length) in enumerate(zip(requests, drafts.lengths, strict=True)):
        kept = tokens[r][:length] if length else []
        new = [*request.tokens[request.cached :], *kept]
        parts.append((request.slot, request.cached, new))
        end += len(new)
        judged += range(end - length - 1, end)
    return RaggedBatch.build(parts, device), judged


def observe(
    drafter: Drafter,
    context: SlotCache,
    batch: RaggedBatch,
    features_TF: Tensor,
    dropped: Sequence[int],
) -> None:
    """Give the drafter the features of the rows that stay.

    Args:
        drafter: who reads them.
        context: its cache.
        batch: what the target read.
        features_TF: the captured features.
        dropped: per request, how many of its last rows were rejected.
    """
    slots_T, positions_T = batch.slots_T, batch.positions_T
    if any(dropped):
        kept = [
            row
            for i, count in enumerate(dropped)
            for row in range(batch.offsets[i], batch.offsets[i + 1] - count)
        ]
        rows_T = torch.tensor(kept, device=features_TF.device)
        slots_T, positions_T = slots_T[rows_T], positions_T[rows_T]
        features_TF = features_TF[rows_T]
    drafter.observe(context, slots_T, positions_T, features_TF)


def commit(
    requests: Sequence[ActiveRequest],
    committed: Sequence[Sequence[int]],
    accepted: Sequence[int],
    drafts: Drafts,
) -> list[tuple[Piece, ...]]:
    """Commit every request's tokens and count what the round did."""
    pieces = []
    for request, tokens, kept, length, proposed in zip(
        requests, committed, accepted, drafts.lengths, drafts.proposed, strict=True
    ):
        request.stats.drafted += proposed
        pieces.append(request.commit(tokens, kept, length))
    return pieces


def _ms(since: float) -> float:
    return (time.perf_counter() - since) * 1e3
