"""Cases of the proof: what one claims, and what was measured."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from dspark.evaluation.proof.worlds import Distance

EXACT, BIASED = 1e-12, 1e-3
"""Total variation below which a distribution is exact, and above which it is biased."""


@dataclass(frozen=True)
class Case:
    """A rule under a schedule, or a wrong variant of one.

    Attributes:
        name: what was enumerated.
        expected: exact, or biased: a control, which must fail or the proof would prove nothing.
        tv_request: total variation between a request's output and plain decoding, the largest of
            all worlds and requests. Where outputs are compared token for token: the share that
            differs.
        tv_joint: the same for all requests together; None where there is one.
        limit: exact must be below, biased above.
        correct: of a control, the distance of the right variant in the same worlds; None where
            that is a case of its own.
        documented: what the literature or the project's own trials found for this mistake, if
            anything; the worlds are others.
        lengths: how many different verification lengths the schedule chose, in the one world
            and setting where these are most; 1 if it looked at nothing.
        holds: whether all else is so that `note` says.
        note: what else was measured.
        cell: of the table of schedules: verifier, schedule, head, number of requests.
    """

    name: str
    expected: Literal["exact", "biased"]
    tv_request: float
    tv_joint: float | None
    limit: float
    correct: float | None = None
    documented: float | None = None
    lengths: int | None = None
    holds: bool = True
    note: str = ""
    cell: tuple[str, str, str, int] | None = None

    @property
    def distance(self) -> float:
        """The larger of both total variations; NaN if one is."""
        return Distance(self.tv_request, self.tv_joint).largest

    @property
    def passed(self) -> bool:
        """Whether the expectation came true; NaN never passes."""
        if self.expected == "exact":
            return self.holds and self.distance < self.limit
        right = self.correct is None or self.correct < EXACT
        return self.holds and self.distance > self.limit and right


def exact(name: str, distance: Distance, *, note: str = "", holds: bool = True) -> Case:
    """A case that must be exact."""
    return Case(name, "exact", distance.request, distance.joint, EXACT, note=note, holds=holds)


def of_schedule(
    verifier: str, schedule: str, head: str, requests: int, distance: Distance, lengths: int
) -> Case:
    """A cell of the table of schedules.

    A schedule that always chose the same lengths would prove nothing, so it fails, except `fixed`.
    """
    number = "one request" if requests == 1 else "two requests"
    return replace(
        exact(f"{verifier} / {schedule} / {head} / {number}", distance),
        lengths=lengths,
        holds=schedule == "fixed" or lengths > 1,
        cell=(verifier, schedule, head, requests),
    )


def control(
    name: str,
    wrong: Distance,
    right: Distance | None = None,
    *,
    limit: float = BIASED,
    documented: float | None = None,
    note: str = "",
    holds: bool = True,
) -> Case:
    """A wrong variant, beside the right one in the same worlds."""
    return Case(
        name,
        "biased",
        wrong.request,
        wrong.joint,
        limit,
        correct=None if right is None else right.largest,
        documented=documented,
        note=note,
        holds=holds,
    )
