"""How a budget is split, a drafter's shape chosen, and what is refused."""

import re
from collections import Counter
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest

from dspark.errors import UsageError
from dspark.fitting.plan import Plan, answer_limit, make_plan, plan_rows, smallest_budget
from dspark.fitting.progress import State, budget_text, duration, parse_budget
from dspark.fitting.recipe import (
    COVERAGE,
    VOCABULARY_STEP,
    Shape,
    choose_block_size,
    choose_shape,
    choose_taps,
    choose_vocabulary,
)
from dspark.fitting.workload import FEWEST_HELD_OUT, FEWEST_ROWS, Work

SHAPE = Shape(2, 128, (1, 5, 9), None, 1e-3)


def planned(speeds, budget_s, **changes):
    given = {"answer_tokens": 128, "writes_prompts": True} | changes
    return make_plan(budget_s, 2.0, SHAPE, speeds, **given)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("30m", 1800), ("8h", 28800), ("1h30m", 5400), ("0.5h", 1800), ("1d", 86400)],
)
def test_budgets_are_read(text, seconds):
    assert parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["", "30", "m", "-5m", "0s", "5 m", "5mm", "1e3s", "ten"])
def test_no_budgets_are_refused(text):
    with pytest.raises(UsageError, match="must be a time such as"):
        parse_budget(text)


@pytest.mark.parametrize("seconds", [1.2, 59, 61, 1799, 1801, 7300, 100_000])
def test_a_budget_that_is_shown_is_enough_when_it_is_given(seconds):
    assert seconds <= parse_budget(budget_text(seconds)) <= 1.25 * seconds + 1


def test_durations_are_short():
    assert [duration(s) for s in (3.2, 600, 9000)] == ["3 s", "10.0 min", "2.5 h"]


@pytest.mark.parametrize("budget_s", [30, 240, 1800, 28800])
@pytest.mark.parametrize("speed", [0.2, 1, 30])
@pytest.mark.parametrize("own", [True, False])
def test_the_parts_fill_the_budget(speeds, budget_s, speed, own):
    fast = replace(
        speeds,
        batch_tokens_per_s=speed * speeds.batch_tokens_per_s,
        single_tokens_per_s=speed * speeds.single_tokens_per_s,
    )
    plan = planned(fast, budget_s, writes_prompts=own)
    assert 0.9 * budget_s <= sum(plan.seconds.values()) <= budget_s
    assert min(plan.seconds.values()) >= 0
    assert plan.answers >= FEWEST_ROWS
    assert plan.heldout >= FEWEST_HELD_OUT
    assert plan.steps * plan.step_s <= 1.01 * plan.seconds["training"]
    assert (plan.seconds["prompts"] > 0) == own
    assert Plan.of(asdict(plan)) == plan
    assert len(plan_rows(plan)) == 7 + plan.cached


def test_more_time_gives_more_of_everything(speeds):
    short, long = planned(speeds, 240), planned(speeds, 2400)
    for name in ("answers", "heldout", "calibration", "steps"):
        assert getattr(short, name) <= getattr(long, name), name
    assert short.seconds["training"] < long.seconds["training"]


def test_a_budget_too_small_names_the_smallest_that_does(speeds):
    slow = replace(speeds, batch_tokens_per_s=20.0, single_tokens_per_s=5.0)
    with pytest.raises(UsageError, match="too small for one training step") as refused:
        planned(slow, 10)
    (given,) = re.findall(r"--budget (\S+) or more", str(refused.value))
    plan = planned(slow, parse_budget(given))
    assert plan.steps >= 1
    least = smallest_budget(2.0, Work(slow, 128, writes_prompts=True, block_size=SHAPE.block_size))
    assert least <= parse_budget(given) <= least + 60
    with pytest.raises(UsageError):
        planned(slow, 0.98 * least)


def test_few_prompts_are_divided_and_too_few_refused(speeds):
    plan = planned(speeds, 1800, available=40, writes_prompts=False)
    assert plan.prompts == 40
    assert (plan.heldout, plan.calibration) == (4, 4)
    assert planned(speeds, 1800, available=10, writes_prompts=False).answers == FEWEST_ROWS
    with pytest.raises(UsageError, match="There are 9 prompts, but 10 are needed"):
        planned(speeds, 1800, available=9, writes_prompts=False)


def test_features_are_computed_once_where_that_allows_more_anchors(speeds):
    """On a machine whose forward dominates a step, unless the disk is too small."""
    slow = replace(speeds, row_s=0.055)
    plans = {
        "cached": planned(slow, 600),
        "full disk": planned(slow, 600, disk_bytes=999),
        "free forward": planned(replace(slow, row_s=0.0), 600),
    }
    assert [name for name, plan in plans.items() if plan.cached] == ["cached"]
    cached, online = plans["cached"], plans["full disk"]
    assert cached.seconds["features"] == pytest.approx(cached.answers * 0.055)
    assert online.seconds["features"] == 0
    assert cached.steps * cached.anchors > 1.3 * online.steps * online.anchors
    assert cached.disk_bytes - online.disk_bytes == 1000 * cached.answers
    assert cached.step_s == pytest.approx(0.002 + cached.rows * cached.anchors * slow.anchor_s)


