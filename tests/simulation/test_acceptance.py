"""Acceptance profiles: from rounds, from records, from a table of survivals."""

import json

import numpy as np
import pytest

from dspark.errors import DataError, UsageError
from dspark.evaluation.records import Drafted, Plan, Record, RunRecords, Settings, Turn
from dspark.simulation.acceptance import Acceptance, Stream, synthetic
from dspark.simulation.acceptance_source import read_acceptance
from dspark.simulation.traffic import Traffic

SURVIVAL = (0.8, 0.6, 0.5, 0.4)


def played(profile, stream, length, rounds):
    """Drafts kept of rounds that verify `length` drafts each, one after the other."""
    start, count = profile.starts_S[stream], profile.lengths_S[stream]
    at, found = 0, []
    for _ in range(rounds):
        found.append(min(int(profile.run_T[start + at % count]), length))
        at += found[-1] + 1
    return found


def foreseen(kept, bonus, count):
    """The obvious stream: kept drafts are foreseen, what replaces a rejected one is not."""
    flags = [flag for n in kept for flag in [True] * n + [n == 4 and bonus]]
    return [flags[i % len(flags)] for i in range(count)]


def test_whole_blocks_find_the_recorded_rounds_again(alternating):
    assert played(alternating, 0, 4, 8) == [4, 0, 2, 1, 4, 0, 2, 1]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("length", [1, 2, 3])
def test_shorter_rounds_keep_what_is_foreseen_from_where_they_start(length, seed):
    kept = np.array([4, 0, 2, 1])
    stream = Stream(kept, np.full(4, 4), np.zeros((4, 4)))
    profile = Acceptance.of([stream], np.array([0.75, 0.5, 0.25, 0.25]), "test", seed)
    bonus = profile.run_T[4] > 0 or profile.run_T[3] > 1  # drawn: nobody recorded it
    flags, at = foreseen([4, 0, 2, 1], bonus, 400), 0
    for got in played(profile, 0, length, 20):
        expected = 0
        while expected < length and flags[at + expected]:
            expected += 1
        assert got == expected
        at += got + 1


def test_logits_within_a_round_are_its_last_ones_and_then_the_next_rounds():
    logits = np.array([[1.0, 2, 3], [4, 5, 6]])
    stream = Stream(np.array([2, 0]), np.array([3, 3]), logits)
    profile = Acceptance.of([stream], np.array([0.5, 0.5, 0.0]), "test")
    assert profile.logits_TK.tolist() == [[1, 2, 3], [2, 3, 4], [3, 4, 5], [4, 5, 6]]


def test_a_table_of_survivals_is_met_by_whole_blocks():
    profile = synthetic(SURVIVAL)
    kept = np.array([n for s in range(len(profile.starts_S)) for n in played(profile, s, 4, 60)])
    assert [(kept >= k).mean() for k in (1, 2, 3, 4)] == pytest.approx(SURVIVAL, abs=0.02)


def test_confidences_of_a_table_are_calibrated():
    profile = synthetic(SURVIVAL)
    first = 1 / (1 + np.exp(-profile.logits_TK[profile.starts_S, 0]))
    stayed = profile.run_T[profile.starts_S] > 0
    assert first.mean() == pytest.approx(stayed.mean(), abs=0.06)
    high = first > np.median(first)
    assert stayed[high].mean() > stayed[~high].mean() + 0.1


def test_answers_that_differ_more_gain_nothing_in_the_mean():
    """Where the same survivals are spread unevenly over answers, whole blocks keep as many."""
    even = synthetic(SURVIVAL, Traffic(between=0.1, within=0.1))
    kept = np.array([n for s in range(256) for n in played(even, s, 4, 60)])
    assert [(kept >= k).mean() for k in (1, 2, 3, 4)] == pytest.approx(SURVIVAL, abs=0.02)


def test_edges_of_survival():
    assert played(synthetic([1.0, 1.0]), 0, 2, 5) == [2] * 5
    assert played(synthetic([0.0]), 0, 1, 5) == [0] * 5


@pytest.mark.parametrize("wrong", [[], [0.5, 0.6], [1.1], [-0.1], [float("nan")]])
def test_no_survivals_are_refused(wrong):
    with pytest.raises(UsageError):
        synthetic(wrong)


def a_run(folder, schedule="fixed"):
    settings = Settings("t", "1", "d", "d", "2", "float32", 0.0, schedule=schedule)
    run = RunRecords.open(settings, folder)
    drafter = Drafted(2, 1, 10, (2.0, 2.0), (0.0, 1.0))
    tasks = {"a": {"domain": "x", "source": "", "available": 1, "keys": ["1"]}}
    run.start(Plan("", {}, drafter, tasks))
    turn = Turn(
        6, 64, "stop", 6, (2, 2, 2), (2, 0, 1), True, ((2.0, 4.0), (0.0, 0.0), (1.0, 1.0)), "", ""
    )
    run.add(Record("a", "1", (turn,)))
    return run


def test_records_of_an_evaluation_calibrated_and_without_the_round_that_was_cut(tmp_path):
    a_run(tmp_path)
    profile = read_acceptance(str(tmp_path))
    assert profile.lengths_S.tolist() == [4]  # two rounds of 3 and 1 tokens
    assert profile.run_T[0] == 2
    assert profile.run_T[3] == 0
    assert profile.logits_TK[0] == pytest.approx([1.0, 3.0])


def test_an_evaluation_that_hides_outcomes_is_refused(tmp_path):
    run = a_run(tmp_path, "lagged")
    with pytest.raises(UsageError, match="--schedule fixed"):
        read_acceptance(str(run.path))


def test_a_file_of_survivals(tmp_path):
    path = tmp_path / "profile.json"
    path.write_text(json.dumps({"survival": [0.5, 0.25], "between": 0.0, "within": 0.0}))
    assert read_acceptance(str(path)).survival_K.tolist() == [0.5, 0.25]
    path.write_text(json.dumps({"survival": [0.5], "more": 1}))
    with pytest.raises(DataError, match="more"):
        read_acceptance(str(path))
    with pytest.raises(DataError, match="neither a file"):
        read_acceptance("nowhere")
