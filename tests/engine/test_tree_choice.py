"""Tree or chain: the faster one is found, and looking at the other costs little."""

from __future__ import annotations

import numpy as np
import pytest

from dspark.engine.engine import Engine
from dspark.engine.speculation.schedule import Schedule
from dspark.engine.speculation.trees import choice
from dspark.engine.speculation.trees.choice import TreeChoice

ROUNDS = 600


def play(gain, cost, requests, seed=0, rounds=ROUNDS):
    """(tokens per ms over the chain's, share of trees in the second half) of simulated rounds."""
    generator, found = np.random.default_rng(seed), TreeChoice()
    tokens = ms = trees = 0.0
    for number in range(rounds):
        tree = found.decide("greedy", requests)
        mean = 3.0 * (gain if tree else 1.0)
        given = int(generator.geometric(1 / mean, requests).clip(max=12).sum())
        spent = 10.0 * (cost if tree else 1.0) * (1 + 0.05 * generator.random())
        found.learn("greedy", requests, given, spent)
        tokens, ms = tokens + mean * requests, ms + spent
        trees += tree and number >= rounds // 2
    return tokens / ms / (3.0 * requests / 10.25), trees / (rounds / 2)


@pytest.mark.parametrize("requests", [1, 8, 32])
def test_trees_serve_where_they_are_faster(requests):
    found, share = play(1.25, 1.05, requests)
    assert found > 0.94 * 1.25 / 1.05
    assert share > 0.8


@pytest.mark.parametrize(("gain", "cost"), [(1.0, 1.1), (1.15, 1.4), (1.0, 3.0)])
@pytest.mark.parametrize("requests", [1, 8, 32])
def test_trees_that_are_slower_cost_little_even_from_a_cold_start(requests, gain, cost):
    found = np.mean([play(gain, cost, requests, seed)[0] for seed in range(3)])
    assert found > 0.975


def test_control_trees_in_every_round(monkeypatch):
    monkeypatch.setattr(choice._Load, "decide", lambda _: True)
    assert play(1.0, 1.1, 8)[0] < 0.93


def test_dear_trees_are_tried_the_more_rarely_the_more_is_known_of_them():
    found, tries = TreeChoice(), []
    for number in range(600):
        if found.decide("greedy", 8):
            tries.append(number)
        found.learn("greedy", 8, 24, 3.0 if found.tree else 1.0)
    gaps = np.diff(tries).tolist()
    assert len(tries) == 5
    assert gaps == sorted(gaps)
    assert gaps[0] < 32
    assert gaps[-1] > 256


def test_rounds_without_drafts_bring_no_tree_nearer():
    found = TreeChoice()
    for _ in range(12):
        tree = found.decide("greedy", 8)
        found.learn("greedy", 8, 24, 2.0 if tree else 1.0)
    assert not any(found.decide("greedy", 8) for _ in range(500))  # nothing was learned between


def test_tries_beside_prompts_count_as_tries():
    """Nothing is known of their times, but a load of prompts alone is not all trees either."""
    found, tries = TreeChoice(), 0
    for _ in range(3):
        assert not found.decide("greedy", 8)
        found.learn("greedy", 8, 24, 1.0)
    for _ in range(200):
        tries += found.decide("greedy", 8)
        found.learn("greedy", 8, 24, None)
    assert 10 < tries <= 200 / 8


def test_loads_and_temperatures_are_told_apart():
    found = TreeChoice()
    for kind, requests, cost in (("greedy", 1, 0.5), ("greedy", 8, 2.0), ("sampled", 1, 2.0)):
        for _ in range(60):
            tree = found.decide(kind, requests)
            found.learn(kind, requests, 3 * requests, cost if tree else 1.0)
    last = [
        np.mean([found.decide(kind, requests) for _ in range(20)])
        for kind, requests in (("greedy", 1), ("greedy", 8), ("sampled", 1))
    ]
    assert last[0] > 0.8
    assert max(last[1:]) < 0.2
    assert not found.decide("greedy", 0)


def decoded(tiny, target, change=lambda _: None):
    """(whether outputs are plain decoding's, whether each round that drafted had trees)."""
    drafter = tiny.make_drafter(target, block_size=5)
    requests = tiny.make_requests(tiny.make_prompts(4, 64), max_new_tokens=18, ignore_eos=True)
    plain, records = tiny.token_ids(tiny.decode(target, None, requests)), []
    engine = Engine(
        target,
        drafter,
        schedule=Schedule("auto"),
        tree_nodes=5,
        max_length=96,
        max_requests=2,
        watch=records.append,
        strict=True,
    )
    change(engine._speculator.trees)
    same = tiny.token_ids(engine.run(requests)) == plain
    return same, [record.parents is not None for record in records if any(record.drafts)]


def test_output_is_plain_decodings_own_whichever_drafts(tiny, target, monkeypatch):
    monkeypatch.setattr(choice, "_FIRST", 1)  # a few rounds see both
    same, trees = decoded(tiny, target)
    assert same
    assert set(trees) == {True, False}


def test_chains_draft_where_trees_pause(tiny, target, monkeypatch):
    monkeypatch.setattr(choice._Load, "decide", lambda _: True)

    def pause(trees):
        monkeypatch.setattr(trees.scheduler, "limits", lambda _, most: [0] * len(most))

    same, trees = decoded(tiny, target, pause)
    assert same
    assert set(trees) == {False}
    assert set(decoded(tiny, target)[1]) >= {True}
