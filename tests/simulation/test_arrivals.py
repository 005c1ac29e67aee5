"""Arrivals: their rate, bursts and lengths, and traces."""

import json

import numpy as np
import pytest

from dspark.errors import DataError, UsageError
from dspark.simulation.arrivals import Arrivals, Lengths, drawn_arrivals, read_trace


def test_rate_lengths_and_bursts_are_what_was_asked():
    found = drawn_arrivals(4000, Lengths(100, 0.5), Lengths(50, 1.0), burstiness=0.25, seed=3)
    faster = found.at_rate(8.0)
    assert faster.rate == pytest.approx(8.0)
    gaps = np.diff(faster.at_s_N)
    assert gaps.std() / gaps.mean() == pytest.approx(2.0, rel=0.1)  # 1 / sqrt(burstiness)
    assert found.prompt_N.mean() == pytest.approx(100, rel=0.05)
    assert found.prompt_N.std() == pytest.approx(50, rel=0.1)
    assert found.answer_N.std() == pytest.approx(50, rel=0.15)


def test_another_rate_moves_the_same_requests():
    found = drawn_arrivals(50, Lengths(9), Lengths(9))
    assert found.at_rate(2.0).at_s_N == pytest.approx(found.at_s_N / 2)


TRACES = {
    "own": '{"arrival_s": 5, "prompt_tokens": 7, "answer_tokens": 3}\n'
    '{"arrival_s": 4, "prompt_tokens": 8, "answer_tokens": 2}\n',
    "mooncake": '{"timestamp": 5000, "input_length": 7, "output_length": 3, "hash_ids": [1]}\n'
    '{"timestamp": 4000, "input_length": 8, "output_length": 2, "hash_ids": []}\n',
    "azure": "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2023-11-16 18:15:46.6805900,8,2\n2023-11-16 18:15:47.6805900,7,3\n"
    "2023-11-16 18:15:48.6805900,7,0\n",
}


@pytest.mark.parametrize("name", TRACES)
def test_traces_in_the_order_of_arrival(name, tmp_path):
    path = tmp_path / "trace"
    path.write_text(TRACES[name])
    found = read_trace(path)
    assert found.at_s_N == pytest.approx([0.0, 1.0])
    assert (found.prompt_N.tolist(), found.answer_N.tolist()) == ([8, 7], [2, 3])


@pytest.mark.parametrize(
    "text", ["", "{}\n{}\n", TRACES["own"].splitlines()[0], '{"arrival_s": 1}', "a,b\n1,2\n"]
)
def test_what_is_no_trace_is_refused(text, tmp_path):
    path = tmp_path / "trace"
    path.write_text(text)
    with pytest.raises(DataError):
        read_trace(path)
    negative = {"arrival_s": 1, "prompt_tokens": -1, "answer_tokens": 1}
    path.write_text(f"{json.dumps(negative)}\n" * 2)
    with pytest.raises(DataError):
        read_trace(path)


def test_impossible_numbers_are_refused():
    for wrong in ((0.5, 0), (1, -1), (float("inf"), 0)):
        with pytest.raises(UsageError):
            Lengths(*wrong)
    with pytest.raises(UsageError):
        drawn_arrivals(1, Lengths(1), Lengths(1))
    at_once = Arrivals(np.zeros(3), np.ones(3, int), np.ones(3, int))
    with pytest.raises(UsageError, match="at once"):
        at_once.at_rate(1.0)
