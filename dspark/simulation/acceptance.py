"""Acceptance profile: which drafts of an answer would stay, and with what confidence.

An answer is a stream of tokens, each of which the drafter foresees or not. A round that starts
behind token t keeps the drafts up to the first token that it does not foresee. So rounds may start
and be cut anywhere, whatever schedule is simulated, and a schedule that verifies whole blocks finds
the rounds of the record again, one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from dspark.errors import UsageError
from dspark.scheduling.survival import confidence, survival
from dspark.simulation.traffic import FloatArray, IntArray, Traffic, record_of
from dspark.simulation.trees import Trees, TreeStream

_STREAMS, _ROUNDS = 512, 64
_STEEPEST = 30.0  # a logit whose sigmoid is as good as 0 or 1


@dataclass(frozen=True)
class Stream:
    """One answer's rounds, in each of which a whole block was verified if there was room.

    Attributes:
        kept_N, verified_N: drafts that stayed, and that were verified.
        logits_NK: calibrated logits of the confidences of all K drafts.
        trees: that were verified in place of blocks, kept as deep as `kept_N` says.
    """

    kept_N: IntArray
    verified_N: IntArray
    logits_NK: FloatArray
    trees: TreeStream | None = None


@dataclass(frozen=True)
class Acceptance:
    """Streams of many answers, end to end in flat arrays; each repeats itself where it ends.

    Attributes:
        run_T: how many drafts stay of a block whose first draft is token t, 0..K.
        logits_TK: calibrated logits of such a block's confidences.
        starts_S, lengths_S: where each of the S streams lies.
        survival_K: share of recorded rounds that keep at least k drafts.
        source: what it was made of.
        trees: what becomes of trees; None where the record is of chains, which says nothing of
            lower ranks.
    """

    run_T: IntArray
    logits_TK: FloatArray
    starts_S: IntArray
    lengths_S: IntArray
    survival_K: FloatArray
    source: str
    trees: Trees | None = None

    @cached_property
    def survival_TK(self) -> FloatArray:
        """Chance of each draft of such a block to stay, as its confidences have it."""
        return survival(confidence(self.logits_TK))

    def kept(self, places_R: IntArray, lengths_R: Sequence[int], *, trees: bool) -> list[int]:
        """Drafts that stay of those verified, of blocks or trees whose first draft is a token.

        Args:
            places_R: numbers of these tokens.
            lengths_R: drafts of each, or nodes, that are verified.
            trees: whether they are nodes.
        """
        if trees and self.trees is not None:
            return self.trees.kept(places_R, lengths_R)
        found: list[int] = np.minimum(self.run_T[places_R], lengths_R).tolist()
        return found

    @property
    def num_drafts(self) -> int:
        """Drafts of a block, K."""
        return len(self.survival_K)

    @classmethod
    def of(
        cls, streams: Sequence[Stream], survival_K: FloatArray, source: str, seed: int = 0
    ) -> Acceptance:
        """Join streams.

        Args:
            streams: at least one, none empty.
            survival_K: of their rounds.
            source: names them.
            seed: decides whether a draft would have stayed that no record tells of: the one behind
                a block that was kept whole. It stays as often as a block's last draft does.
        """
        generator = np.random.default_rng(seed)
        before_K = np.concatenate(([1.0], survival_K[:-1]))
        stays_K = np.divide(survival_K, before_K, out=np.zeros_like(survival_K), where=before_K > 0)
        runs, logits = [], []
        for stream in streams:
            ends_N = np.cumsum(stream.kept_N + 1)
            foreseen_T = np.ones(ends_N[-1], dtype=bool)
            last_N = np.minimum(stream.verified_N, len(stays_K) - 1)
            lucky_N = generator.random(len(ends_N)) < stays_K[last_N]
            foreseen_T[ends_N - 1] = lucky_N & (stream.kept_N == stream.verified_N)
            if stream.trees is not None:
                foreseen_T &= stream.trees.first_T
            runs.append(_runs(foreseen_T, len(stays_K)))
            logits.append(_logits(stream))
        lengths_S = np.array([len(run) for run in runs])
        starts_S = np.cumsum(lengths_S) - lengths_S
        trees = [stream.trees for stream in streams if stream.trees is not None]
        return cls(
            np.concatenate(runs),
            np.concatenate(logits),
            starts_S,
            lengths_S,
            survival_K,
            source,
            Trees.of(trees, len(stays_K)) if trees else None,
        )

    def shortened(self, num_drafts: int) -> Acceptance:
        """The same answers with shorter blocks."""
        return replace(
            self,
            run_T=np.minimum(self.run_T, num_drafts),
            logits_TK=self.logits_TK[:, :num_drafts],
            survival_K=self.survival_K[:num_drafts],
            trees=None,
        )


def _runs(foreseen_T: np.ndarray, num_drafts: int) -> IntArray:
    """From each token on, how many in a row are foreseen, up to K, the end joined to the start."""
    around = np.resize(foreseen_T, len(foreseen_T) + num_drafts - 1)
    windows_TK = np.lib.stride_tricks.sliding_window_view(around, num_drafts)
    runs_T: IntArray = np.logical_and.accumulate(windows_TK, axis=1).sum(axis=1)
    return runs_T


def _logits(stream: Stream) -> FloatArray:
    """Of a block that starts within a round: what is left of its logits, then the next round's."""
    count, num_drafts = stream.logits_NK.shape
    round_T = np.repeat(np.arange(count), stream.kept_N + 1)
    starts_N = np.cumsum(stream.kept_N + 1) - (stream.kept_N + 1)
    column_TK = (np.arange(len(round_T)) - starts_N[round_T])[:, None] + np.arange(num_drafts)
    over_TK = column_TK >= num_drafts
    row_TK = (round_T[:, None] + over_TK) % count
    found: FloatArray = stream.logits_NK[row_TK, column_TK - num_drafts * over_TK]
    return found


