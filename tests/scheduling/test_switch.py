from __future__ import annotations

import numpy as np
import pytest

from dspark.errors import NumericsError, UsageError
from dspark.scheduling.draft_switch import PROBE_SHARE, DraftSwitch


def rounds(switch, gain, count):
    return [switch.decide(gain) for _ in range(count)]


def test_on_while_drafting_gains():
    assert all(rounds(DraftSwitch(), 1.4, 500))
    assert all(rounds(DraftSwitch(margin=0.02), 0.99, 500)), "within the margin"


def test_off_is_never_for_ever_and_probes_grow_rare():
    switch = DraftSwitch(first_pause=4, longest_pause=32)
    drafted = np.flatnonzero(rounds(switch, 0.5, 300))
    assert drafted[0] == 0, "a load not seen yet is probed"
    assert np.diff(drafted).tolist()[:6] == [5, 9, 17, 33, 33, 33]
    assert (
        drafted.tolist()
        == np.flatnonzero(rounds(DraftSwitch(first_pause=4, longest_pause=32), 0.5, 300)).tolist()
    ), "deterministic"


def test_one_bad_round_is_no_reason_to_stop_and_many_are():
    switch = DraftSwitch(memory=0.8)
    rounds(switch, 1.5, 20)
    assert switch.decide(0.5)
    assert not all(rounds(switch, 0.5, 20))
    at_once = DraftSwitch(memory=0.0)
    rounds(at_once, 1.5, 20)
    assert not at_once.decide(0.5)


def test_it_comes_back_when_the_promise_does():
    switch = DraftSwitch()
    rounds(switch, 0.5, 100)
    back = rounds(switch, 2.0, 10)
    assert back[-1]
    assert np.argmax(back) < 5


def test_pauses_shrink_while_on():
    switch = DraftSwitch(memory=0.0, first_pause=4, longest_pause=64)
    rounds(switch, 0.5, 400)
    rounds(switch, 2.0, 1)
    drafted = np.flatnonzero(rounds(switch, 0.5, 100))
    assert drafted[0] == 32
    rounds(switch, 2.0, 10)
    assert np.flatnonzero(rounds(switch, 0.5, 100))[0] == 4


def test_bad_values_are_refused():
    for bad in (
        {"margin": -0.1},
        {"margin": float("nan")},
        {"memory": 1.0},
        {"memory": -0.1},
        {"first_pause": 0},
        {"first_pause": 8, "longest_pause": 4},
    ):
        with pytest.raises(UsageError):
            DraftSwitch(**bad)
    with pytest.raises(NumericsError, match="NaN"):
        DraftSwitch().decide(float("nan"))


def test_what_a_probe_lost_says_when_the_next_may_come():
    dear, cheap = DraftSwitch(), DraftSwitch()
    for switch, lost in ((dear, 1.5), (cheap, -0.5)):
        assert switch.decide(0.5)
        assert switch.probes
        switch.lost(lost)
    assert np.flatnonzero(rounds(cheap, 0.5, 400))[0] == 8
    assert np.flatnonzero(rounds(dear, 0.5, 400))[0] == 1.5 / PROBE_SHARE
    assert not DraftSwitch().probes


def test_while_it_is_off_few_rounds_need_ask_and_probes_come_as_before():
    asked, probes = [], []
    for sparing in (True, False):
        switch, drafted = DraftSwitch(), []
        for number in range(600):
            if sparing and switch.rests(8 if number < 300 else 9):
                continue
            asked.append(sparing)
            if switch.decide(0.5):
                drafted.append(number)
        probes.append(drafted)
    assert asked.count(True) < 0.35 * asked.count(False)
    assert probes[0] == probes[1]
    switch = DraftSwitch()
    rounds(switch, 0.5, 12)
    assert switch.rests(1) is switch.rests(2) is False  # another load may be worth drafting for


def test_what_others_promised_does_not_count_for_those_who_come_in_their_place():
    """With one user every new request is a clean slate; of eight, it is an eighth of one."""
    for load in (1, 8):
        switch = DraftSwitch()
        rounds(switch, 0.5, 12)
        while switch.rests(load):
            pass
        asked = 0
        for newcomers in (1, *[0] * 20):
            if switch.rests(load, newcomers):
                continue
            asked += 1
            if switch.decide(1.3) and not switch.probes:
                break
        assert (asked == 1) == (load == 1)


def test_a_few_of_many_newcomers_end_no_rest():
    switch = DraftSwitch()
    rounds(switch, 0.5, 100)
    while not switch.rests(32):
        switch.decide(0.5)
    assert [switch.rests(32, newcomers) for newcomers in (3, 3, 1, 3)] == [True, True, True, False]


def test_a_drafter_that_nearly_pays_is_probed_often_and_one_that_loses_rarely():
    def drafted(gain, loss):
        switch, found = DraftSwitch(), []
        for number in range(4000):
            if switch.decide(gain):
                found.append(number)
                switch.lost(loss(len(found)))
        return len(found)

    lucky = [0.25, 0.25, -0.65, 0.25]  # what single rounds of such a drafter lose: -.02 on average
    assert drafted(0.98, lambda n: lucky[n % 4]) > 100
    assert drafted(0.98, lambda n: 0.25) <= 4000 * PROBE_SHARE / 0.25 + 5
    assert drafted(0.5, lambda n: -0.02) <= 4000 / 200 + 6
