"""Record of a round, for calibration, the live page and reports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class RoundRecord:
    """One round of the R requests that took part in it, in its order.

    Attributes:
        request_ids: who took part.
        rounds: which round of each this is, from 0.
        anchors: the last token of each, as the round began.
        greedy: whether each decodes at temperature 0.
        drafts: the tokens that each was offered, verified or not.
        confidence_logits_RK: raw logits of c_k, before any calibration; None where nothing was
            drafted. NaN behind the requests that drafted (the others read their prompt).
        are_margins: whether these are margins of the draft's raw logits in place of log-odds.
        survival_RK: the survivals that the lengths were decided from; None where none were.
        lengths: how many of the drafts were verified.
        accepted: how many of these stayed.
        committed: the kept drafts and the token after them, before stop tokens and limits.
        rows: rows of the target's forward, anchors and parts of prompts included.
        budget: how many drafts earlier rounds were worth verifying of all requests together; None
            under schedules without a budget.
        draft_ms: what drafting took.
        schedule_ms: what deciding the lengths took.
        verify_ms: what target forward and verification took.
        parents: where drafts are nodes of trees, the number of each node's parent, -1 for the
            anchor.
        paths: then the nodes of each request that stayed, from the anchor on.
    """

    request_ids: tuple[int, ...]
    rounds: tuple[int, ...]
    anchors: tuple[int, ...]
    greedy: tuple[bool, ...]
    drafts: tuple[tuple[int, ...], ...]
    confidence_logits_RK: FloatArray | None
    are_margins: bool
    survival_RK: FloatArray | None
    lengths: tuple[int, ...]
    accepted: tuple[int, ...]
    committed: tuple[tuple[int, ...], ...]
    rows: int
    budget: int | None
    draft_ms: float
    schedule_ms: float
    verify_ms: float
    parents: tuple[tuple[int, ...], ...] | None = None
    paths: tuple[tuple[int, ...], ...] | None = None

    def stayed(self, row: int) -> frozenset[int]:
        """The drafts of a request that stayed, by their numbers."""
        return frozenset(range(self.accepted[row]) if self.paths is None else self.paths[row])


Watch = Callable[[RoundRecord], None]


@dataclass
class RoundTimes:
    """Milliseconds of one round: drafting, scheduling, and target forward with verification.

    `catch_up_ms` is the part of drafting that read what earlier rounds without drafts had left.
    """

    draft_ms: float = 0.0
    schedule_ms: float = 0.0
    verify_ms: float = 0.0
    catch_up_ms: float = 0.0


@dataclass(frozen=True)
class Spent:
    """What a finished round took.

    Attributes:
        rows: of the target's forward, anchors and parts of prompts included.
        draft_ms: milliseconds of drafting.
        schedule_ms: of deciding about drafts.
        verify_ms: of the target's forward and verification.
        catch_up_ms: of drafting, the part that read what rounds without drafts had left.
    """

    rows: int
    draft_ms: float
    schedule_ms: float
    verify_ms: float
    catch_up_ms: float = 0.0

    @property
    def steady_ms(self) -> float:
        """Milliseconds of the round, but for catching up."""
        return self.draft_ms - self.catch_up_ms + self.schedule_ms + self.verify_ms
