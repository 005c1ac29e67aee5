from __future__ import annotations

import numpy as np
import pytest

from dspark.errors import NumericsError
from dspark.scheduling.survival import confidence, survival


def test_survival_is_the_running_product():
    got = survival([[0.5, 0.5, 0.2], [1.0, 0.0, 0.9]])
    assert got.dtype == np.float64
    assert got[0].tolist() == pytest.approx([0.5, 0.25, 0.05])
    assert got[1].tolist() == [1.0, 0.0, 0.0]


def test_survival_never_increases_whatever_the_rounding():
    generator = np.random.default_rng(0)
    near_one = 1 - generator.random((500, 12)) * 10.0 ** -generator.integers(0, 18, (500, 12))
    for values in (near_one, near_one.astype(np.float32), generator.random((500, 12)) * 1.2):
        assert (np.diff(survival(values), axis=1) <= 0).all()


def test_confidence_is_a_float64_sigmoid():
    logits = np.array([[-1000.0, -2.0, 0.0, 2.0, 1000.0]], dtype=np.float32)
    got = confidence(logits)
    assert got.dtype == np.float64
    assert got[0].tolist() == pytest.approx([0.0, 1 / (1 + np.exp(2.0)), 0.5, 0.880797078, 1.0])


def test_confident_drafts_still_differ():
    """Where an fp32 sigmoid is exactly 1, order would fall to ties."""
    logits = np.array([[18.0, 20.0, 25.0, 30.0]], dtype=np.float32)
    in_float32 = 1 / (1 + np.exp(-logits))
    assert (in_float32 == 1).all()
    assert (np.diff(confidence(logits)[0]) > 0).all()
    assert (confidence(logits) < 1).all()


@pytest.mark.parametrize("function", [survival, confidence])
def test_nan_is_an_error_that_names_the_request(function):
    with pytest.raises(NumericsError, match="request 1 "):
        function([[0.5, 0.5], [0.5, float("nan")]])
