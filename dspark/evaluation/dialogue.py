"""A question while it is asked: its turns so far, and the rounds of the answer at hand."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np

from dspark.data.conversations import Message
from dspark.engine.record import RoundRecord
from dspark.evaluation.records import Turn
from dspark.evaluation.tasks import Question
from dspark.request import Output, Request

_MOST_LOGIT = 30.0


@dataclass
class RoundLog:
    """The rounds of one answer, as the engine plays them.

    Attributes:
        verified, kept: of every round.
        logits: confidence logits of every round, empty where it has not one for each draft of a
            whole block.
        has_own: whether the drafter has confidences of its own, as far as is known.
        committed: tokens so far.
    """

    verified: list[int] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    logits: list[tuple[float, ...]] = field(default_factory=list)
    has_own: bool = True
    committed: int = 0

    def add(self, record: RoundRecord, row: int, num_drafts: int) -> None:
        """Take note of a round; the first one reads the prompt and is no round of drafts."""
        if self.committed:
            self.verified.append(record.lengths[row])
            self.kept.append(record.accepted[row])
            logits_RK = record.confidence_logits_RK
            logits_K = np.empty(0) if logits_RK is None else logits_RK[row]
            self.has_own &= not record.are_margins
            whole = len(logits_K) == num_drafts and not np.isnan(logits_K).any()
            clipped = logits_K.clip(-_MOST_LOGIT, _MOST_LOGIT) if whole else []
            self.logits.append(tuple(round(float(x), 4) for x in clipped))
        self.committed += len(record.committed[row])

    def turn(self, output: Output, room: int, *, plain: bool) -> Turn:
        """The finished answer."""
        stats = output.stats
        if plain:  # nobody watches where nobody drafts
            self.verified = self.kept = [0] * stats.rounds
        cut = False
        if self.kept and not plain:
            overshoot = max(0, self.committed - len(output.token_ids))
            cut = overshoot >= 1  # at least the token behind the drafts was not committed
            self.kept[-1] = min(self.kept[-1], self.kept[-1] + 1 - overshoot)
        ids = ",".join(map(str, output.token_ids)).encode()
        return Turn(
            tokens=len(output.token_ids),
            room=room,
            finish_reason=output.finish_reason,
            drafted=stats.drafted,
            verified=tuple(self.verified),
            kept=tuple(self.kept),
            cut=cut,
            logits=tuple(self.logits) if self.has_own and not plain else None,
            digest=hashlib.sha256(ids).hexdigest()[:12],
            text=output.text,
        )


@dataclass
class Dialogue:
    """A question while it is asked, turn by turn.

    Attributes:
        question: what is asked.
        request: of the turn at hand.
        messages: so far, the user's last turn included; empty for raw text.
        turns: answers so far.
        log: of the answer at hand.
    """

    question: Question
    request: Request
    messages: list[Message]
    turns: list[Turn] = field(default_factory=list)
    log: RoundLog = field(default_factory=RoundLog)
