"""Schedules under simulated load, against plain decoding, fixed blocks and hindsight."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.simulated_load import POLICIES, Simulation, lagged, lookahead, prefix
from benchmarks.simulated_tables import noisy, tables
from dspark.scheduling.reliability import reliability
from dspark.simulation.traffic import TRAFFIC, expected_survival_of, record_of

DRAFTS, ROUNDS = 7, 100
LOADS = (1, 2, 4, 11, 32, 64, 150, 256)
KINDS = ("smooth", "staircase", "flat")


@functools.cache
def simulation(traffic, kind, requests):
    record = record_of(TRAFFIC[traffic], requests, DRAFTS, ROUNDS, seed=0)
    return Simulation(record, tables()[kind], expected_survival_of(TRAFFIC[traffic], DRAFTS, 1))


@functools.cache
def reached(policy, traffic, kind, requests):
    """Throughput over hindsight, and over the better of off and fixed."""
    world = simulation(traffic, kind, requests)
    got = world.scheduled(POLICIES[policy]).throughput
    better = max(world.off().throughput, world.fixed().throughput)
    return got / world.hindsight().throughput, got / better


@pytest.mark.parametrize("traffic", TRAFFIC)
def test_the_record_is_calibrated_and_persistent(traffic):
    record = record_of(TRAFFIC[traffic], 32, DRAFTS, 300, seed=0)
    for k in (0, 2, 4):
        survival, stayed = record.survival_TRK[:, :, k].ravel(), record.accepted_TR.ravel() > k
        assert reliability(survival, stayed).ece < 0.02
    first = record.survival_TRK[:, :, 0]
    same = (record.generation_TR[1:] == record.generation_TR[:-1]).ravel()
    now, before = first[1:].ravel()[same], first[:-1].ravel()[same]
    assert np.corrcoef(now, before)[0, 1] > 0.15


@pytest.mark.parametrize("kind", KINDS)
def test_the_tables_are_what_their_names_say(kind):
    table = tables()[kind]
    assert ("flat" in " ".join(table.warnings())) == (kind == "flat")
    assert not any("noisy" in warning for warning in table.warnings())
    steps = np.diff(table.step_ms(64, 64 * DRAFTS))
    assert ((steps < 1e-9).mean() > 0.9) == (kind == "staircase")


@pytest.mark.parametrize("policy", ["lagged", "lookahead"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("traffic", TRAFFIC)
def test_budgets_reach_hindsight_and_never_lose_to_plain_or_fixed(policy, kind, traffic):
    for requests in LOADS:
        over_hindsight, over_better = reached(policy, traffic, kind, requests)
        assert over_hindsight >= 0.95, requests
        assert over_better >= 0.99, requests


@pytest.mark.parametrize("kind", ["smooth", "flat"])
@pytest.mark.parametrize("traffic", TRAFFIC)
def test_algorithm_1_does_as_well_where_there_is_one_peak(kind, traffic):
    for requests in LOADS:
        over_hindsight, over_better = reached("prefix", traffic, kind, requests)
        assert over_hindsight >= 0.95, requests
        assert over_better >= 0.99, requests


def test_algorithm_1_stops_at_stairs_and_a_lookahead_does_not():
    at_stairs = [reached("prefix", "mixed", "staircase", r)[0] for r in LOADS]
    ahead = [reached("lookahead", "mixed", "staircase", r)[0] for r in LOADS]
    assert min(at_stairs) < 0.7
    assert min(ahead) > 0.98


def test_control_verifying_everything_loses_at_high_load():
    world = simulation("hard", "smooth", 256)
    assert world.fixed().throughput < 0.5 * world.off().throughput


def test_control_never_switching_off_loses_at_high_load():
    """The margin at infinity: drafting goes on whatever it costs."""
    world = simulation("hard", "smooth", 256)
    stubborn = Simulation(world.record, world.table, world.expected_K, margin=np.inf)
    assert stubborn.scheduled(prefix).throughput < 0.985 * world.off().throughput


def test_drafting_pauses_only_where_plain_decoding_is_better():
    assert simulation("mixed", "smooth", 4).scheduled(lagged).drafted_rounds == ROUNDS
    drafted = simulation("hard", "smooth", 256).scheduled(lookahead).drafted_rounds
    assert 0 < drafted < ROUNDS / 20


def test_the_oracle_is_above_hindsight_on_outcomes():
    """Reported only: no schedule can know outcomes."""
    world = simulation("mixed", "smooth", 64)
    assert world.oracle().throughput > world.hindsight().throughput


def test_heeding_failing_requests_pays_and_costs_nothing_where_nobody_fails():
    def gain(traffic):
        record = record_of(traffic, 64, DRAFTS, ROUNDS, seed=0)
        world = Simulation(record, tables()["smooth"], expected_survival_of(traffic, DRAFTS, 1))
        heeding, blind = (world.scheduled(lagged, heeds_failures=heeds) for heeds in (True, False))
        return heeding.throughput / blind.throughput

    assert gain(TRAFFIC["mixed"]) > 0.995
    assert gain(replace(TRAFFIC["mixed"], failing=1 / 3)) > 1.05


@pytest.mark.parametrize("kind", KINDS)
def test_a_margin_keeps_a_noisy_table_from_losing_to_fixed_blocks(kind):
    for requests in (1, 2, 4, 11, 32):
        world = simulation("mixed", kind, requests)
        better = max(world.off().throughput, world.fixed().throughput)
        for seed in range(2):
            believed = noisy(world.table, 0.02, seed)
            careful = replace(world, margin=0.02, believed=believed).scheduled(lagged).throughput
            assert careful / better > 0.998
            assert careful / world.hindsight().throughput > 0.95
