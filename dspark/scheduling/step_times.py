"""What steps really take: a cost table corrected by the times of finished rounds.

A table is measured once, on short contexts and greedy requests, and a machine is never the same
for long. Four scales correct it: of the step without drafts, of what drafts add to it, of a prompt
row that rides along, and of drafting. They are fitted to the rounds of late and start at 1. Only
finished rounds count, so lengths that are decided from them stay exact (docs/losslessness.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dspark.errors import NumericsError
from dspark.scheduling.cost_table import CostTable

FloatArray = npt.NDArray[np.float64]
# Rounds that a table is worth, and after how many a round weighs half.
PRIOR_ROUNDS, HALF_LIFE = 2.0, 64.0
RIDGE = 0.3
FADE = 0.5 ** (1 / HALF_LIFE)
LEAST, MOST = 0.02, 10.0
# What a point's place on the curve is worth in rounds, and how fast rounds near it fade.
NODE_ROUNDS, NODE_FADE = 3.0, 0.03
# A round that took so much more or less than was expected is taken for this much.
OUTLIER = 2.0


class StepTime(NamedTuple):
    """What a finished round took.

    Attributes:
        requests: R that had a context, and so an anchor row each.
        drafts: verified, of all requests together.
        prompt_rows: further rows of the target's forward.
        drafted: how deep blocks were drafted; 0 where none was.
        draft_ms: milliseconds of drafting and of deciding about drafts.
        verify_ms: milliseconds of the target's forward and verification.
        tokens: committed to those R requests.
        catch_up_ms: milliseconds of reading what rounds without drafts had left for the drafter,
            beside `draft_ms`: what drafting again takes once, not each time.
    """

    requests: int
    drafts: int
    prompt_rows: int
    drafted: int
    draft_ms: float
    verify_ms: float
    tokens: int
    catch_up_ms: float = 0.0

    @property
    def total_ms(self) -> float:
        """Milliseconds of the round, but for catching up."""
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
        self._curves: dict[int, FloatArray] = {}  # corrected, by requests, until the next round
        self._table: dict[tuple[int, int], float] = {}  # of drafting, by requests and depth
        self._draft: dict[int, _Scale] = {}
        self._any_draft = _Scale()

    def covers(self, requests: int) -> bool:
        """Whether the table does."""
        return self.costs.covers(requests)

    @property
    def scales(self) -> tuple[float, float, float]:
        """Of a step without drafts, of what drafts add to it, and of a prompt row."""
        base, drafts, prompt = self._verify.values
        return base, drafts, prompt

    def off_ms(self, requests: int) -> float:
        """Milliseconds of a step that drafts nothing."""
        return float(self.verify_ms(requests, 0)[0])

    def verify_ms(self, requests: int, drafts: int) -> FloatArray:
        """Milliseconds of the target's part of steps that verify 0, 1, ... drafts in all.

        Returns:
            [N + 1], never falling; N is `drafts`, or less where the table's last probe is before.
        """
        if requests not in self._curves:
            self._curves[requests] = self._corrected(requests)
        return self._curves[requests][: drafts + 1]

    def _corrected(self, requests: int) -> FloatArray:
        curve = self.costs.verify_curve(requests)
        base, slope, _ = self._verify.values
        smooth: FloatArray = slope * curve + (base - slope) * curve[0]
        shape = self._shapes.get(requests.bit_length())
        if shape is None:
            return smooth
        shaped = smooth * shape.factors(len(curve), requests)
        found: FloatArray = np.maximum.accumulate(np.clip(shaped, LEAST * curve, MOST * curve))
        return found

    def draft_ms(self, requests: int, depth: int) -> float:
        """Milliseconds of drafting blocks of `depth` drafts."""
        return self._draft_scale(depth) * self._table_draft_ms(requests, depth)

    def learn(self, seen: StepTime) -> None:
        """Take note of a finished round; one outside the table teaches nothing.

        Raises:
            NumericsError: a time is not a number.
        """
        if not math.isfinite(seen.total_ms):
            raise NumericsError("The time of a round is not a number; check the clock.")
        if not seen.requests or not self.costs.covers(seen.requests):
            return
        curve = self.costs.verify_curve(seen.requests)
        if seen.drafts < len(curve):
            first, here, last = (float(curve[at]) for at in (0, seen.drafts, -1))
            row_ms = (last - first) / (len(curve) - 1) if len(curve) > 1 else first
            row_ms = max(row_ms, 0.01 * first)
            parts = (first, here - first, row_ms * seen.prompt_rows)
            place, load = seen.drafts / seen.requests, seen.requests.bit_length()
            shape = self._shapes.setdefault(load, _Shape(self._num_drafts + 1))
            smooth_ms, prompts_ms = self._verify.expected_ms(parts, 2)
            expected_ms = smooth_ms * shape.factor(place) + prompts_ms
            spent_ms = min(max(seen.verify_ms, expected_ms / OUTLIER), expected_ms * OUTLIER)
            self._verify.learn(parts, spent_ms)
            self._curves.clear()
            smooth_ms, prompts_ms = self._verify.expected_ms(parts, 2)
            shape.learn(place, (spent_ms - prompts_ms) / smooth_ms)
        if seen.drafted:
            expected = self._table_draft_ms(seen.requests, seen.drafted)
            own = self._draft.setdefault(seen.drafted, _Scale())
            for scale in (own, self._any_draft):
                scale.learn(expected, seen.draft_ms)

    def _draft_scale(self, depth: int) -> float:
        """Of the depth itself where it has been seen, else of all depths."""
        return self._draft.get(depth, self._any_draft).value

    def _table_draft_ms(self, requests: int, depth: int) -> float:
        found = self._table.get((requests, depth))
        if found is None:
            way = (depth - 1) / (self._num_drafts - 1) if self._num_drafts > 1 else 1.0
            found = self._table[requests, depth] = self.costs.draft_ms(requests, way)
        return found


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
        self._nodes = list(range(count))
        self._rounds = [NODE_ROUNDS] * count
        self._sum = [NODE_ROUNDS] * count

    def factors(self, count: int, requests: int) -> FloatArray:
        """Factors of 0, 1, ... drafts of so many requests together, [count]."""
        factors = [total / rounds for total, rounds in zip(self._sum, self._rounds, strict=True)]
        found: FloatArray = np.interp(np.arange(count) / requests, self._nodes, factors)
        return found

    def factor(self, place: float) -> float:
        """Factor at these drafts per request, which may lie between two nodes."""
        low = min(int(place), len(self._nodes) - 1)
        high = min(low + 1, len(self._nodes) - 1)
        first, second = (self._sum[node] / self._rounds[node] for node in (low, high))
        return first + min(place - low, 1.0) * (second - first)

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
    have become dearer, they keep their proportions. The parts are few and a round is short, so
    this counts in plain numbers, which for three parts takes a fifth of the time of arrays.

    Args:
        count: of parts.
        prior_rounds: what the costs as given are worth.
    """

    def __init__(self, count: int, prior_rounds: float = PRIOR_ROUNDS) -> None:
        self._values: list[float] | None = [1.0] * count
        self._whole = _Scale(prior_rounds)
        self._information = [[0.0] * count for _ in range(count)]
        self._moment = [0.0] * count

    @property
    def values(self) -> list[float]:
        """The factors, as many as parts; found when they are asked for."""
        if self._values is None:
            pull = RIDGE * self._whole.value
            found = _solve_ridge(self._information, self._moment, RIDGE, pull)
            self._values = [min(max(value, LEAST), MOST) for value in found]
        return self._values

    def expected_ms(self, parts: Sequence[float], count: int) -> tuple[float, float]:
        """Milliseconds of the first `count` parts, and of the others."""
        spent = [part * value for part, value in zip(parts, self.values, strict=True)]
        return sum(spent[:count]), sum(spent[count:])

    def learn(self, parts: Sequence[float], spent_ms: float, fade: float = FADE) -> None:
        """A cost of these parts, as given, came to so many milliseconds.

        Args:
            parts: milliseconds, not negative.
            spent_ms: what all of them really took.
            fade: weight of what was known.
        """
        table_ms = sum(parts)
        if not table_ms > 0:
            return
        ratio = self._whole.learn(table_ms, spent_ms, fade)
        shares = [part / table_ms for part in parts]
        for row, mine in zip(self._information, shares, strict=True):
            row[:] = [fade * old + mine * other for old, other in zip(row, shares, strict=True)]
        self._moment = [
            fade * old + mine * ratio for old, mine in zip(self._moment, shares, strict=True)
        ]
        self._values = None


def _solve_ridge(
    matrix: Sequence[Sequence[float]], vector: Sequence[float], ridge: float, pull: float
) -> list[float]:
    """Solve (matrix + ridge I) x = vector + pull by elimination.

    The matrix has no negative eigenvalue, so with a ridge above 0 no pivot comes near 0.
    """
    count = len(vector)
    rows = [[*row, value + pull] for row, value in zip(matrix, vector, strict=True)]
    for i in range(count):
        rows[i][i] += ridge
    for i in range(count):
        for j in range(i + 1, count):
            factor = rows[j][i] / rows[i][i]
            rows[j] = [a - factor * b for a, b in zip(rows[j], rows[i], strict=True)]
    found = [0.0] * count
    for i in reversed(range(count)):
        known = sum(rows[i][j] * found[j] for j in range(i + 1, count))
        found[i] = (rows[i][count] - known) / rows[i][i]
    return found
