"""The lattice of a block: candidates of every slot, and what each of them says about the next slot.

A parallel drafter's base logits of a slot know nothing of the slots before it; a Markov head's bias
knows the one token before. So what follows any path through the candidates hangs on the path's last
token alone, and a table per slot holds all there is to know of every path: a draft tree is chosen
in it without asking the drafter again. Letters: R requests, K slots, P parents, C candidates, r
rank, H width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from dspark.attention.paged_cache import PagedCache
from dspark.drafters.base import DraftBatch
from dspark.drafters.heads import MarkovHead, at_least_fp32
from dspark.errors import CompatibilityError

Confidence = Callable[[Tensor, Tensor], Tensor | None]
"""(hidden states [.., H], tokens before them [..]) -> confidence logits [..]"""


@dataclass(frozen=True)
class Lattice:
    """Candidates, and their logits after each candidate of the slot before.

    The parent of the first slot is the anchor, whatever its number.

    Attributes:
        tokens_RKC: candidates of each slot, ascending, int64.
        logits_RKPC: of slot k's candidates after candidate p of slot k - 1, at least fp32.
        confidence_logits_RKP: of the first draft of slot k after that candidate, before any
            calibration; None for a drafter without confidences.
    """

    tokens_RKC: Tensor
    logits_RKPC: Tensor
    confidence_logits_RKP: Tensor | None = None


@runtime_checkable
class LatticeDrafter(Protocol):
    """A drafter of which trees can be made."""

    def check_lattice(self) -> None:
        """Refuse a head whose state is not the last token alone."""
        ...

    def lattice(self, context: PagedCache, batch: DraftBatch, candidates: int) -> Lattice:
        """The lattice of a round: `num_drafts` slots of so many candidates, or all it knows."""
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
    head: MarkovHead | None,
    confidence: Confidence,
    known_V: Tensor | None = None,
) -> Lattice:
    """Candidates by their base logits, and everything that their parents add.

    Args:
        base_KRV: base logits of every slot.
        hidden_KRH: hidden states of the slots.
        anchors_R: the token before the first slot.
        candidates: of each slot at most, C.
        head: adds to the logits; None adds nothing.
        confidence: gives confidence logits.
        known_V: the tokens of the columns, ascending, where they are not the vocabulary.
    """
    slots, requests, columns = base_KRV.shape
    count = min(candidates, columns)
    columns_KRC = base_KRV.topk(count, dim=-1, sorted=False).indices.sort(dim=-1).values
    base_KRC = at_least_fp32(base_KRV.gather(-1, columns_KRC))
    tokens_KRC = columns_KRC if known_V is None else known_V[columns_KRC]
    before_KRP = anchors_R.view(1, -1, 1).expand(slots, -1, count).clone()
    before_KRP[1:] = tokens_KRC[:-1]
    hidden_KRPH = hidden_KRH.unsqueeze(2).expand(-1, -1, count, -1)
    logits_KRPC = base_KRC.unsqueeze(2)
    if head is None:
        logits_KRPC = logits_KRPC.expand(-1, -1, count, -1)
    else:
        feature_KRPr, _ = head.step(before_KRP, hidden_KRPH, None)
        rows_KRCr = torch.nn.functional.embedding(columns_KRC, head.markov_w2.weight)
        logits_KRPC = logits_KRPC + torch.matmul(feature_KRPr, rows_KRCr.mT)
    scores_KRP = confidence(hidden_KRPH, before_KRP)
    return Lattice(
        tokens_KRC.transpose(0, 1),
        logits_KRPC.transpose(0, 1),
        None if scores_KRP is None else scores_KRP.transpose(0, 1),
    )