def synthetic(
    survival_K: Sequence[float], traffic: Traffic | None = None, seed: int = 0
) -> Acceptance:
    """A profile from a table of survivals; how answers differ is assumed (`traffic`).

    Args:
        survival_K: share of rounds that keep at least k drafts, for k = 1..K; never rising.
        traffic: how much ease differs between and within answers; its `ease` is not used.
        seed: of the draws.

    Raises:
        UsageError: these are no survivals.
    """
    wanted_K = np.array(survival_K, dtype=np.float64)
    falling = np.diff(wanted_K, prepend=1.0) <= 0
    if not (len(wanted_K) and falling.all() and (wanted_K >= 0).all()):
        raise UsageError(
            f"Survivals must lie between 0 and 1 and never rise, but are {list(survival_K)}; give "
            "for each position the share of rounds that keep so many drafts."
        )
    traffic = replace(traffic or Traffic(), ease=0.0, life=np.inf, failing=0.0)
    slope_K = _ease(wanted_K, float(np.hypot(traffic.between, traffic.within)))
    record = record_of(traffic, _STREAMS, len(wanted_K), _ROUNDS, seed, slope_K)
    before_TRK = np.concatenate(
        [np.ones_like(record.survival_TRK[..., :1]), record.survival_TRK[..., :-1]], axis=-1
    )
    tiny = np.finfo(np.float64).tiny
    confidence_TRK = np.clip(record.survival_TRK / np.maximum(before_TRK, tiny), tiny, 1 - 1e-13)
    logits_TRK = np.log(confidence_TRK) - np.log1p(-confidence_TRK)
    whole_T = np.full(_ROUNDS, len(wanted_K))
    streams = [Stream(record.accepted_TR[:, r], whole_T, logits_TRK[:, r]) for r in range(_STREAMS)]
    return Acceptance.of(streams, wanted_K, "a table of survivals", seed)


def _ease(survival_K: FloatArray, spread: float) -> FloatArray:
    """Logits of each position's mean confidence that give these survivals, whatever the spread."""
    nodes_Z, weights_Z = np.polynomial.hermite_e.hermegauss(41)
    alive_Z = weights_Z / weights_Z.sum()
    found = []
    for wanted in survival_K:
        low, high = -_STEEPEST, _STEEPEST
        for _ in range(60):
            middle = (low + high) / 2
            stays_Z = 1 / (1 + np.exp(-(middle + spread * nodes_Z)))
            low, high = (middle, high) if alive_Z @ stays_Z < wanted else (low, middle)
        alive_Z = alive_Z / (1 + np.exp(-(high + spread * nodes_Z)))
        found.append(high)
    return np.array(found)
