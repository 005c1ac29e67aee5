"""Figures against processes whose truth is known."""

import numpy as np
import pytest

from dspark.evaluation.metrics import RoundCounts, draws, figures, interval
from dspark.evaluation.records import Record, Turn

KEPT = (0.85, 0.7, 0.8, 0.6, 0.5)
BLOCK = len(KEPT)
TRUE_SURVIVAL = np.cumprod(KEPT)
TRUE_LENGTH = 1 + TRUE_SURVIVAL.sum()


def make_turn(kept, verified=None, *, room=10_000, cut=False, tokens=0, logits=None):
    verified = verified or [BLOCK] * len(kept)
    return Turn(
        tokens=tokens, room=room, finish_reason="stop", drafted=sum(verified),
        verified=tuple(verified), kept=tuple(kept), cut=cut, logits=logits, digest="", text="",
    )  # fmt: skip


def make_record(*turns, key="k"):
    return Record("task", key, turns)


def simulate(generator, *, stop=0.03, room=40, kept=KEPT):
    """An answer: every draft stays with its position's chance, every token may be the last one."""
    left, rounds, cut = room - 1, [], False
    verified = []
    while left > 0 and not cut:
        drafts = min(len(kept), left - 1)
        stayed = 0
        while stayed < drafts and generator.random() < kept[stayed]:
            stayed += 1
        ends = next((i for i in range(stayed + 1) if generator.random() < stop), None)
        verified.append(drafts)
        if ends is not None and ends < stayed:  # a kept draft is the stop token
            cut, stayed = True, ends + 1
        rounds.append(stayed)
        if ends is not None:
            break
        left -= stayed + 1
    return make_turn(rounds, verified, room=room, cut=cut)


def study(seed, prompts, **options):
    generator = np.random.default_rng(seed)
    return RoundCounts.of(
        [make_record(simulate(generator, **options)) for _ in range(prompts)], BLOCK
    )


@pytest.mark.parametrize("options", [{}, {"stop": 0.15}, {"stop": 0.0, "room": 13}])
def test_cut_rounds_bias_nothing(options):
    tallies = study(1, 6000, **options)
    assert tallies.accepted_length() == pytest.approx(TRUE_LENGTH, abs=0.04)
    assert tallies.survival() == pytest.approx(TRUE_SURVIVAL, abs=0.02)
    # Controls: the plain ratio, and rounds that were cut left out.
    plain = tallies.gained_P.sum() / tallies.rounds_P.sum()
    assert plain < TRUE_LENGTH - 0.1


def test_control_leaving_out_the_rounds_that_a_stop_token_ends_is_biased():
    generator = np.random.default_rng(1)
    turns = [simulate(generator, stop=0.15, room=1000) for _ in range(6000)]
    lengths = [
        kept + 1
        for turn in turns
        for n, kept in enumerate(turn.kept)
        if not (turn.cut and n == len(turn.kept) - 1)
    ]
    assert np.mean(lengths) < TRUE_LENGTH - 0.1


def test_without_cut_rounds_it_is_the_ratio_of_sums():
    records = [make_record(make_turn([0, 5, 2])), make_record(make_turn([1]), make_turn([3, 3]))]
    tallies = RoundCounts.of(records, BLOCK)
    assert tallies.accepted_length() == pytest.approx((14 + 6) / 6)
    found = figures(tallies, "task")
    assert found["accepted_length"] == pytest.approx(found["tokens_per_round"])
    assert found["prefix_survival"] == pytest.approx([5 / 6, 4 / 6, 3 / 6, 1 / 6, 1 / 6])
    assert found["conditional_acceptance"] == pytest.approx([5 / 6, 4 / 5, 3 / 4, 1 / 3, 1])
    assert found["conditional_counts"] == [6, 5, 4, 3, 1]
    assert found["wasted_per_round"] == pytest.approx(BLOCK - 14 / 6)
    assert found["acceptance"] == pytest.approx((14 + 6) / (30 + 6))


def test_a_trimmed_round_is_a_short_one_but_says_nothing_of_what_was_not_verified():
    tallies = RoundCounts.of([make_record(make_turn([2, 2, 5], verified=[2, 5, 5]))], BLOCK)
    found = figures(tallies, "task")
    assert found["accepted_length"] == pytest.approx(1 + 9 / 3)
    assert found["conditional_counts"] == [3, 3, 2, 1, 1]
    assert found["conditional_acceptance"] == pytest.approx([1, 1, 1 / 2, 1, 1])
    assert found["verified_per_round"] == pytest.approx(4)


def test_rounds_without_room_for_a_block_are_counted_but_not_judged():
    # Of 12 tokens one is drawn before; the second round has room for 5, a block needs 6.
    found = figures(
        RoundCounts.of([make_record(make_turn([5, 4], [5, 4], room=12))], BLOCK), "task"
    )
    assert (found["rounds"], found["whole_rounds"]) == (2, 1)
    assert found["accepted_length"] == pytest.approx(6)
    assert found["tokens_per_round"] == pytest.approx(11 / 2)


def test_the_round_that_a_stop_token_ends_counts_up_to_there():
    found = figures(RoundCounts.of([make_record(make_turn([0, 3], cut=True))], BLOCK), "task")
    assert found["conditional_counts"] == [2, 1, 1, 0, 0]
    assert found["conditional_acceptance"] == [0.5, 1, 1, None, None]
    assert (found["cut_rounds"], found["tokens_per_round"]) == (1, (1 + 3) / 2)


def test_nothing_observed_is_none_not_a_number():
    found = figures(RoundCounts.of([make_record(make_turn([2], [2], room=4))], BLOCK), "task")
    assert found["accepted_length"] is None
    assert found["ci95"] is None
    assert figures(RoundCounts.of([], BLOCK), "task")["accepted_length"] is None


def test_intervals_hold_the_truth_as_often_as_they_say():
    hits = 0
    for seed in range(120):
        low, high = interval(draws(study(100 + seed, 40), "task"))
        hits += low <= TRUE_LENGTH <= high
    assert 0.87 <= hits / 120 <= 0.99


def test_pairs_resample_the_same_prompts():
    easy = [study(seed, 1, stop=0.02) for seed in range(30)]
    once = RoundCounts.of([], BLOCK)
    for each in easy:
        once = once.joined(each)
    assert interval(draws(once, "a") / draws(once, "a")) == [1, 1]
    # Control: drawn apart, the same prompts differ.
    low, high = interval(draws(once, "a") / draws(once, "b"))
    assert high - low > 0.05
