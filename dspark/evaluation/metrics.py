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
class RoundCounts:
    """Counts of P prompts at K draft positions.

    Attributes:
        at_risk_PK: rounds that kept all drafts before a position and whose outcome there is known:
            rounds with room for a whole block that no stop token ended earlier.
        kept_PK: of these, rounds that kept the draft.
        verified_PK: rounds at risk with a verified draft at the position.
        whole_P: rounds with room for a whole block.
        sent_P: drafts that these sent to the target.
        rounds_P: all rounds.
        cut_P: rounds ended within their kept drafts by a stop token or the limit.
        gained_P: tokens of all rounds.
        drafted_P, all_sent_P, all_kept_P: proposed, sent and kept drafts of all rounds.
        tokens_P: tokens of the answers, including their first ones.
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
    def of(cls, records: Sequence[Record], num_drafts: int) -> RoundCounts:
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

    def joined(self, other: RoundCounts) -> RoundCounts:
        """The prompts of both."""
        return RoundCounts(
            *(np.concatenate([getattr(self, n), getattr(other, n)]) for n in _COUNT_FIELDS)
        )

    def survival(self, weights_BP: npt.ArrayLike | None = None) -> FloatArray:
        """Prefix survival: the share of rounds that keep at least k drafts, k = 1..K.

        Args:
            weights_BP: multiplicity of each prompt in B resamples; None counts each once.

        Returns:
            [K], or [B, K].
        """
        weights = np.ones(len(self), np.int64) if weights_BP is None else np.asarray(weights_BP)
        at_risk, kept = weights @ self.at_risk_PK, weights @ self.kept_PK
        # A position that no round reached counts as never kept.
        shares = np.divide(kept, at_risk, out=np.zeros(kept.shape), where=at_risk > 0)
        return np.multiply.accumulate(shares, axis=-1)

    def accepted_length(self, weights_BP: npt.ArrayLike | None = None) -> FloatArray:
        """Tokens per round, bonus included: 1 + the sum of `survival`; [] or [B]."""
        result: FloatArray = 1.0 + self.survival(weights_BP).sum(axis=-1)
        return result


_COUNT_FIELDS = tuple(RoundCounts.__dataclass_fields__)


def _count(turns: Sequence[Turn], num_drafts: int) -> tuple[IntArray, list[int]]:
    """[3, K] at risk, kept and verified; and the nine sums."""
    positions = np.zeros((3, num_drafts), np.int64)
    whole = sent = cut = gained = 0
    for turn in turns:
        room = turn.room - 1  # the first token is drawn at prefill
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


def draws(counts: RoundCounts, name: str, seed: int = 0) -> FloatArray:
    """Accepted lengths [B] of B bootstrap resamples of the prompts.

    The resamples depend on the number of prompts and the name alone, so that runs on the same
    prompts are paired.
    """
    generator = np.random.default_rng([seed, len(counts), *name.encode()])
    count = len(counts)
    weights_BP = generator.multinomial(count, np.full(count, 1 / count), RESAMPLES)
    return counts.accepted_length(weights_BP)


def interval(drawn_B: npt.ArrayLike) -> list[float]:
    """The 95 % percentile interval of resampled figures."""
    return [float(x) for x in np.percentile(np.asarray(drawn_B), [2.5, 97.5])]


def figures(counts: RoundCounts, name: str, seed: int = 0) -> dict[str, Any]:
    """Accepted length and related figures of one task.

    Returns:
        JSON keys as in docs/evaluation.md; None for unobserved values.
    """
    whole = int(counts.whole_P.sum())
    rounds = int(counts.rounds_P.sum())
    counts_K = counts.verified_PK.sum(axis=0)
    kept_K = counts.kept_PK.sum(axis=0)
    length = float(counts.accepted_length()) if whole else None
    sent = float(counts.sent_P.sum() / whole) if whole else None
    return {
        "prompts": len(counts),
        "accepted_length": length,
        "ci95": interval(draws(counts, name, seed)) if whole and len(counts) > 1 else None,
        "tokens_per_round": float(counts.gained_P.sum() / rounds) if rounds else None,
        "conditional_acceptance": [
            float(k / n) if n else None for k, n in zip(kept_K, counts_K, strict=True)
        ],
        "conditional_counts": [int(n) for n in counts_K],
        "prefix_survival": [float(s) for s in counts.survival()] if whole else None,
        "rounds": rounds,
        "whole_rounds": whole,
        "cut_rounds": int(counts.cut_P.sum()),
        "tokens": int(counts.gained_P.sum()),
        "generated_tokens": int(counts.tokens_P.sum()),
        "drafted": int(counts.drafted_P.sum()),
        "verified": int(counts.all_sent_P.sum()),
        "accepted": int(counts.all_kept_P.sum()),
        "verified_per_round": sent,
        "wasted_per_round": None if length is None or sent is None else sent - (length - 1),
        # Fig. 5 of the paper: (accepted + 1) / (verified + 1)
        "acceptance": None if length is None or sent is None else length / (1 + sent),
    }
