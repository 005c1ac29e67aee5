"""Drafting: ask the drafter, draw its tokens, and decide how many of them are verified."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from dspark.attention.paged_cache import PagedCache
from dspark.drafters.base import DraftBatch, Drafter, Proposal
from dspark.drafters.heads import at_least_fp32
from dspark.engine.requests.sequence import ActiveRequest
from dspark.engine.speculation.round_record import FloatArray
from dspark.engine.speculation.rows import compute_rows
from dspark.engine.speculation.sampling_state import Kind, RoundState
from dspark.engine.speculation.trees.forest import Forest
from dspark.engine.speculation.trees.growth import Tree
from dspark.errors import DSparkError, NumericsError
from dspark.sampling.distribution import Distribution, Sparse
from dspark.sampling.logits_processors import Known, greedy_tokens, probs_dtype, token_distribution
from dspark.sampling.token_counts import TokenCounts
from dspark.sampling.verification import coupled_tokens


@dataclass
class Drawing:
    """The engine's side of a proposal: draws each draft token and remembers its distribution.

    Implements `drafters.base.Draw`.

    Attributes:
        state: sampling and keys of randomness.
        keeps_logits: whether `margins` may be asked for.
        tokens: what was drawn, per step [R].
        distributions: what it was drawn from, per step: of each kind of requests but the greedy
            and the coupled, whose drafts are judged without them.
        logits: what came in, per step [R, C]; empty unless `keeps_logits`.
        sound: drafts of a request that are of use, where fewer than were drawn: behind them its
            logits were no numbers, or its mask allows none of the drafter's tokens.
        broken: requests whose draft logits were no numbers.
    """

    state: RoundState
    keeps_logits: bool = False
    tokens: list[Tensor] = field(default_factory=list)
    distributions: dict[Kind, list[Distribution]] = field(default_factory=dict)
    logits: list[Tensor] = field(default_factory=list)
    sound: dict[int, int] = field(default_factory=dict)
    broken: set[int] = field(default_factory=set)
    _room: Tensor | None = None

    def __call__(self, step: int, logits_RC: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Draw draft `step` of every request from its processed logits."""
        known = None if tokens is None else Known(tokens, self.state.sampling.vocab_size)
        mask_RV, faults = self._mask(step)
        if self.keeps_logits:
            self.logits.append(logits_RC)
        groups = self.state.groups()
        if len(groups) == 1:
            [(kind, (_rows, state))] = groups.items()
            tokens_R = self._draw(kind, state, step, logits_RC, known, mask_RV, faults)
        else:
            tokens_R = torch.empty_like(self.state.sampling.seeds_R)
            for kind, (rows_M, state) in groups.items():
                numbers = rows_M.tolist()
                own = {i: faults[r] for i, r in enumerate(numbers) if r in faults}
                tokens_R[rows_M] = self._draw(
                    kind,
                    state,
                    step,
                    logits_RC[rows_M],
                    None if known is None else known.rows(rows_M),
                    None if mask_RV is None else mask_RV[rows_M],
                    own,
                    rows_M,
                )
                faults |= {numbers[i]: fault for i, fault in own.items()}
        self.tokens.append(tokens_R)
        # A row's fault hangs on the drafts before it only, so a length may look at it.
        for request, fault in faults.items():
            self.sound.setdefault(request, step)
            if isinstance(fault, NumericsError):
                self.broken.add(request)
        return tokens_R

    def _draw(
        self,
        kind: Kind,
        state: RoundState,
        step: int,
        logits_MC: Tensor,
        known: Known | None,
        mask_MV: Tensor | None,
        faults: dict[int, DSparkError],
        rows_M: Tensor | None = None,
    ) -> Tensor:
        """Draw draft `step` of the requests of one kind, `rows_M` of all, and keep their laws."""
        chain = state.sampling.draft_chain
        counts = self._counts(state.sampling.counts, step, rows_M)
        if kind.form == "greedy":
            return compute_rows(greedy_tokens, logits_MC, chain, counts, mask_MV, faults, known)
        coupled = kind.verifier == "coupled"
        keeps_room = kind.form == "wide" and not coupled
        room_MC = self._room_of(step, logits_MC) if keeps_room else None
        rule = partial(token_distribution, out=room_MC)
        found = compute_rows(rule, logits_MC, chain, counts, mask_MV, faults, known)
        if coupled:
            return coupled_tokens(found, state.sampling.seeds_R, state.anchors_R + step + 1)
        if room_MC is not None and found.probs_NC.data_ptr() != room_MC.data_ptr():
            found = replace(found, probs_NC=room_MC.copy_(found.probs_NC))
        self.distributions.setdefault(kind, []).append(found)
        return found.draw(state.draft_uniform(step))

    def _room_of(self, step: int, logits_MC: Tensor) -> Tensor:
        """Where a step's numbers go, behind those of the step before: a stack as it lies."""
        if self._room is None:
            shape = (self.state.num_drafts, *logits_MC.shape)
            self._room = torch.empty(shape, dtype=probs_dtype(logits_MC), device=logits_MC.device)
        return self._room[step]

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
        if self.logits[0].shape[1] == 1:  # a single candidate has no rival
            return torch.zeros(len(self.logits[0]), len(self.logits))
        best_RK2 = [logits_RV.topk(2, dim=1).values for logits_RV in self.logits]
        return torch.stack([at_least_fp32(b[:, 0]) - b[:, 1] for b in best_RK2], dim=1)

    def _counts(
        self, counts: TokenCounts | None, step: int, rows_M: Tensor | None
    ) -> TokenCounts | None:
        if counts is None or step == 0:
            return counts
        drafts_MK = torch.stack(self.tokens, dim=1)
        if rows_M is not None:
            drafts_MK = drafts_MK[rows_M]
        requests_M = torch.arange(len(drafts_MK), device=drafts_MK.device)
        return counts.after_drafts(requests_M, torch.full_like(requests_M, step), drafts_MK)

    def stacked(self) -> dict[Kind, Distribution]:
        """The distributions of each kind's requests as rows, step by step."""
        stacks = dict[Kind, Distribution]()
        for kind, parts in self.distributions.items():
            sparse = [part for part in parts if isinstance(part, Sparse)]
            if sparse:
                stacks[kind] = Sparse.stack(sparse)
            elif self._room is not None:
                stacks[kind] = replace(parts[0], probs_NC=self._room[: len(parts)].flatten(0, 1))
        return stacks


