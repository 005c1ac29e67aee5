"""Milliseconds of whole steps, added up from a cost table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from dspark.scheduling.cost_table import CostTable, PromptCost
from dspark.simulation.traffic import FloatArray


class Machine:
    """What the steps of one replica take.

    Rows beyond a table's last probe cost what its last rows did. Where a table says nothing of
    prompts (`PromptCost`), their rows cost what rows of verification do; where it says nothing of
    the rest of a step (`StepExtra`), that costs nothing.

    Args:
        costs: of the pair on this machine.
        num_drafts: K, the depth that the table's drafting costs are of.
    """

    def __init__(self, costs: CostTable, num_drafts: int) -> None:
        self.costs = costs
        measured = [point.requests for point in costs.points]
        self._fewest, self.max_requests = min(measured), max(measured)
        self._num_drafts = num_drafts
        self._curves: dict[int, tuple[FloatArray, float]] = {}
        self._draft: dict[tuple[int, int], float] = {}
        plain = [replace(each, ms=each.plain_ms or each.ms) for each in costs.prompts]
        self._prompt = {True: self._prompts(costs.prompts), False: self._prompts(plain)}
        self._plain = self._by_requests("plain_ms") if costs.extras else self._off()
        self._rest = self._by_requests("rest_ms")
        self._schedule = self._by_requests("schedule_ms")
        names = {True: "prompt_ms", False: "plain_prompt_ms"}
        self._beside = {drafter: self._by_requests(name) for drafter, name in names.items()}

    def plain_ms(self, requests: int) -> float:
        """A whole step of an engine without a drafter."""
        return self._plain[requests]

    def verify_ms(self, requests: int, drafts: int) -> float:
        """The target's forward and verification, of requests with so many drafts in all."""
        if requests not in self._curves:
            curve = self.costs.verify_curve(max(requests, self._fewest))
            last = len(curve) // 2
            slope = (curve[-1] - curve[last]) / max(len(curve) - 1 - last, 1)
            self._curves[requests] = (curve, float(slope))
        curve, slope = self._curves[requests]
        over = max(drafts - (len(curve) - 1), 0)
        return float(curve[drafts - over]) + slope * over

    def draft_ms(self, requests: int, depth: int) -> float:
        """Drafting `depth` tokens of each."""
        key = (requests, depth)
        if key not in self._draft:
            way = (depth - 1) / (self._num_drafts - 1) if self._num_drafts > 1 else 1.0
            self._draft[key] = self.costs.draft_ms(max(requests, self._fewest), way)
        return self._draft[key]

    def rest_ms(self, requests: int) -> float:
        """What a step with a drafter takes beside both."""
        return self._rest[requests]

    def schedule_ms(self, requests: int) -> float:
        """What a schedule takes that weighs costs in a round and learns from it."""
        return self._schedule[requests]

    def prompt_ms(self, rows: int, requests: int, *, drafter: bool) -> float:
        """What reading so many rows of prompts adds to a step.

        Args:
            rows: of prompts.
            requests: that decode in the same step; with none, the step is whole.
            drafter: whether they are read for a drafter too.
        """
        if not rows:
            return 0.0
        known, ms, row_ms = self._prompt[drafter]
        over = max(rows - known[-1], 0.0)
        whole_ms = float(np.interp(rows, known, ms) + row_ms * over)
        if not requests:
            return whole_ms
        return max(whole_ms - self._plain[1], 0.0) + self._beside[drafter][requests]

    def _off(self) -> Sequence[float]:
        """Steps of 0, 1, ... requests that draft nothing."""
        counts = range(self.max_requests + 1)
        return [self.costs.off_ms(max(count, self._fewest)) for count in counts]

    def _prompts(self, prompts: Sequence[PromptCost]) -> tuple[FloatArray, FloatArray, float]:
        """Rows and milliseconds of prompts that are known, and what a row beyond them takes."""
        found = sorted((prompt.rows, prompt.ms) for prompt in prompts)
        if not found:
            most = max(self.costs.points, key=lambda point: point.tokens)
            curve = self.costs.verify_curve(most.requests)
            row_ms = float(curve[-1] - curve[0]) / max(len(curve) - 1, 1)
            if not row_ms:  # a single probe says nothing of rows: no row is free
                row_ms = float(curve[0]) / most.requests
            first_ms = self.costs.off_ms(self._fewest)
            return np.array([1.0]), np.array([first_ms]), row_ms
        rows, ms = (np.array(column, dtype=np.float64) for column in zip(*found, strict=True))
        if len(rows) == 1:
            return rows, ms, float(ms[0] / rows[0])
        return rows, ms, float(max(ms[-1] - ms[-2], 0.0) / (rows[-1] - rows[-2]))

    def _by_requests(self, name: str) -> Sequence[float]:
        """A part of steps of 0, 1, ... requests; without requests as for one."""
        wanted = np.arange(self.max_requests + 1)
        known = sorted((extra.requests, getattr(extra, name)) for extra in self.costs.extras)
        if not known:
            return [0.0] * len(wanted)
        requests, ms = zip(*known, strict=True)
        found: list[float] = np.interp(np.maximum(wanted, 1), requests, ms).tolist()
        return found
