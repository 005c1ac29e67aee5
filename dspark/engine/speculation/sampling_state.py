"""Sampling state of a round: what distributions and draws depend on beside the logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dspark.engine.requests.masks import RowMasks
from dspark.engine.requests.sequence import ActiveRequest
from dspark.request import Request, Verifier
from dspark.sampling.logits_processors import Chain
from dspark.sampling.noise import Stream, seed_tensor, uniform
from dspark.sampling.token_counts import TokenCounts

# Bans a token of a draft as surely as minus infinity; but a draft distribution that has no other
# token (a one-hot one) keeps it, and verification, where the ban is infinite, rejects it.
_DRAFT_BAN = -1e9

Form = Literal["greedy", "narrow", "wide"]
"""What can come after a request's tokens: one token, the few that filters leave, or all."""


class Kind(NamedTuple):
    """How the distributions of a request are held and judged, whoever else is in the batch.

    Attributes:
        form: what can come after its tokens.
        verifier: by which rule drafts are judged; greedy requests all count as `coupled`, since
            drafts stay there, too, while they are the target's own tokens.
    """

    form: Form
    verifier: Verifier

    @classmethod
    def of(cls, request: Request, verifier: Verifier) -> Kind:
        """The kind of a request where the engine's verifier is this one."""
        if request.params.temperature == 0:
            return cls("greedy", "coupled")
        form: Form = "narrow" if request.params.has_filters else "wide"
        return cls(form, "coupled" if request.reproducible else verifier)


@dataclass(frozen=True)
class RequestSampling:
    """What stays the same for R running requests from round to round.

    Attributes:
        request_ids: whose they are.
        chain: their processors.
        draft_chain: the same for drafts: a logit bias of minus infinity is a large finite one.
        seeds_R: their seeds, int64.
        logprobs: how many most likely tokens each wants reported; None for nothing at all.
        counts: token counts where a request has penalties, else None.
        kinds: how the distributions of each are held and judged.
        vocab_size: V.
    """

    request_ids: tuple[int, ...]
    chain: Chain
    draft_chain: Chain
    seeds_R: Tensor
    logprobs: tuple[int | None, ...]
    counts: TokenCounts | None
    kinds: tuple[Kind, ...]
    vocab_size: int
    _chain_rows: dict[tuple[int, ...], Chain] = field(default_factory=dict, compare=False)

    @classmethod
    def of(
        cls,
        requests: Sequence[ActiveRequest],
        verifier: Verifier,
        vocab_size: int,
        device: torch.device,
    ) -> RequestSampling:
        """Read the parameters and tokens of `requests`; `verifier` is the engine's."""
        chain = Chain.of([r.request.params for r in requests], device)
        draft_chain, counts = chain, None
        if chain.max_bias_token >= 0:
            bias_values_NB = chain.bias_values_NB.clamp(min=_DRAFT_BAN)
            draft_chain = replace(chain, bias_values_NB=bias_values_NB)
        if chain.penalised:
            prompts = [r.request.prompt_ids for r in requests]
            outputs = [r.output_ids for r in requests]
            counts = TokenCounts.of(prompts, outputs, vocab_size, device)
        return cls(
            request_ids=tuple(r.request_id for r in requests),
            chain=chain,
            draft_chain=draft_chain,
            seeds_R=seed_tensor([r.request.params.seed for r in requests], device),
            logprobs=tuple(r.request.params.logprobs for r in requests),
            counts=counts,
            kinds=tuple(Kind.of(r.request, verifier) for r in requests),
            vocab_size=vocab_size,
        )

    @cached_property
    def groups(self) -> dict[Kind, tuple[Tensor, RequestSampling]]:
        """Requests of each kind that there is, in order, and their sampling without the counts."""
        groups = dict[Kind, tuple[Tensor, RequestSampling]]()
        for kind in sorted(set(self.kinds)):
            numbers = [r for r, own in enumerate(self.kinds) if own == kind]
            groups[kind] = (torch.tensor(numbers, device=self.seeds_R.device), self._rows(numbers))
        return groups

    def _rows(self, numbers: Sequence[int]) -> RequestSampling:
        kinds = tuple(self.kinds[r] for r in numbers)
        forms = {kind.form for kind in kinds}

        def chosen(chain: Chain) -> Chain:
            return replace(
                chain.rows(numbers),
                greedy=forms <= {"greedy"},
                sampled="greedy" not in forms,
                narrow="wide" not in forms,
                filtered=chain.filtered and not forms <= {"wide"},
            )

        return RequestSampling(
            request_ids=tuple(self.request_ids[r] for r in numbers),
            chain=chosen(self.chain),
            draft_chain=chosen(self.draft_chain),
            seeds_R=self.seeds_R[list(numbers)],
            logprobs=tuple(self.logprobs[r] for r in numbers),
            counts=None,
            kinds=kinds,
            vocab_size=self.vocab_size,
        )

    def first(self, count: int) -> RequestSampling:
        """The first `count` requests."""
        if count == len(self.request_ids):
            return self
        counts = self.counts
        if counts is not None:
            counts = TokenCounts(counts.prompt_NV[:count], counts.output_NV[:count])
        return replace(self._rows(range(count)), counts=counts)

    def chain_rows(self, lengths: tuple[int, ...], request_N: Tensor) -> Chain:
        """The processors of ragged rows, 1 + length of each request; the last are remembered."""
        if lengths not in self._chain_rows:
            self._chain_rows.clear()
            self._chain_rows[lengths] = self.chain.rows(request_N)
        return self._chain_rows[lengths]

    def commit(self, committed: Sequence[Sequence[int]]) -> None:
        """Count the tokens that a round committed."""
        if self.counts is None:
            return
        rows = [r for r, tokens in enumerate(committed) for _ in tokens]
        flat = [token for tokens in committed for token in tokens]
        self.counts.commit(
            *(torch.tensor(x, dtype=torch.int64, device=self.seeds_R.device) for x in (rows, flat))
        )


