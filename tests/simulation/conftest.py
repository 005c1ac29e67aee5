"""Cost tables and profiles of small simulations."""

import numpy as np
import pytest

from dspark.scheduling.cost_table import CostPoint, CostTable, MachineKey, PromptCost, StepExtra
from dspark.simulation.acceptance import Acceptance, Stream

MACHINE = MachineKey("test", 1, "float32", "tiny", "tiny")
DRAFTS = 4


@pytest.fixture
def costs():
    """Steps of 10 ms and 1/4 ms a row, drafting 2 ms; prompts 12 ms and 1/8 ms a row."""
    points = tuple(
        CostPoint(r + n, r, 10 + (r + n) / 4, 2.0, 0.5)
        for r in (1, 2, 4, 8)
        for n in (0, r, 2 * r, DRAFTS * r)
    )
    prompts = (PromptCost(8, 13.0), PromptCost(80, 22.0))
    extras = tuple(StepExtra(r, 9 + r / 4, 1.0, 0.5) for r in (1, 8))
    return CostTable(points, MACHINE, prompts, extras)


@pytest.fixture
def alternating():
    """One answer whose rounds keep 4, 0, 2 and 1 drafts, over and over."""
    kept = np.array([4, 0, 2, 1])
    stream = Stream(kept, np.full(4, DRAFTS), np.zeros((4, DRAFTS)))
    survival = np.array([(kept >= k).mean() for k in range(1, DRAFTS + 1)])
    return Acceptance.of([stream], survival, "test")
