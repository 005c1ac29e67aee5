"""What steps really take: a cost table corrected by the times of finished rounds.

A table is measured once, on short contexts and greedy requests, and a machine is never the same
for long. Four scales correct it: of the step without drafts, of what drafts add to it, of a prompt
row that rides along, and of drafting. They are fitted to the rounds of late and start at 1. Only
finished rounds count, so lengths that are decided from them stay exact (docs/losslessness.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dspark.errors import NumericsError
from dspark.scheduling.cost_table import CostTable

FloatArray = npt.NDArray[np.float64]
# Rounds that a table is worth, and after how many a round weighs half.
PRIOR_ROUNDS, HALF_LIFE = 2.0, 64.0
RIDGE = 0.3
FADE = 0.5 ** (1 / HALF_LIFE)
LEAST, MOST = 0.1, 10.0
# What a point's place on the curve is worth in rounds, and how fast rounds near it fade.
NODE_ROUNDS, NODE_FADE = 3.0, 0.03
# A round that took so much more or less than was expected is taken for this much.
OUTLIER = 2.0


@dataclass(frozen=True)
class StepTime:
    """What a finished round took.

    Attributes:
        requests: R that had a context, and so an anchor row each.
        drafts: verified, of all requests together.
        prompt_rows: further rows of the target's forward.
        drafted: how deep blocks were drafted; 0 where none was.
        draft_ms: milliseconds of drafting and of deciding about drafts.
        verify_ms: milliseconds of the target's forward and verification.
        tokens: committed to those R requests.
    """

    requests: int
    drafts: int
    prompt_rows: int
    drafted: int
    draft_ms: float
    verify_ms: float
    tokens: int

    @property
    def total_ms(self) -> float:
        """Milliseconds of the whole round."""
        return self.draft_ms + self.verify_ms


class StepTimes:
    """A cost table with corrections.

    Args:
        costs: as measured.
        num_drafts: K, the depth that the table's drafting costs are of.
    """

    def __init__(self, costs: CostTable, num_drafts: int) -> None:
        self.costs = costs
        self._num_drafts = num_drafts
        self._verify = Scales(3)
        self._shapes: dict[int, _Shape] = {}
        self._draft: dict[int, _Scale] = {}
        self._any_draft = _Scale()

    def covers(self, requests: int) -> bool:
        """Whether the table does."""
        return self.costs.covers(requests)

    @property
    def scales(self) -> tuple[float, float, float]:
        """Of a step without drafts, of what drafts add to it, and of a prompt row."""
        base, drafts, prompt = self._verify.values
        return float(base), float(drafts), float(prompt)

    def off_ms(self, requests: int) -> float:
        """Milliseconds of a step that drafts nothing."""
        return float(self.verify_ms(requests, 0)[0])

    def verify_ms(self, requests: int, drafts: int) -> FloatArray:
        """Milliseconds of the target's part of steps that verify 0, 1, ... drafts in all.

        Returns:
            [N + 1], never falling; N is `drafts`, or less where the table's last probe is before.
        """
        curve = self.costs.verify_curve(requests)[: drafts + 1]
        base, slope, _ = self._verify.values
        smooth: FloatArray = slope * curve + (base - slope) * curve[0]
        shape = self._shapes.get(requests.bit_length())
        if shape is None:
            return smooth
        found: FloatArray = np.maximum.accumulate(
            smooth * shape.factors(np.arange(len(curve)) / requests)
        )
        return found

    def draft_ms(self, requests: int, depth: int) -> float:
        """Milliseconds of drafting blocks of `depth` drafts."""
        return self._draft_scale(depth) * self._table_draft_ms(requests, depth)

    def learn(self, seen: StepTime) -> None:
        """Take note of a finished round; one outside the table teaches nothing.

        Raises:
            NumericsError: a time is not a number.
        """
        if not np.isfinite(seen.total_ms):
            raise NumericsError("The time of a round is not a number; check the clock.")
        if not seen.requests or not self.costs.covers(seen.requests):
            return
        curve = self.costs.verify_curve(seen.requests)
        if seen.drafts < len(curve):
            row_ms = (curve[-1] - curve[0]) / (len(curve) - 1) if len(curve) > 1 else curve[0]
            row_ms = max(float(row_ms), 0.01 * float(curve[0]))
            parts = (curve[0], curve[seen.drafts] - curve[0], row_ms * seen.prompt_rows)
            self._verify.learn(np.array(parts), seen.verify_ms)
            load = seen.requests.bit_length()
            shape = self._shapes.setdefault(load, _Shape(self._num_drafts + 1))
            smooth_ms, prompts_ms = self._verify.expected_ms(np.array(parts), 2)
            shape.learn(seen.drafts / seen.requests, (seen.verify_ms - prompts_ms) / smooth_ms)
        if seen.drafted:
            expected = self._table_draft_ms(seen.requests, seen.drafted)
            own = self._draft.setdefault(seen.drafted, _Scale())
            for scale in (own, self._any_draft):
                scale.learn(expected, seen.draft_ms)

    def _draft_scale(self, depth: int) -> float:
        """Of the depth itself where it has been seen, else of all depths."""
        return self._draft.get(depth, self._any_draft).value

    def _table_draft_ms(self, requests: int, depth: int) -> float:
        way = (depth - 1) / (self._num_drafts - 1) if self._num_drafts > 1 else 1.0
        return self.costs.draft_ms(requests, way)


class _Scale:
    """A factor of a cost, by the rounds of late, which starts at 1."""

    def __init__(self, prior_rounds: float = PRIOR_ROUNDS) -> None:
        self._rounds = self._sum = prior_rounds

    @property
    def value(self) -> float:
        """The factor."""
        return min(max(self._sum / self._rounds, LEAST), MOST)

    def learn(self, table_ms: float, spent_ms: float, fade: float = FADE) -> float:
        """A cost came to so many milliseconds; the quotient as it is counted."""
        if not table_ms > 0:
            return 1.0
        ratio = min(max(spent_ms / table_ms, self.value / OUTLIER), self.value * OUTLIER)
        self._rounds = fade * self._rounds + 1
        self._sum = fade * self._sum + ratio
        return ratio


class _Shape:
    """Where rounds of one load lie off the corrected table, by drafts per request.

    A single point that was measured badly makes a stair that is not there, which no factor of the
    whole mends.

    Args:
        count: of nodes, at 0, 1, ... drafts per request.
    """

    def __init__(self, count: int) -> None:
        self._nodes = np.arange(count)
        self._rounds = np.full(count, NODE_ROUNDS)
        self._sum = np.full(count, NODE_ROUNDS)

    def factors(self, places_N: FloatArray) -> FloatArray:
        """Factors at these drafts per request."""
        found: FloatArray = np.interp(places_N, self._nodes, self._sum / self._rounds)
        return found

    def learn(self, place: float, factor: float) -> None:
        """A round of so many drafts per request took so many times what was expected."""
        factor = min(max(factor, 1 / OUTLIER), OUTLIER)
        low = min(int(place), len(self._nodes) - 1)
        for node, weight in ((low, 1 - (place - low)), (low + 1, place - low)):
            if weight > 0 and node < len(self._nodes):
                self._rounds[node] += weight * (1 - NODE_FADE * self._rounds[node])
                self._sum[node] += weight * (factor - NODE_FADE * self._sum[node])


class Scales:
    """Factors of the parts of a cost, by least squares over relative errors that fade.

    Ridge regression towards the factor of the whole: where the parts never vary, or all of them
    have become dearer, they keep their proportions.

    Args:
        count: of parts.
        prior_rounds: what the costs as given are worth.

    Attributes:
        values: the factors, [count].
    """

    def __init__(self, count: int, prior_rounds: float = PRIOR_ROUNDS) -> None:
        self.values: FloatArray = np.ones(count)
        self._whole = _Scale(prior_rounds)
        self._information = np.zeros((count, count))
        self._moment = np.zeros(count)
        self._ridge = RIDGE * np.eye(count)

    def expected_ms(self, parts_C: FloatArray, count: int) -> tuple[float, float]:
        """Milliseconds of the first `count` parts, and of the others."""
        spent_C = parts_C * self.values
        return float(spent_C[:count].sum()), float(spent_C[count:].sum())

    def learn(self, parts_C: FloatArray, spent_ms: float, fade: float = FADE) -> None:
        """A cost of these parts, as given, came to so many milliseconds.

        Args:
            parts_C: milliseconds, not negative.
            spent_ms: what all of them really took.
            fade: weight of what was known.
        """
        table_ms = float(parts_C.sum())
        if not table_ms > 0:
            return
        ratio = self._whole.learn(table_ms, spent_ms, fade)
        parts_C = parts_C / table_ms
        self._information = fade * self._information + parts_C[:, None] * parts_C
        self._moment = fade * self._moment + parts_C * ratio
        found = np.linalg.solve(
            self._information + self._ridge, self._moment + RIDGE * self._whole.value
        )
        self.values = np.clip(found, LEAST, MOST)