def test_blocks_grow_with_training():
    assert [choose_block_size(n) for n in (1e3, 2e6, 1e7, 1e8)] == [1, 3, 5, 7]


def test_answers_fit_the_context():
    assert [answer_limit(s, 8192) for s in (30, 240, 3600)] == [64, 128, 256]
    assert answer_limit(3600, 96) == 48


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 5, 7, 8, 30])
def test_taps_are_layers_of_the_target_ascending(layers):
    taps = choose_taps(layers)
    assert list(taps) == sorted(set(taps))
    assert taps[0] >= 0
    assert taps[-1] < layers
    assert len(taps) == min(layers, 5)
    few = choose_taps(layers, 3)
    assert list(few) == sorted(set(few))
    assert len(few) == min(layers, 3)
    assert (few[-1] < layers - 1) == (layers > 3), "engines cannot tap the last layer"


def test_a_drafter_gets_deeper_with_time_and_slower_rates_with_width():
    def target(vocab_size=49152, hidden_size=576, num_layers=30):
        return SimpleNamespace(**locals())

    shapes = [choose_shape(target(), hours * 3600, 5) for hours in (0.3, 2, 5, 100)]
    assert [shape.layers for shape in shapes] == [1, 2, 3, 5]
    assert choose_shape(target(num_layers=1), 1e6, 5).layers == 1
    small, large = (choose_shape(target(vocab_size=size), 900, 5).rank for size in (512, 49152))
    assert small < large
    assert choose_shape(target(hidden_size=2048), 900).learning_rate == 6e-4
    assert choose_shape(target(), 900).learning_rate == pytest.approx(1.1e-3)
    assert choose_shape(target(vocab_size=512), 900).draft_vocabulary is None
    assert Shape.of(asdict(shapes[0])) == shapes[0]
    assert {shape.algorithm for shape in shapes} == {"dspark"}


def test_one_draft_per_round_is_an_eagle3_whose_answers_train_whole(speeds):
    """It has no confidences of its own, so nothing is calibrated."""
    target = SimpleNamespace(vocab_size=49152, hidden_size=576, num_layers=30)
    shape = choose_shape(target, 9000)
    assert (shape.algorithm, shape.layers, len(shape.taps)) == ("eagle3", 1, 3)
    given = {"answer_tokens": 256, "writes_prompts": True}
    block, chain = (make_plan(1800, 2.0, each, speeds, **given) for each in (SHAPE, shape))
    assert (block.anchors, chain.anchors) == (128, 179)
    assert chain.seconds["calibration"] == chain.calibration == 0 < block.calibration
    assert "calibration" not in {name for name, *_ in plan_rows(chain)}
    assert 0.9 * 1800 <= sum(chain.seconds.values()) <= 1800
    slow = replace(speeds, batch_tokens_per_s=20.0, single_tokens_per_s=5.0)
    least = smallest_budget(2.0, Work(slow, 256, True, 1, whole_answers=True))
    assert make_plan(least, 2.0, shape, slow, **given).steps >= 1


def test_the_draft_vocabulary_covers_the_answers():
    """Against an obvious search: the smallest multiple of 64 that covers, if that is the larger."""
    vocab = 10_000
    answers = [[(i * i + j) % 3000 for j in range(200)] for i in range(100)]
    size, share = choose_vocabulary(answers, vocab)
    counts = Counter(t for answer in answers for t in answer)
    ranked = sorted(counts.values(), reverse=True)
    covering = next(n for n in range(1, vocab) if sum(ranked[:n]) >= COVERAGE * sum(ranked))
    wanted = max(covering, vocab // 6)
    assert size == -(-wanted // VOCABULARY_STEP) * VOCABULARY_STEP
    assert 0.9 < share <= 1
    assert choose_vocabulary(answers, 8192) == (None, 1.0)
    every = [list(range(i, vocab, 40)) for i in range(40)]
    assert choose_vocabulary(every, vocab) == (None, 1.0)


def test_coverage_is_measured_on_answers_that_were_not_looked_at():
    answers = [[9000 + i] * 10 for i in range(4)]  # the last quarter has a token of its own
    size, share = choose_vocabulary(answers, 16_000)
    assert size == 2688
    assert share == 0.0
    assert choose_vocabulary([[1, 2, 3]] * 8, 16_000)[1] == 1.0


def test_a_state_remembers_stages_and_time_over_sittings(tmp_path):
    clock = [100.0]
    first = State(tmp_path, {"model": "M"}, waited_s=3.0, now=lambda: clock[0])
    first.begin("plan")
    clock[0] += 4
    first.end({"n": 1})
    first.begin("prompts")
    clock[0] += 6
    first.beat()  # then killed
    clock[0] += 2
    second = State(tmp_path, {"model": "M"}, now=lambda: clock[0])
    assert second.elapsed_s == 13.0
    assert second.is_done("plan")
    assert not second.is_done("prompts")
    assert second.result("plan") == {"n": 1}
    second.begin("prompts")
    clock[0] += 5
    second.end({})
    assert (second.seconds("plan"), second.seconds("prompts")) == (4.0, 11.0)
    assert second.elapsed_s == 18.0
    with pytest.raises(UsageError, match="holds a run with model 'M', but this one has 'N'"):
        State(tmp_path, {"model": "N"})