@dataclass(frozen=True)
class Drafts:
    """What a round verifies of R requests.

    Attributes:
        tokens_RK: draft tokens; K may be 0, and rows behind a request's length hold anything.
        distributions: those they were drawn from, of each kind of the requests that drafted but
            the greedy and the coupled: first of all these at the first step, and so on.
        tokens: per request, the draft tokens that are verified.
        proposed: per request, how many drafts it was offered.
        confidence_logits_RK: of all that was drawn, before calibration, if anyone reads them;
            NaN in the rows of requests without a context.
        are_margins: whether these are margins of raw logits in place of log-odds.
        forest: the same as trees, where they are some.
        grown: these trees before the schedule pruned them.
    """

    tokens_RK: Tensor
    distributions: Mapping[Kind, Distribution]
    tokens: tuple[tuple[int, ...], ...]
    proposed: tuple[int, ...]
    confidence_logits_RK: FloatArray | None = None
    are_margins: bool = False
    forest: Forest | None = None
    grown: tuple[Tree, ...] = ()

    @property
    def lengths(self) -> tuple[int, ...]:
        """Drafts of each request that are verified."""
        return tuple(map(len, self.tokens))

    def rows(self, kind: Kind, rows_M: Tensor) -> Drafts:
        """The drafts of the requests named, which are all of a kind."""
        numbers = rows_M.tolist()
        return Drafts(
            self.tokens_RK[rows_M],
            {kind: self.distributions[kind]} if kind in self.distributions else {},
            tuple(self.tokens[r] for r in numbers),
            tuple(self.proposed[r] for r in numbers),
        )

    @classmethod
    def none(cls, num_requests: int, device: torch.device) -> Drafts:
        """A round without drafts."""
        empty_RK = torch.empty(num_requests, 0, dtype=torch.int64, device=device)
        return cls(empty_RK, {}, ((),) * num_requests, (0,) * num_requests)

    @classmethod
    def of_trees(cls, forest: Forest, grown: Sequence[Tree], device: torch.device) -> Drafts:
        """The nodes of trees, in the order of their growth, of which the forest has the first."""
        most = max(map(len, grown))
        rows = [[*tree.tokens, *[0] * (most - len(tree))] for tree in grown]
        tokens_RK = torch.tensor(rows, dtype=torch.int64, device=device).view(len(rows), most)
        tokens = tuple(tree.tokens for tree in forest.trees)
        proposed = tuple(map(len, grown))
        return cls(tokens_RK, {}, tokens, proposed, forest=forest, grown=tuple(grown))


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
            [request.tokens[-1] for request in requests], device=state.sampling.seeds_R.device
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
        return Drafts.none(num_requests, drawing.state.sampling.seeds_R.device)
    offered = list(proposal.lengths or (drawn,) * num_drafted)
    for request, count in drawing.sound.items():
        offered[request] = min(offered[request], count)
    proposed = [min(o, most) for o, most in zip(offered, limits, strict=False)]
    tokens_RK = torch.stack(drawing.tokens, dim=1)
    kept = [
        tuple(row[: min(p, w)])
        for row, p, w in zip(tokens_RK.tolist(), proposed, wanted, strict=True)
    ]
    joining = num_requests - num_drafted
    logits_RK = confidence_logits_DK
    if joining:
        tokens_RK = pad(tokens_RK, (0, 0, 0, joining))
        if logits_RK is not None:
            logits_RK = np.pad(logits_RK, ((0, joining), (0, 0)), constant_values=np.nan)
    return Drafts(
        tokens_RK,
        drawing.stacked(),
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
