"""Findings of a pair check: plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from dspark.errors import DSparkError

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = get_args(Severity)
FEWEST_TOKENS = 24
"""Least number of tokens for a meaningful accepted length or speed."""


@dataclass(frozen=True)
class Finding:
    """One finding.

    Attributes:
        what: what was found, with its figures.
        severity: `error` if the drafter does not work, `warning` if it may cost speed, `note` if
            harmless.
        remedy: what to do.
    """

    what: str
    severity: Severity
    remedy: str

    @classmethod
    def refusal(cls, error: DSparkError) -> Finding:
        """A finding from an error message of the form "fault; remedy"."""
        what, semicolon, remedy = str(error).rpartition("; ")
        if not semicolon:
            remedy = "Correct the drafter's config.json, or use a drafter made for this target."
            return cls(str(error), "error", remedy)
        return cls(f"{what}.", "error", remedy[:1].upper() + remedy[1:])


@dataclass(frozen=True)
class LiveRun:
    """The live prompts at one temperature, plain and with the drafter.

    Attributes:
        temperature: of sampling.
        tokens: gained in rounds with the drafter, all requests together.
        accepted_length: tokens gained per round.
        first_acceptance: share of first drafts accepted; None if none was verified.
        tokens_per_s: with the drafter, end to end.
        plain_tokens_per_s: of an engine without it, same requests.
    """

    temperature: float
    tokens: int
    accepted_length: float
    first_acceptance: float | None
    tokens_per_s: float
    plain_tokens_per_s: float

    @property
    def telling(self) -> bool:
        """Whether it gained enough tokens for a judgement."""
        return self.tokens >= FEWEST_TOKENS

    @property
    def speedup(self) -> float:
        """Tokens per second over plain decoding's."""
        return self.tokens_per_s / self.plain_tokens_per_s


@dataclass(frozen=True)
class Trial:
    """An alternative tried at temperature 0.

    Attributes:
        what: the change, as the rest of a sentence that begins "with".
        remedy: how to make the change permanent.
        tokens: tokens gained, all requests together.
        accepted_length: tokens gained per round.
        other_text: whether it decoded other text than the run it is compared with, which may
            explain part of a gain.
    """

    what: str
    remedy: str
    tokens: int
    accepted_length: float
    other_text: bool = False


@dataclass(frozen=True)
class CheckReport:
    """Result of `check`.

    Attributes:
        findings: errors first.
        runs: live runs, temperature 0 first; empty if none was possible.
        trials: the alternatives tried.
    """

    findings: tuple[Finding, ...]
    runs: tuple[LiveRun, ...] = ()
    trials: tuple[Trial, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether no finding is an error."""
        return self.count("error") == 0

    @property
    def expected_speedup(self) -> float | None:
        """Measured tokens per second over plain decoding's, at temperature 0."""
        return self.runs[0].speedup if self.runs else None

    def count(self, severity: Severity) -> int:
        """Number of findings of this severity."""
        return sum(finding.severity == severity for finding in self.findings)


def by_severity(findings: list[Finding]) -> tuple[Finding, ...]:
    """The findings, errors first, otherwise in the order found."""
    return tuple(sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity)))
