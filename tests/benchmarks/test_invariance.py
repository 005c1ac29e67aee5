"""What `benchmarks.invariance` calls a dependence on the batch, and what it times."""

import torch

from benchmarks import invariance
from dspark.targets.target import Target


def by_itself(x):
    return 2 * x


def by_number(x):
    """Another last bit where more than 32 rows come."""
    return x * (1 + 1e-3 * (len(x) > 32))


def by_place(x):
    return x + torch.arange(len(x))[:, None] / 64


def test_only_what_depends_on_the_batch_is_reported(monkeypatch):
    operations = [(f.__name__, 8, f) for f in (by_itself, by_number, by_place)]
    monkeypatch.setattr(invariance, "operations", lambda _: iter(operations))
    found = invariance.vary(torch.float32)
    assert found["by_itself"] == {"rows": [], "place": False}
    assert found["by_number"] == {
        "rows": [n for n in invariance.ROWS if n > 32],
        "place": False,
    }
    assert found["by_place"] == {"rows": [], "place": True}
    assert set(found["attention of 64 per head"]) == {"rows", "place", "keys"}


def test_every_forward_is_timed_in_both_modes(pair, monkeypatch):
    monkeypatch.setattr(invariance, "FORWARDS", (("step", 1, 1, 20), ("prompt", 2, 9, 0)))
    targets = {
        mode: Target.load(pair, device="cpu", batch_invariant=mode) for mode in (False, True)
    }
    found = invariance.cost(targets, repeats=3)
    assert set(found) == {"step", "prompt"}
    for row in found.values():
        assert row["default_ms"] > 0
        assert row["invariant_ms"] > 0
