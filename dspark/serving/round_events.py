"""RoundEvent: what one round drafted, verified and accepted for one answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dspark.engine.requests.sequence import Piece
from dspark.engine.speculation.round_record import FloatArray, RoundRecord

TokenText = Callable[[int], str]
"""The text of one token, by its id."""
Owner = tuple[str, int]
"""(request id, number of the answer)"""


@dataclass(frozen=True)
class Token:
    """A token and its text."""

    token_id: int
    text: str


@dataclass(frozen=True)
class DraftToken:
    """One draft of a block.

    Attributes:
        token_id: the token.
        text: its text.
        confidence: calibrated probability that it stays, given that those before it do; None
            where nobody asked the drafter.
        survival: the product of the confidences up to it.
        sent: whether the schedule had it verified.
        accepted: whether it became part of the output.
        parent: the draft before it, by its number; -1 for the anchor. Of a chain it is the one
            before in the block.
    """

    token_id: int
    text: str
    confidence: float | None
    survival: float | None
    sent: bool
    accepted: bool
    parent: int


@dataclass(frozen=True)
class RoundEvent:
    """One round of one answer.

    Attributes:
        request_id: as the client's header `x-request-id` or the server named it.
        answer: number of the answer, from 0, where a request asked for several.
        round: number of the round, from 0; after a pause, numbers may be missing.
        time_s: when it ended, seconds since 1970.
        anchor: the last token before the round; None under plain decoding, which has no blocks.
        drafts: the block, in order, or the nodes of a tree as they grew; empty where nothing was
            drafted.
        next_token: what the target drew after the kept drafts: the corrected token, or the bonus
            token where all that were sent stayed; None where the output ended within the drafts.
        is_bonus: whether every draft that was sent was accepted; of a tree, whether nothing that
            was sent could have come next.
        requests: answers that took part in the round.
        verified: drafts sent to the target, of all requests together.
        rows: rows of the target's forward, of all requests, parts of prompts included; None under
            plain decoding.
        budget: drafts that earlier rounds were worth verifying, of all requests together; None
            under schedules without a budget.
        draft_ms: what drafting took, for all requests together.
        schedule_ms: what deciding the lengths took.
        verify_ms: what target forward and verification took.
    """

    request_id: str
    answer: int
    round: int
    time_s: float
    anchor: Token | None = None
    drafts: tuple[DraftToken, ...] = ()
    next_token: Token | None = None
    is_bonus: bool = False
    requests: int = 1
    verified: int = 0
    rows: int | None = None
    budget: int | None = None
    draft_ms: float = 0.0
    schedule_ms: float = 0.0
    verify_ms: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """The event as JSON can hold it, keys as the attributes."""
        return asdict(self)


def round_events(
    record: RoundRecord,
    pieces: Mapping[int, Sequence[Piece]],
    owners: Mapping[int, Owner],
    text: TokenText,
    time_s: float,
) -> list[RoundEvent]:
    """One event for each answer that has an owner.

    Args:
        record: the round.
        pieces: what each request, by the engine's number, really gained in it: up to a stop.
        owners: of the requests that someone listens to, by the engine's number.
        text: of a token.
        time_s: when the round ended.
    """
    return [
        _event(record, row, owners[number], pieces.get(number, ()), text, time_s)
        for row, number in enumerate(record.request_ids)
        if number in owners
    ]


def _event(
    record: RoundRecord,
    row: int,
    owner: Owner,
    gained: Sequence[Piece],
    text: TokenText,
    time_s: float,
) -> RoundEvent:
    drafts, length = record.drafts[row], record.lengths[row]
    kept = min(record.accepted[row], len(gained))
    parents = range(-1, len(drafts) - 1) if record.parents is None else record.parents[row]
    survivals, confidences = _beliefs(record.survival_RK, row, parents)
    path = sorted(record.stayed(row))[:kept]
    end = path[-1] if path else -1
    last = gained[kept].token_id if len(gained) > kept else None
    anchor = record.anchors[row]
    return RoundEvent(
        request_id=owner[0],
        answer=owner[1],
        round=record.rounds[row],
        time_s=time_s,
        anchor=Token(anchor, text(anchor)),
        drafts=tuple(
            DraftToken(
                token,
                text(token),
                confidence=confidences[k],
                survival=survivals[k],
                sent=k < length,
                accepted=k in path,
                parent=parents[k],
            )
            for k, token in enumerate(drafts)
        ),
        next_token=None if last is None else Token(last, text(last)),
        is_bonus=last is not None and end not in parents[:length],
        requests=len(record.request_ids),
        verified=sum(record.lengths),
        rows=record.rows,
        budget=record.budget,
        draft_ms=record.draft_ms,
        schedule_ms=record.schedule_ms,
        verify_ms=record.verify_ms,
    )


def _beliefs(
    survival_RK: FloatArray | None, row: int, parents: Sequence[int]
) -> tuple[list[float | None], list[float | None]]:
    """Survivals and confidences of drafts with these parents; None where there are none."""
    count = len(parents)
    if survival_RK is None or row >= len(survival_RK) or survival_RK.shape[1] < count:
        return [None] * count, [None] * count
    survival_K = survival_RK[row, :count]
    before_K = np.append(survival_K, 1.0)[list(parents)]
    confidence_K = np.divide(
        survival_K, before_K, out=np.zeros_like(survival_K), where=before_K > 0
    )
    return list(map(float, survival_K)), list(map(float, confidence_K))


def plain_event(
    owner: Owner, number: int, piece: Piece, requests: int, step_ms: float, time_s: float
) -> RoundEvent:
    """The event of a step of plain decoding: one token, no block.

    Args:
        owner: whose answer it is.
        number: of the token, from 0.
        piece: the token.
        requests: that took part in the step.
        step_ms: what the step took.
        time_s: when it ended.
    """
    return RoundEvent(
        request_id=owner[0],
        answer=owner[1],
        round=number,
        time_s=time_s,
        next_token=Token(piece.token_id, piece.text),
        requests=requests,
        verify_ms=step_ms,
    )
