"""bfloat16, batch-invariant: the bundled pair says the same with and without its drafter."""

from __future__ import annotations

import pytest

import dspark
from dspark.engine.engine import Engine
from dspark.engine.speculation.draft_scheduler import Scheduler
from dspark.engine.speculation.schedule import Schedule
from dspark.request import merge_stats
from dspark.scheduling.cost_table import CostPoint, CostTable, MachineKey

NEW_TOKENS = 12
COMMANDS = ("ls", "tar", "grep", "find", "sort", "cut", "tr", "wc", "head", "tail", "sed", "awk")
QUESTIONS = [
    *[f"What does the command `{name}` do?" for name in COMMANDS],
    *[f"Tom has {n} apples and buys {3 * n} more. How many are there?" for n in range(2, 7)],
    *[f"I need a {what} in Berkeley." for what in ("taxi", "table for two", "hotel")],
]
SCHEDULES = ("fixed", "threshold", "prefix", "lagged", "lookahead")


@pytest.fixture(scope="module")
def pair():
    return dspark.load("bundled", device="cpu", dtype="bfloat16", batch_invariant=True)


@pytest.fixture(scope="module")
def requests(pair):
    return [
        dspark.Request(
            pair.encode([{"role": "user", "content": question}]),
            dspark.SamplingParams(max_new_tokens=NEW_TOKENS, seed=i),
        )
        for i, question in enumerate(QUESTIONS)
    ]


@pytest.fixture(scope="module")
def plain(pair, requests):
    """Without a drafter, one request at a time."""
    return decode(pair.target, None, requests, 1)


def decode(target, drafter, requests, batch_size, *, verifier="block", schedule=None):
    engine = Engine(
        target,
        drafter,
        max_requests=batch_size,
        max_length=128,
        verifier=verifier,
        schedule=schedule,
    )
    return engine.run(requests)


def scheduler(pair, name, verifier="block"):
    """A schedule by costs that climb every eight tokens."""
    points = [
        CostPoint(tokens, count, 5.0 + 2.0 * (tokens // 8), 1.0)
        for count in (1, 2, 4, 8)
        for tokens in range(count, 65)
    ]
    costs = CostTable(tuple(points), MachineKey("test", 1, "bfloat16", "bundled", "bundled"))
    schedule = Schedule(name, 0.5 if name == "threshold" else None)
    return Scheduler(schedule, verifier, pair.drafter.block_size, pair.calibration, costs)


def token_ids(outputs):
    return [output.token_ids for output in outputs]


@pytest.mark.parametrize(
    ("name", "batch_size"), [*((name, 8) for name in SCHEDULES), ("fixed", 3), ("lagged", 1)]
)
def test_greedy_output_is_that_of_plain_decoding(pair, requests, plain, name, batch_size):
    some = slice({1: 4, 3: 10, 8: len(requests)}[batch_size])
    outputs = decode(
        pair.target, pair.drafter, requests[some], batch_size, schedule=scheduler(pair, name)
    )
    assert token_ids(outputs) == token_ids(plain[some])
    assert merge_stats(outputs).accepted > 0


def test_plain_decoding_does_not_depend_on_the_batch(pair, requests, plain):
    assert len(requests) == 20
    assert len({token for output in plain for token in output.token_ids}) > 50
    assert token_ids(decode(pair.target, None, requests, 8)) == token_ids(plain)


def test_coupled_samples_are_those_of_plain_decoding(pair, requests):
    warm = [
        dspark.Request(
            r.prompt_ids, dspark.SamplingParams(max_new_tokens=NEW_TOKENS, temperature=1.0, seed=i)
        )
        for i, r in enumerate(requests)
    ]
    alone = decode(pair.target, None, warm[:4], 1, verifier="coupled")
    drafted = decode(pair.target, pair.drafter, warm[:8], 8, verifier="coupled")
    assert token_ids(drafted[:4]) == token_ids(alone)
