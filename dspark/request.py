"""What a user asks and what comes back: plain data, no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, Protocol

from dspark.errors import DSparkError, RequestError, UsageError
from dspark.params import MOST_LOGPROBS, SamplingParams, is_integer

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = [
    "VERIFIERS",
    "FinishReason",
    "Logprob",
    "Output",
    "Request",
    "SamplingParams",
    "Stats",
    "TokenMask",
    "Verifier",
    "merge_stats",
]

FinishReason = Literal["stop", "length", "timeout", "cancelled", "error"]
"""Why a request ended.

stop: at one of its stop tokens, a stop string or the model's own end token.
length: at `max_new_tokens`, or where the context is full.
timeout: `timeout_s` had passed.
cancelled: `Engine.cancel`.
error: the model gave no numbers for it, or its mask or stop check failed; `Output.error` says what.

The output holds what there was in every case.
"""
Verifier = Literal["token", "block", "coupled"]
VERIFIERS: tuple[Verifier, ...] = ("token", "block", "coupled")


class TokenMask(Protocol):
    """Which tokens may come next: the hook for constrained decoding.

    A pure function of the output so far: it is asked once per row, for the prefixes that are
    committed and for those that are only drafted, in any order, and must answer the same each
    time. It is never asked about what follows an end token, but may be about what follows a stop
    string, whose answer then changes nothing. If it raises, allows nothing or answers with another
    number of values, the request ends with an error once its output has come to that prefix.
    """

    def allowed(self, output_ids: Sequence[int], /) -> Sequence[bool] | npt.NDArray[np.bool_]:
        """Return one truth value per token of the vocabulary, after `output_ids`."""
        ...


@dataclass(frozen=True)
class Request:
    """One prompt, as token ids, and how to continue it.

    Attributes:
        prompt_ids: the prompt.
        params: how tokens are drawn.
        mask: which tokens may come next; None allows all.
        timeout_s: seconds from `Engine.add` after which the request ends with what it has, also
            while it waits; None sets no limit.
        reproducible: whether its output hangs on prompt, parameters and seed alone, not on load,
            schedule, block size or drafter: it is then verified by `coupled`, whatever the
            engine's verifier, and its tokens are those of plain decoding.
        learn: whether its tokens, features and outcomes go to who learns from them
            (`Engine.collect`). Its prompt is read whole, whatever of it the cache holds.
        prompt_logprobs: report the log-probability of each prompt token but the first, and those of
            this many most likely tokens in its place, 0 to 20; None reports nothing. Such a prompt
            is read whole, whatever of it the cache holds.

    Raises:
        RequestError: the prompt is empty, or holds what is no token id.
        UsageError: the timeout is not a positive number of seconds, or `prompt_logprobs` is none
            of these numbers.
    """

    prompt_ids: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    mask: TokenMask | None = None
    timeout_s: float | None = None
    reproducible: bool = False
    prompt_logprobs: int | None = None
    learn: bool = False

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise RequestError("The prompt is empty; give at least one token.")
        for token in self.prompt_ids:
            if not is_integer(token):
                raise RequestError(f"The prompt has {token!r}, but token ids are integers.")
        if self.timeout_s is not None and not 0 < self.timeout_s < math.inf:
            raise UsageError(
                f"timeout_s is {self.timeout_s!r}, but must be a positive number of seconds."
            )
        wanted = self.prompt_logprobs
        if wanted is not None and not (is_integer(wanted) and 0 <= wanted <= MOST_LOGPROBS):
            raise UsageError(
                f"prompt_logprobs is {wanted!r}, but must be None or from 0 to {MOST_LOGPROBS}."
            )

    def samples(self) -> tuple[Request, ...]:
        """One request per answer that is asked for, each with its own seed."""
        if self.params.n == 1:
            return (self,)
        return tuple(replace(self, params=self.params.sample(i)) for i in range(self.params.n))


@dataclass(frozen=True)
class Logprob:
    """What the model itself thought of a token, before any processor.

    Attributes:
        token_id: the token.
        logprob: its raw log-probability (log-softmax of the row that emitted it).
        top: the most likely tokens of that row with theirs, likeliest first, as many as were asked
            for; of equal ones those with the lowest ids.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class Stats:
    """What decoding one request, or many, took. Times are the engine's (`Engine.clock`).

    Attributes:
        rounds: target forwards that produced tokens of this request (prefill not counted).
        tokens: tokens gained in those rounds (the first token, drawn at prefill, not counted).
        drafted: tokens that the drafter proposed.
        verified: draft tokens sent to the target (the anchor row is not a draft).
        accepted: draft tokens kept.
        survived: survived[k] counts rounds that verified more than k drafts and kept more than k.
        offered: offered[k] counts rounds that verified more than k drafts and kept at least k.
    """

    rounds: int = 0
    tokens: int = 0
    drafted: int = 0
    verified: int = 0
    accepted: int = 0
    survived: list[int] = field(default_factory=list)
    offered: list[int] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, int]:
        """Rounds and drafts, by their names."""
        names = ("rounds", "drafted", "verified", "accepted")
        return {name: getattr(self, name) for name in names}

    @property
    def accepted_length(self) -> float:
        """Tokens gained per round, the bonus token included (tau of the paper)."""
        return self.tokens / self.rounds if self.rounds else 0.0

    @property
    def conditional_acceptance(self) -> list[float | None]:
        """Per position k: the share of drafts kept, given that all before it were."""
        return [s / o if o else None for s, o in zip(self.survived, self.offered, strict=True)]

    def record_round(
        self, verified: int, accepted: int, gained: int, *, cut: bool, reach: int | None = None
    ) -> None:
        """Count one round.

        Args:
            verified: drafts sent to the target.
            accepted: drafts kept and committed.
            gained: tokens committed.
            cut: whether the request ended within the drafts, so that nothing is known of the
                draft behind the last one committed.
            reach: drafts of which something is known; None for a chain, where this is one more
                than was kept, if there is one more.
        """
        self.rounds += 1
        self.tokens += gained
        self.verified += verified
        self.accepted += accepted
        offered = verified if reach is None else reach
        reach = min(accepted + 1, verified) if reach is None else reach
        while len(self.offered) < offered:
            self.offered.append(0)
            self.survived.append(0)
        for k in range(accepted if cut else reach):
            self.offered[k] += 1
            self.survived[k] += accepted > k

    def add(self, other: Stats) -> None:
        """Add the counts of another request."""
        for name in ("rounds", "tokens", "drafted", "verified", "accepted"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("survived", "offered"):
            mine, theirs = getattr(self, name), getattr(other, name)
            mine.extend([0] * (len(theirs) - len(mine)))
            for k, count in enumerate(theirs):
                mine[k] += count


@dataclass(frozen=True)
class Output:
    """A finished request.

    Attributes:
        prompt: the prompt's text, empty when the request came as token ids.
        text: the answer, cut before a stop string and without end tokens.
        token_ids: the tokens that were generated, a closing end token included.
        finish_reason: why it ended.
        stats: what it took.
        logprobs: of each generated token; None where nobody asked.
        fault: what ended it, where that was an error.
        prompt_logprobs: of each prompt token from the second on; None where nobody asked.
    """

    prompt: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stats: Stats
    logprobs: tuple[Logprob, ...] | None = None
    fault: DSparkError | None = None
    prompt_logprobs: tuple[Logprob, ...] | None = None

    @property
    def error(self) -> str | None:
        """The sentence that says what ended it, where that was an error."""
        return None if self.fault is None else str(self.fault)

    def checked(self) -> Output:
        """The output itself, unless an error ended it.

        Raises:
            NumericsError: the model computed NaN or infinite numbers.
            RequestError: the request's mask or stop check failed.
        """
        if self.fault is not None:
            raise self.fault
        return self


def merge_stats(outputs: Sequence[Output]) -> Stats:
    """Sum the statistics of many requests."""
    total = Stats()
    for output in outputs:
        total.add(output.stats)
    return total
