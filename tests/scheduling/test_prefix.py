from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from dspark.errors import UsageError
from dspark.scheduling.budget import fixed_lengths, threshold_lengths


def test_fixed_lengths_are_the_same_for_all():
    lengths = fixed_lengths(3, 5)
    assert lengths.tolist() == [5, 5, 5]
    assert lengths.dtype == np.int64
    assert fixed_lengths(0, 5).tolist() == []
    with pytest.raises(UsageError, match="verification length is -1"):
        fixed_lengths(2, -1)


def test_threshold_lengths_stop_at_the_first_confidence_below():
    confidence = [[0.9, 0.8, 0.7], [0.9, 0.4, 0.9], [0.4, 0.9, 0.9], [0.5, 0.5, 0.5]]
    lengths = threshold_lengths(confidence, 0.5)
    assert lengths.tolist() == [3, 1, 0, 3]
    assert lengths.dtype == np.int64
    assert threshold_lengths(confidence, 0.0).tolist() == [3, 3, 3, 3]
    assert threshold_lengths(confidence, 1.0).tolist() == [0, 0, 0, 0]
    assert threshold_lengths(np.zeros((2, 0)), 0.5).tolist() == [0, 0]
    assert threshold_lengths([[0.9, float("nan"), 0.9]], 0.5).tolist() == [1]


def test_threshold_length_does_not_see_behind_its_first_failure():
    """The length may be decided place by place, as draft tokens appear."""
    generator = np.random.default_rng(0)
    confidence = generator.random((200, 6))
    lengths = threshold_lengths(confidence, 0.3)
    changed = confidence.copy()
    for r, length in enumerate(lengths):
        changed[r, length + 1 :] = generator.random(max(5 - length, 0))
    assert threshold_lengths(changed, 0.3).tolist() == lengths.tolist()


@pytest.mark.parametrize("threshold", [-0.1, 1.5, float("nan")])
def test_a_threshold_outside_its_range_is_refused(threshold):
    with pytest.raises(UsageError, match="between 0 and 1"):
        threshold_lengths([[0.5]], threshold)


def test_importing_scheduling_does_not_import_torch():
    code = (
        "import sys, dspark.scheduling.budget, dspark.scheduling.survival; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
