"""Figures of an evaluation, from its records; docs/evaluation.md defines them.

The end of an answer truncates rounds in two ways. The token limit leaves less room than a block
needs: whether a round has room is known before it begins, so excluding such rounds introduces no
bias (Wald). A stop token among the accepted drafts hides the outcome of the next draft: such a
round counts up to there and is censored after it, as in the product-limit estimator (Kaplan & Meier
1958). Without truncation, that estimator is the plain ratio of sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dspark.evaluation.records import Record, Turn

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
RESAMPLES = 2000


@dataclass(frozen=True)
class Tallies:
    """Counts of P prompts at K draft positions.

    Attributes:
        at_risk_PK: rounds that kept all drafts before a position, and whose fate at it is known:
            those with room for a whole block that no stop token ended before.
        kept_PK: of these, rounds that kept the draft.
        verified_PK: of the rounds at risk, those that had a draft verified there.
        whole_P: rounds with room for a whole block.
        sent_P: drafts that these sent to the target.
        rounds_P: all rounds.
        cut_P: rounds that a stop token or the limit ended within their kept drafts.
        gained_P: tokens of all rounds.
        drafted_P, all_sent_P, all_kept_P: drafts of all rounds proposed, sent and kept.
        tokens_P: tokens of the answers, their first ones included.
    """

    at_risk_PK: IntArray
    kept_PK: IntArray
    verified_PK: IntArray
    whole_P: IntArray
    sent_P: IntArray
    rounds_P: IntArray
    cut_P: IntArray
    gained_P: IntArray
    drafted_P: IntArray
    all_sent_P: IntArray
    all_kept_P: IntArray
    tokens_P: IntArray

    @classmethod
    def of(cls, records: Sequence[Record], num_drafts: int) -> Tallies:
        """Count the rounds of each prompt.

        Args:
            records: finished prompts.
            num_drafts: K, drafts of a whole block.
        """
        rows = [_count(record.turns, num_drafts) for record in records]
        per_position = np.array([row[0] for row in rows], np.int64).reshape(
            len(rows), 3, num_drafts
        )
        sums = np.array([row[1] for row in rows], np.int64).reshape(len(rows), 9)
        return cls(*per_position.transpose(1, 0, 2), *sums.T)

    def __len__(self) -> int:
        return len(self.rounds_P)

    def joined(self, other: Tallies) -> Tallies:
        """The prompts of both."""
        return Tallies(
            *(np.concatenate([getattr(self, n), getattr(other, n)]) for n in _TALLY_FIELDS)
        )

    def survival(self, weights_BP: npt.ArrayLike | None = None) -> FloatArray:
        """Prefix survival: the share of rounds that keep at least k drafts, k = 1..K.

        Args:
            weights_BP: how often each prompt counts, for B resamples; None counts each once.

        Returns:
            [K], or [B, K].
        """
        weights = np.ones(len(self), np.int64) if weights_BP is None else np.asarray(weights_BP)
        at_risk, kept = weights @ self.at_risk_PK, weights @ self.kept_PK
        # A position that no round came to counts as one that none keeps.
        shares = np.divide(kept, at_risk, out=np.zeros(kept.shape), where=at_risk > 0)
        return np.multiply.accumulate(shares, axis=-1)

    def accepted_length(self, weights_BP: npt.ArrayLike | None = None) -> FloatArray:
        """Tokens that a round gains, bonus included: 1 + the sum of `survival`; [] or [B]."""
        result: FloatArray = 1.0 + self.survival(weights_BP).sum(axis=-1)
        return result


_TALLY_FIELDS = tuple(Tallies.__dataclass_fields__)


def _count(turns: Sequence[Turn], num_drafts: int) -> tuple[IntArray, list[int]]:
    """[3, K] at risk, kept and verified; and the nine sums."""
    positions = np.zeros((3, num_drafts), np.int64)
    whole = sent = cut = gained = 0
    for turn in turns:
        room = turn.room - 1  # the first token is drawn where the prompt is read
        for n, (verified, kept) in enumerate(zip(turn.verified, turn.kept, strict=True)):
            ends = turn.cut and n == len(turn.kept) - 1
            cut += ends
            gained += kept + (not ends)
            if room > num_drafts:
                whole += 1
                sent += verified
                known = kept if ends else kept + 1
                positions[0, :known] += 1
                positions[1, :kept] += 1
                positions[2, : min(known, verified)] += 1
            room -= kept + 1
    sums = [
        whole,
        sent,
        sum(len(turn.kept) for turn in turns),
        cut,
        gained,
        sum(turn.drafted for turn in turns),
        sum(sum(turn.verified) for turn in turns),
        sum(sum(turn.kept) for turn in turns),
        sum(turn.tokens for turn in turns),
    ]
    return positions, sums


def draws(tallies: Tallies, name: str, seed: int = 0) -> FloatArray:
    """Accepted lengths [B] of B resamples of the prompts, with replacement.

    Prompts of the same number and name are resampled alike, so that runs on the same prompts are
    paired.
    """
    generator = np.random.default_rng([seed, len(tallies), *name.encode()])
    count = len(tallies)
    weights_BP = generator.multinomial(count, np.full(count, 1 / count), RESAMPLES)
    return tallies.accepted_length(weights_BP)


def interval(drawn_B: npt.ArrayLike) -> list[float]:
    """The 95 % percentile interval of resampled figures."""
    return [float(x) for x in np.percentile(np.asarray(drawn_B), [2.5, 97.5])]


def figures(tallies: Tallies, name: str, seed: int = 0) -> dict[str, Any]:
    """Accepted length and all that belongs to it, of one task.

    Returns:
        JSON keys as in docs/evaluation.md; None where nothing was observed.
    """
    whole = int(tallies.whole_P.sum())
    rounds = int(tallies.rounds_P.sum())
    counts_K = tallies.verified_PK.sum(axis=0)
    kept_K = tallies.kept_PK.sum(axis=0)
    length = float(tallies.accepted_length()) if whole else None
    sent = float(tallies.sent_P.sum() / whole) if whole else None
    return {
        "prompts": len(tallies),
        "accepted_length": length,
        "ci95": interval(draws(tallies, name, seed)) if whole and len(tallies) > 1 else None,
        "tokens_per_round": float(tallies.gained_P.sum() / rounds) if rounds else None,
        "conditional_acceptance": [
            float(k / n) if n else None for k, n in zip(kept_K, counts_K, strict=True)
        ],
        "conditional_counts": [int(n) for n in counts_K],
        "prefix_survival": [float(s) for s in tallies.survival()] if whole else None,
        "rounds": rounds,
        "whole_rounds": whole,
        "cut_rounds": int(tallies.cut_P.sum()),
        "tokens": int(tallies.gained_P.sum()),
        "generated_tokens": int(tallies.tokens_P.sum()),
        "drafted": int(tallies.drafted_P.sum()),
        "verified": int(tallies.all_sent_P.sum()),
        "accepted": int(tallies.all_kept_P.sum()),
        "verified_per_round": sent,
        "wasted_per_round": None if length is None or sent is None else sent - (length - 1),
        # Fig. 5 of the paper: (accepted + 1) / (verified + 1)
        "acceptance": None if length is None or sent is None else length / (1 + sent),
    }
