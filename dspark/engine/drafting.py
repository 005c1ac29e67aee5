"""Drafting: ask the drafter, draw its tokens, and decide how many of them are verified."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from dspark.attention.pages import PagedCache
from dspark.drafters.base import DraftBatch, Drafter, Proposal
from dspark.drafters.heads import at_least_fp32
from dspark.engine.record import FloatArray
from dspark.engine.rows import compute_rows
from dspark.engine.sequence import ActiveRequest
from dspark.engine.state import RoundState
from dspark.errors import DSparkError, NumericsError
from dspark.sampling.counts import TokenCounts
from dspark.sampling.processors import greedy_tokens, law, sample
from dspark.sampling.verification import coupled_tokens


@dataclass
class Drawing:
    """The engine's side of a proposal: draws each draft token and remembers its very law.

    Implements `drafters.base.Draw`.

    Attributes:
        state: laws and keys of randomness.
        keeps_logits: whether `margins` may be asked for.
        tokens: what was drawn, per step [R].
        laws: what it was drawn from, per step [R, V]; empty while all requests are greedy.
        logits: what came in, per step [R, V]; empty unless `keeps_logits`.
        sound: drafts of a request that are of use, where fewer than were drawn: behind them its
            logits were no numbers, or its mask allows none of the drafter's tokens.
        broken: requests whose draft logits were no numbers.
    """

    state: RoundState
    keeps_logits: bool = False
    tokens: list[Tensor] = field(default_factory=list)
    laws: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    sound: dict[int, int] = field(default_factory=dict)
    broken: set[int] = field(default_factory=set)

    def __call__(self, step: int, logits_RV: Tensor) -> Tensor:
        """Draw draft `step` of every request from its processed logits."""
        state, chain = self.state, self.state.laws.draft_chain
        counts = self._counts(step)
        mask_RV, faults = self._mask(step)
        if self.keeps_logits:
            self.logits.append(logits_RV)
        if chain.greedy:
            tokens_R = compute_rows(greedy_tokens, logits_RV, chain, counts, mask_RV, faults)
        else:
            law_RV = compute_rows(law, logits_RV, chain, counts, mask_RV, faults)
            self.laws.append(law_RV)
            if state.verifier == "coupled":
                positions_R = state.anchors_R + step + 1
                tokens_R = coupled_tokens(law_RV, state.laws.seeds_R, positions_R)
            else:
                tokens_R = sample(law_RV, state.draft_uniform(step))
        self.tokens.append(tokens_R)
        # A row's fault hangs on the drafts before it only, so a length may look at it.
        for request, fault in faults.items():
            self.sound.setdefault(request, step)
            if isinstance(fault, NumericsError):
                self.broken.add(request)
        return tokens_R

    def _mask(self, step: int) -> tuple[Tensor | None, dict[int, DSparkError]]:
        """The masks of the drafts' own prefixes; none behind a request's last sound draft."""
        masks = self.state.masks
        if masks is None:
            return None, {}
        drafted = [()] * len(masks.masks)
        if step:
            drafted = list(map(tuple, torch.stack(self.tokens, dim=1).tolist()))
        return masks.rows([(r, None if r in self.sound else d) for r, d in enumerate(drafted)])

    def margins(self) -> Tensor:
        """The gap of the two largest raw logits of every draft's row, [R, K], at least fp32.

        The confidence of drafters that have none of their own, as the logit of c_k. It knows no
        processor and not the token it judges, so schedules may look at it (docs/losslessness.md).
        """
        best_RK2 = [logits_RV.topk(2, dim=1).values for logits_RV in self.logits]
        return torch.stack([at_least_fp32(b[:, 0]) - b[:, 1] for b in best_RK2], dim=1)

    def _counts(self, step: int) -> TokenCounts | None:
        counts = self.state.laws.counts
        if counts is None or step == 0:
            return counts
        requests_R = torch.arange(len(self.tokens[0]), device=self.tokens[0].device)
        steps_R = torch.full_like(requests_R, step)
        return counts.after_drafts(requests_R, steps_R, torch.stack(self.tokens, dim=1))


@dataclass(frozen=True)
class Drafts:
    """What a round verifies of R requests.

    Attributes:
        tokens_RK: draft tokens; K may be 0, and rows behind a request's length hold anything.
        laws_RKV: the laws they were drawn from; None when all requests are greedy, or K is 0.
        tokens: per request, the draft tokens that are verified.
        proposed: per request, how many drafts it was offered.
        confidence_logits_RK: of all that was drawn, before calibration, if anyone reads them;
            NaN in the rows of requests without a context.
        are_margins: whether these are margins of raw logits in place of log-odds.
    """

    tokens_RK: Tensor
    laws_RKV: Tensor | None
    tokens: tuple[tuple[int, ...], ...]
    proposed: tuple[int, ...]
    confidence_logits_RK: FloatArray | None = None
    are_margins: bool = False

    @property
    def lengths(self) -> tuple[int, ...]:
        """Drafts of each request that are verified."""
        return tuple(map(len, self.tokens))

    @classmethod
    def none(cls, num_requests: int, device: torch.device) -> Drafts:
        """A round without drafts."""
        empty_RK = torch.empty(num_requests, 0, dtype=torch.int64, device=device)
        return cls(empty_RK, None, ((),) * num_requests, (0,) * num_requests)


def draft_limits(requests: Sequence[ActiveRequest], num_drafts: int) -> list[int]:
    """Drafts of each request that can be of use.

    A request without a context (its prompt is read in this round, or the drafter has failed it)
    gets none. The last token that a
    request may take is the one after its drafts, so a draft in its place would be wasted.
    """
    return [min(r.room - 1, num_drafts) if r.drafts else 0 for r in requests]


def propose(
    drafter: Drafter,
    context: PagedCache,
    requests: Sequence[ActiveRequest],
    state: RoundState,
    num_drafts: int,
    *,
    confidences: bool,
    depth: int | None = None,
) -> tuple[Drawing, Proposal]:
    """Ask the drafter for up to `num_drafts` tokens of each request.

    With `confidences` the proposal has them, where anything was drawn: the drafter's own, or else
    the margins of its logits. Without, nothing is spent on them.

    Requests whose draft logits are NaN or infinite have fewer drafts (`Drawing.sound`).
    """
    batch = DraftBatch(
        tables=tuple(request.table for request in requests),
        anchors_R=torch.tensor(
            [request.tokens[-1] for request in requests], device=state.laws.seeds_R.device
        ),
        lengths=tuple(request.cached for request in requests),
        tokens=tuple(request.tokens for request in requests),
        num_drafts=num_drafts,
        confidences=confidences,
        depth=depth,
    )
    drawing = Drawing(state, keeps_logits=confidences)
    proposal = drafter.propose(context, batch, drawing)
    if confidences and drawing.tokens and proposal.confidence_logits_RK is None:
        proposal = replace(proposal, confidence_logits_RK=drawing.margins(), are_margins=True)
    return drawing, proposal


def choose(
    drawing: Drawing,
    proposal: Proposal,
    limits: Sequence[int],
    wanted: Sequence[int],
    confidence_logits_DK: FloatArray | None = None,
) -> Drafts:
    """Keep what the schedule wants verified.

    Args:
        drawing: the tokens drawn for the first D requests.
        proposal: what the drafter says about them.
        limits: most drafts of each of the R requests; 0 behind the first D.
        wanted: what the schedule would verify of each of the D requests.
        confidence_logits_DK: of what was drawn, to be remembered.
    """
    drawn = len(drawing.tokens)
    num_drafted, num_requests = len(drawing.state.rounds), len(limits)
    if drawn == 0:
        return Drafts.none(num_requests, drawing.state.laws.seeds_R.device)
    offered = list(proposal.lengths or (drawn,) * num_drafted)
    for request, count in drawing.sound.items():
        offered[request] = min(offered[request], count)
    proposed = [min(o, most) for o, most in zip(offered, limits, strict=False)]
    tokens_RK = torch.stack(drawing.tokens, dim=1)
    kept = [
        tuple(row[: min(p, w)])
        for row, p, w in zip(tokens_RK.tolist(), proposed, wanted, strict=True)
    ]
    laws_RKV = torch.stack(drawing.laws, dim=1) if drawing.laws else None
    joining = num_requests - num_drafted
    logits_RK = confidence_logits_DK
    if joining:
        tokens_RK = pad(tokens_RK, (0, 0, 0, joining))
        laws_RKV = None if laws_RKV is None else pad(laws_RKV, (0, 0, 0, 0, 0, joining))
        if logits_RK is not None:
            logits_RK = np.pad(logits_RK, ((0, joining), (0, 0)), constant_values=np.nan)
    return Drafts(
        tokens_RK,
        laws_RKV,
        (*kept, *((),) * joining),
        (*proposed, *(0,) * joining),
        logits_RK,
        proposal.are_margins,
    )


def confidence_array(proposal: Proposal) -> FloatArray | None:
    """The proposal's confidence logits as numbers, [D, K] float64."""
    if proposal.confidence_logits_RK is None:
        return None
    return proposal.confidence_logits_RK.double().cpu().numpy()