@dataclass(frozen=True)
class RoundState:
    """One round of R requests: their sampling, and the keys of its randomness.

    Uniform numbers are keyed by (seed, round, slot in the block, stream), so that drafting,
    verification and the next token are independent, and every look at a position is fresh.
    Coupled noise is keyed by (seed, position, token) instead, and shared.

    Attributes:
        sampling: processors, verifiers, seeds and counts.
        rounds: round number of each request.
        anchors: position of each anchor (the last committed token).
        num_drafts: drafts per request at most, K.
        masks: which tokens each row allows; None where no request has a mask.
    """

    sampling: RequestSampling
    rounds: tuple[int, ...]
    anchors: tuple[int, ...]
    num_drafts: int
    masks: RowMasks | None = None

    @classmethod
    def of(
        cls,
        requests: Sequence[ActiveRequest],
        sampling: RequestSampling,
        num_drafts: int,
        vocab_size: int,
    ) -> RoundState:
        """Read where `requests` stand."""
        return cls(
            sampling=sampling,
            rounds=tuple(r.round for r in requests),
            anchors=tuple(len(r.tokens) - 1 for r in requests),
            num_drafts=num_drafts,
            masks=RowMasks.of(requests, vocab_size, sampling.seeds_R.device),
        )

    def first(self, count: int) -> RoundState:
        """The state of the first `count` requests."""
        if count == len(self.rounds):
            return self
        rounds, anchors = self.rounds[:count], self.anchors[:count]
        masks = None if self.masks is None else self.masks.first(count)
        return RoundState(self.sampling.first(count), rounds, anchors, self.num_drafts, masks)

    def groups(self) -> dict[Kind, tuple[Tensor, RoundState]]:
        """The requests of each kind, in order, and their state; masks are left out."""
        found = dict[Kind, tuple[Tensor, RoundState]]()
        for kind, (rows_M, sampling) in self.sampling.groups.items():
            if len(self.sampling.groups) == 1:
                return {kind: (rows_M, self)}
            numbers, counts = rows_M.tolist(), self.sampling.counts
            found[kind] = (
                rows_M,
                RoundState(
                    replace(sampling, counts=None if counts is None else counts.rows(rows_M)),
                    tuple(self.rounds[r] for r in numbers),
                    tuple(self.anchors[r] for r in numbers),
                    self.num_drafts,
                ),
            )
        return found

    @cached_property
    def anchors_R(self) -> Tensor:
        """The anchors' positions, int64."""
        return torch.tensor(self.anchors, device=self.sampling.seeds_R.device)

    def draft_uniform(self, step: int) -> Tensor:
        """Uniform numbers [R] that draw draft `step` (0-based)."""
        return self._uniforms[Stream.DRAFT][:, step]

    def draft_uniforms(self, count: int) -> Tensor:
        """Uniform numbers [R, count] that draw the first `count` drafts."""
        return self._uniforms[Stream.DRAFT][:, :count]

    @property
    def next_uniforms(self) -> Tensor:
        """Uniform numbers [R, K + 1] that draw the token after 0 .. K kept drafts."""
        return self._uniforms[Stream.NEXT]

    def verify_uniforms(self, count: int) -> Tensor:
        """Uniform numbers [R, count] that decide about the first `count` drafts."""
        return self._uniforms[Stream.VERIFY][:, :count]

    def next_uniform(self, accepted_R: Tensor) -> Tensor:
        """Uniform numbers [R] that draw the token after the kept drafts."""
        return self._uniforms[Stream.NEXT].gather(1, accepted_R[:, None]).squeeze(1)

    @cached_property
    def _uniforms(self) -> tuple[Tensor, ...]:
        """Per stream [R, K + 1], computed at once: a call costs more than its numbers."""
        seeds_R = self.sampling.seeds_R
        rounds_R = torch.tensor(self.rounds, device=seeds_R.device)
        slots_L = torch.arange(self.num_drafts + 1, device=seeds_R.device)
        streams_S = torch.tensor((Stream.DRAFT, Stream.VERIFY, Stream.NEXT), device=seeds_R.device)
        uniforms_RLS = uniform(
            seeds_R[:, None, None], rounds_R[:, None, None], slots_L[:, None], streams_S
        )
        draft_RL, verify_RL, next_RL = uniforms_RLS.unbind(2)
        return draft_RL, verify_RL, next_RL
