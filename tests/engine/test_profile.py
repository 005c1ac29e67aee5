"""The cost table as it is measured, kept and found again."""

from __future__ import annotations

import numpy as np
import pytest

from dspark.engine.engine import Engine
from dspark.engine.model import Model
from dspark.engine.schedule_choice import reason, wants_costs
from dspark.errors import CompatibilityError, DSparkWarning, UsageError
from dspark.request import Request, SamplingParams
from dspark.scheduling.calibration import Rounds
from dspark.scheduling.calibration_file import Calibration, calibrate
from dspark.scheduling.cost_table import CostTable


@pytest.fixture
def pair(tiny, target):
    return Model(target, tiny.make_drafter(target), name="tiny drafter")


def test_every_number_of_requests_is_measured_from_none_to_all_of_its_drafts(pair):
    table = pair.profile(max_requests=3, repeats=2)
    places = {(p.requests, p.tokens) for p in table.points}
    assert {(1, tokens) for tokens in range(1, 7)} <= places
    for requests in (1, 2, 3):
        assert {(requests, requests), (requests, 6 * requests)} <= places
    assert all(p.verify_ms > 0 and p.draft_ms > 0 for p in table.points)
    assert table.machine == pair.machine


def test_points_are_what_the_engine_was_seen_to_do(pair, monkeypatch):
    """Rounds really verify as many drafts as their point says."""
    seen, step = set(), Engine.step

    def spy(engine):
        before = [(r.stats.verified, r.stats.rounds) for r in engine.roster.running]
        running = list(engine.roster.running)
        events = step(engine)
        verified = sum(r.stats.verified - b for r, (b, _) in zip(running, before, strict=True))
        if running and all(r.stats.rounds > n for r, (_, n) in zip(running, before, strict=True)):
            seen.add((len(running), len(running) + verified))
        return events

    monkeypatch.setattr(Engine, "step", spy)
    table = pair.profile(max_requests=2, repeats=1)
    assert {(p.requests, p.tokens) for p in table.points} <= seen


@pytest.mark.filterwarnings("ignore::dspark.errors.DSparkWarning")  # of a busy machine's table
def test_lagged_measures_where_nothing_is_known_and_keeps_it(tiny, target, pair):
    requests = [Request((1, 2, 3), SamplingParams(8))]
    assert pair.costs is None
    engine = pair.engine(requests, schedule="lagged")
    engine.run(requests)
    again = Model(target, pair.drafter, name="tiny drafter")
    assert again.costs == pair.costs is not None
    other = Model(target, pair.drafter, name="another drafter")
    assert other.costs is None


def test_the_default_is_lagged_once_calibrated_and_profiled(pair):
    requests = [Request((1, 2, 3), SamplingParams(8))]
    assert pair.engine(requests).schedule.name == "auto"
    pair.profile(max_requests=1, repeats=1)
    assert pair.engine(requests).schedule.name == "auto"

    logits = np.random.default_rng(0).normal(size=(200, 5))
    rounds = Rounds.of(logits, np.arange(200) % 6, np.full(200, 5))
    pair.calibration = Calibration((calibrate(rounds, "block", "greedy"),))
    assert pair.engine(requests).schedule.name == "lagged"
    assert pair.engine(requests, verifier="token").schedule.name == "auto"
    sampled = [Request((1, 2, 3), SamplingParams(8, temperature=1.0))]
    assert pair.engine(sampled).schedule.name == "auto"
    with pytest.warns(DSparkWarning, match=r"no entry .* sampled requests .* uncalibrated"):
        pair.engine(sampled, schedule="lagged")
    with pytest.warns(DSparkWarning, match=r"no entry for block size 3"):
        pair.engine(requests, schedule="threshold", threshold=0.5, block_size=3)


def test_a_doubtful_table_that_was_just_measured_is_said(pair, monkeypatch):
    requests = [Request((1, 2, 3), SamplingParams(8))]
    monkeypatch.setattr(CostTable, "warnings", lambda _table: ["The cost table is flat."])
    with pytest.warns(DSparkWarning, match="is flat"):
        pair.engine(requests, schedule="lagged")


def test_a_table_of_another_machine_is_refused(pair, tmp_path):
    table = pair.profile(max_requests=1, repeats=1)
    path = tmp_path / "costs.json"
    CostTable(table.points, type(table.machine)("other", 64, "bfloat16", "a", "b")).save(path)
    with pytest.raises(CompatibilityError, match="hardware 'other'"):
        pair.use_costs(path)


def test_a_model_without_a_drafter_has_no_costs(target):
    with pytest.raises(UsageError, match="needs a drafter"):
        Model(target).profile()


def test_what_serves_is_said_and_why(pair):
    requests, kinds = [Request((1, 2, 3), SamplingParams(8))], {"greedy"}

    def said():
        return reason(pair, pair.engine(requests), kinds)

    def wanted(name=None):
        return wants_costs(pair, kinds, name, "block", None, 1)

    assert "auto" in said()
    assert "not calibrated" in said()
    assert not wanted()
    logits = np.random.default_rng(0).normal(size=(200, 5))
    rounds = Rounds.of(logits, np.arange(200) % 6, np.full(200, 5))
    pair.calibration = Calibration((calibrate(rounds, "block", "greedy"),))
    assert "no cost table for 1 requests" in said()
    assert wanted()
    assert wanted("auto")
    assert not wanted("fixed")
    pair.profile(max_requests=1, repeats=1)
    assert said() == "Schedule: lagged (calibrated drafter, cost table of this machine)."
    assert not wanted()


def test_measuring_ends_when_its_time_is_up(pair):
    seen = []
    pair.profile(
        max_requests=1, repeats=50, limit_s=0.0, progress=lambda *counts: seen.append(counts)
    )
    assert seen[-1] == (12, 6 * 51)  # one visit to warm up, one that counts
