"""What a user asks and what comes back: plain data, no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from dspark.errors import RequestError, UsageError

FinishReason = Literal["stop", "length", "cancelled", "error"]
Verifier = Literal["token", "block", "coupled"]
VERIFIERS: tuple[Verifier, ...] = ("token", "block", "coupled")


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are drawn.

    Processors act in this order: penalties, logit bias, temperature, top-k, top-p, min-p.

    Attributes:
        max_new_tokens: limit on generated tokens.
        temperature: 0 takes the argmax; above 0 divides the logits.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of most likely tokens whose mass reaches p; 1 keeps all.
        min_p: keep tokens at least this fraction as likely as the most likely one; 0 keeps all.
        repetition_penalty: divides positive and multiplies negative logits of every token of
            prompt and output (Keskar et al. 2019); 1 does nothing.
        presence_penalty: subtracted once from the logits of every token of the output.
        frequency_penalty: subtracted from a token's logit once per occurrence in the output.
        logit_bias: token id -> number added to its logit.
        stop: strings that end the output; the string itself is not part of the output.
        stop_token_ids: token ids that end the output, beside the model's own.
        ignore_eos: do not end at the model's own end tokens.
        seed: names this request's randomness.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values that have no meaning.

        Raises:
            UsageError: a value is outside its range.
        """
        _need(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1")
        _need(
            math.isfinite(self.temperature) and self.temperature >= 0,
            "temperature",
            self.temperature,
            "0 or a positive number",
        )
        _need(self.top_k >= 0, "top_k", self.top_k, "0 (off) or a positive integer")
        _need(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        _need(0 <= self.min_p <= 1, "min_p", self.min_p, "between 0 and 1")
        _need(
            math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0,
            "repetition_penalty",
            self.repetition_penalty,
            "a positive number",
        )
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _need(math.isfinite(value), name, value, "a finite number")
        _need(all(self.stop), "stop", self.stop, "free of empty strings")

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> SamplingParams:
        """Build from a mapping of field names to values.

        Raises:
            UsageError: a name is no field, or a value is outside its range.
        """
        known = [f.name for f in fields(cls)]
        for name in options:
            if name not in known:
                raise UsageError(f"There is no option {name!r}; sampling has {', '.join(known)}.")
        values = dict(options)
        if isinstance(values.get("stop"), str):
            values["stop"] = (values["stop"],)
        return cls(**values)

    def with_seed(self, seed: int) -> SamplingParams:
        """The same parameters with another seed."""
        return replace(self, seed=seed)

    @property
    def has_penalties(self) -> bool:
        """Whether a row's law depends on the tokens before it (beyond the model itself)."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )


def _need(holds: bool, name: str, value: object, remedy: str) -> None:
    if not holds:
        raise UsageError(f"{name} is {value!r}, but must be {remedy}.")


@dataclass(frozen=True)
class Request:
    """One prompt, as token ids, and how to continue it.

    Raises:
        RequestError: the prompt is empty.
    """

    prompt_ids: tuple[int, ...]
    params: SamplingParams = SamplingParams()

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise RequestError("The prompt is empty; give at least one token.")


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
    def accepted_length(self) -> float:
        """Tokens gained per round, the bonus token included (tau of the paper)."""
        return self.tokens / self.rounds if self.rounds else 0.0

    @property
    def conditional_acceptance(self) -> list[float | None]:
        """Per position k: the share of drafts kept, given that all before it were."""
        return [s / o if o else None for s, o in zip(self.survived, self.offered, strict=True)]

    def record_round(self, verified: int, accepted: int, gained: int, *, cut: bool) -> None:
        """Count one round.

        Args:
            verified: drafts sent to the target.
            accepted: drafts kept and committed.
            gained: tokens committed.
            cut: whether the request ended within the drafts, so that nothing is known of the
                draft behind the last one committed.
        """
        self.rounds += 1
        self.tokens += gained
        self.verified += verified
        self.accepted += accepted
        while len(self.offered) < verified:
            self.offered.append(0)
            self.survived.append(0)
        for k in range(accepted if cut else min(accepted + 1, verified)):
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
    """

    prompt: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stats: Stats


def merge_stats(outputs: Sequence[Output]) -> Stats:
    """Sum the statistics of many requests."""
    total = Stats()
    for output in outputs:
        total.add(output.stats)
    return total
