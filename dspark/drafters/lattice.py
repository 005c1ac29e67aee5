"""The lattice of a block: candidates of every slot, and what each of them says about the next slot.

A parallel drafter's base logits of a slot know nothing of the slots before it; a Markov head's bias
knows the one token before. So what follows any path through the candidates hangs on the path's last
token alone, and a table per slot, a row for each token that may stand before it, holds all there is
to know of every path: a draft tree is chosen in it without asking the drafter again.

Letters: R requests, K slots, P parents, C candidates, r rank, H width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dspark.attention.paged_cache import PagedCache
from dspark.drafters.base import DraftBatch
from dspark.drafters.heads import MarkovHead, at_least_fp32
from dspark.errors import CompatibilityError

Confidence = Callable[[Tensor, Tensor], Tensor | None]
"""(hidden states [.., H], tokens before them [..]) -> confidence logits [..]"""


@dataclass(frozen=True)
class Lattice:
    """Candidates of every slot, and their logits after the likeliest candidates of the slot before.

    Attributes:
        tokens_RKC: candidates of each slot, ascending, int64.
        parents_RKP: the candidates of slot k - 1 that slot k has logits after, by their columns
            there; in the first slot anything, since its only parent is the anchor, whose row is
            repeated.
        logits_RKPC: of slot k's candidates after parent p, at least fp32.
        confidence_logits_RKP: of the first draft of slot k after that parent, before any
            calibration; None for a drafter without confidences.
    """

    tokens_RKC: Tensor
    parents_RKP: Tensor
    logits_RKPC: Tensor
    confidence_logits_RKP: Tensor | None = None


@runtime_checkable
class LatticeDrafter(Protocol):
    """A drafter of which trees can be made."""

    def check_lattice(self) -> None:
        """Refuse a head whose state is not the last token alone."""
        ...

    def lattice(
        self, context: PagedCache, batch: DraftBatch, candidates: int, parents: int
    ) -> Lattice:
        """The lattice of a round: `num_drafts` slots of so many candidates and parents at most."""
        ...


def check_head(head: MarkovHead | None) -> None:
    """Refuse a head whose state is not the last token alone.

    Raises:
        CompatibilityError: it carries a state from slot to slot.
    """
    if head is not None and head.initial_state(head.markov_w1.weight[:1]) is not None:
        raise CompatibilityError(
            "Draft trees need a Markov head that sees one token back (vanilla or gated); this one "
            "carries a state from slot to slot. Leave out tree_nodes."
        )


def build_lattice(
    base_KRV: Tensor,
    hidden_KRH: Tensor,
    anchors_R: Tensor,
    candidates: int,
    parents: int,
    head: MarkovHead | None,
    confidence: Confidence | None,
    known_V: Tensor | None = None,
) -> Lattice:
    """Slot by slot: the candidates' logits after each parent, and which of them are parents next.

    Those are the likeliest by the drafter's own chances, summed over all paths that reach them.

    Args:
        base_KRV: base logits of every slot.
        hidden_KRH: hidden states of the slots.
        anchors_R: the token before the first slot.
        candidates: of each slot at most, C, the likeliest by their base logits.
        parents: of each slot at most, P.
        head: adds to the logits; None adds nothing.
        confidence: gives confidence logits; None leaves them out.
        known_V: the tokens of the columns, ascending, where they are not the vocabulary.
    """
    slots, requests, columns = base_KRV.shape
    width = min(candidates, columns)
    columns_KRC = likeliest(base_KRV, width)
    base_KRC = at_least_fp32(base_KRV.gather(-1, columns_KRC))
    tokens_KRC = columns_KRC if known_V is None else known_V[columns_KRC]
    parents = min(parents, width)
    before_RP = anchors_R[:, None].expand(-1, parents)
    own_RP = anchors_R.new_zeros(requests, parents)
    reached_RP = base_KRC.new_zeros(requests, parents)
    reached_RP[:, 0] = 1
    rows, owns, befores = list[Tensor](), list[Tensor](), list[Tensor]()
    for k in range(slots):
        owns.append(own_RP)
        befores.append(before_RP)
        hidden_RPH = hidden_KRH[k].unsqueeze(1).expand(-1, parents, -1)
        rows.append(_after(base_KRC[k], columns_KRC[k], before_RP, hidden_RPH, head))
        if k + 1 < slots:
            chances_R1C = torch.bmm(reached_RP.unsqueeze(1), rows[-1].softmax(dim=-1))
            reached_RP, own_RP = chances_R1C.squeeze(1).topk(parents, dim=-1)
            before_RP = tokens_KRC[k].gather(1, own_RP)
    scores_KRP = None
    if confidence is not None:
        hidden_KRPH = hidden_KRH.unsqueeze(2).expand(-1, -1, parents, -1)
        scores_KRP = confidence(hidden_KRPH, torch.stack(befores))
    return Lattice(
        tokens_KRC.transpose(0, 1),
        torch.stack(owns, dim=1),
        torch.stack(rows, dim=1),
        None if scores_KRP is None else scores_KRP.transpose(0, 1),
    )


def likeliest(base: Tensor, width: int) -> Tensor:
    """The columns of the highest of logits [.., V], ascending, [.., C]."""
    if base.device.type != "cpu":
        return base.topk(width, dim=-1, sorted=False).indices.sort(dim=-1).values
    # A partial order of everything is several times as quick there as torch's selection of many.
    logits = at_least_fp32(base).numpy()
    first = logits.shape[-1] - width
    columns = np.argpartition(logits, first, axis=-1)[..., first:]
    columns.sort(axis=-1)
    return torch.from_numpy(columns)


def _after(
    base_RC: Tensor,
    columns_RC: Tensor,
    before_RP: Tensor,
    hidden_RPH: Tensor,
    head: MarkovHead | None,
) -> Tensor:
    """Logits [R, P, C] of a slot's candidates after each parent."""
    if head is None:
        return base_RC.unsqueeze(1).expand(-1, before_RP.shape[1], -1)
    feature_RPr, _ = head.step(before_RP, hidden_RPH, None)
    rows_RCr = functional.embedding(columns_RC, head.markov_w2.weight)
    return base_RC.unsqueeze(1) + torch.matmul(feature_RPr, rows_RCr.mT)
