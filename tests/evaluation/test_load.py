"""Who runs when, what is decoded, and what the figures of made-up runs are."""

import warnings
from dataclasses import replace

import pytest

from benchmarks.load import over_best
from dspark.engine.engine import Clock
from dspark.engine.model import Model
from dspark.errors import DSparkWarning, UsageError
from dspark.evaluation.load import report as load_report
from dspark.evaluation.load import sweep as load_sweep
from dspark.evaluation.load.closed_loop import Answer, LoadRun, out_of_step
from dspark.evaluation.load.report import at_floors, load_rows, over_mtp1
from dspark.evaluation.load.sweep import Workload, contenders, cover_costs, is_mtp, sweep
from dspark.request import Output, Request, SamplingParams, Stats


def run_of(users, tokens_per_s, per_user, *, tokens=(1, 2, 3, 4, 5), verified=4, clock=None):
    """A run of one answer of five tokens: the first after half a second."""
    stats = Stats(rounds=2, tokens=4, verified=verified)
    answer = Answer(2.0, 2.5, 2.5 + 4 / per_user, 1, Output("", "", tokens, "length", stats))
    clock = clock or Clock(steps=2, draft_ms=4.0, schedule_ms=1.0, verify_ms=10.0)
    return LoadRun(users, 10.0, round(10 * tokens_per_s), (answer,), clock)


def test_a_row_is_the_median_over_the_repeats():
    runs = {(4, "lagged"): [run_of(4, s, u) for s, u in ((50, 9), (90, 12), (60, 10))]}
    (row,) = load_rows(runs, compare=True)
    assert (row.concurrency, row.schedule, row.repeats, row.requests) == (4, "lagged", 3, 1)
    assert row.tokens_per_s == 60
    assert row.ci95 == (50, 90)
    assert row.tokens_per_s_per_user == pytest.approx(10)
    assert row.tokens_per_s_per_user_median == pytest.approx(10)
    assert row.ttft_ms == 500
    assert row.accepted_length == 2
    assert row.verified_per_request == 3  # two drafts a round, and the anchor
    assert (row.draft_ms, row.schedule_ms, row.verify_ms) == (2.0, 0.5, 5.0)
    assert row.identical is None  # `off` did not run


def test_mean_and_median_over_users_differ():
    answers = tuple(run_of(1, 1, speed).answers[0] for speed in (1, 2, 9))
    (row,) = load_rows({(3, "off"): [replace(run_of(3, 1, 1), answers=answers)]}, compare=True)
    assert row.tokens_per_s_per_user == pytest.approx(4)
    assert row.tokens_per_s_per_user_median == pytest.approx(2)
    assert row.ci95 is None


def test_steps_that_all_read_prompts_have_no_time_of_their_own():
    (row,) = load_rows({(1, "off"): [run_of(1, 1, 1, clock=Clock(prefills=3))]}, compare=False)
    assert row.verify_ms is None


def test_answers_are_compared_with_plain_ones():
    runs = {
        (1, "off"): [run_of(1, 10, 10)],
        (1, "fixed"): [run_of(1, 10, 10)],
        (1, "lagged"): [run_of(1, 10, 10, tokens=(1, 2, 3, 4, 6))],
    }
    shares = [row.identical for row in load_rows(runs, compare=True)]
    assert shares == [None, 1.0, 0.0]
    assert [row.identical for row in load_rows(runs, compare=False)] == [None] * 3


POINTS = {
    "off": {1: (20, 20), 2: (32, 16), 8: (40, 5)},
    "mtp1": {1: (30, 30), 2: (50, 25), 8: (60, 10)},
    "lagged": {1: (40, 40), 2: (55, 28), 8: (70, 9)},
}


@pytest.fixture
def rows():
    runs = {
        (users, name): [run_of(users, *POINTS[name][users])]
        for users in (8, 1, 2)
        for name in POINTS
    }
    return load_rows(runs, compare=False)


def test_throughput_at_floors_is_each_schedules_own(rows):
    strict, moderate, loose = at_floors(rows, [35, 25, 10])
    assert strict["tokens_per_s"] == {"off": None, "mtp1": None, "lagged": pytest.approx(46.25)}
    assert moderate["tokens_per_s"]["mtp1"] == pytest.approx(50)
    assert moderate["tokens_per_s"]["lagged"] == pytest.approx(55 + 15 * 3 / 19)
    assert loose["tokens_per_s"]["off"] == pytest.approx(32 + 8 * 6 / 11)
    assert [floor["tokens_per_s_per_user"] for floor in (strict, moderate)] == [35, 25]
    measured = [floor["tokens_per_s_per_user"] for floor in at_floors(rows)]
    assert len(measured) == 5
    assert 5 < min(measured) < max(measured) < 40


def test_gain_over_mtp1_at_matched_throughput(rows):
    found = {(g["schedule"], g["concurrency"]): g for g in over_mtp1(rows)}
    assert len(found) == 6  # every point of the two others
    at_40 = found["lagged", 1]  # MTP-1 gives 40 tokens/s between (30, 30) and (50, 25)
    assert at_40["mtp1_tokens_per_s_per_user"] == pytest.approx(27.5)
    assert at_40["gain"] == pytest.approx(40 / 27.5 - 1)
    assert found["lagged", 2]["mtp1_tokens_per_s_per_user"] == pytest.approx(17.5)
    assert found["lagged", 8]["gain"] is None  # MTP-1 never reaches 70 tokens/s
    assert found["off", 1]["gain"] is None  # nor was it measured at 20
    assert over_mtp1([row for row in rows if row.schedule != "mtp1"]) == []


def test_ratios_are_taken_repeat_by_repeat_against_the_best_by_median():
    runs = {
        (1, "off"): [run_of(1, s, 1) for s in (10, 99, 12)],
        (1, "fixed"): [run_of(1, s, 1) for s in (20, 40, 30)],
        (1, "lagged"): [run_of(1, s, 1) for s in (22, 40, 27)],
        (2, "lagged"): [run_of(2, 1, 1)],
    }
    found = over_best(runs, "lagged", ("off", "fixed", "mtp1"))
    assert list(found) == [1]
    assert found[1]["best"] == "fixed"  # not `off`, which was lucky once
    assert found[1]["ratio"] == pytest.approx(1.0)
    assert found[1]["ci95"] == (pytest.approx(0.9), pytest.approx(1.1))


def test_contenders_take_turns_and_decode_the_same(monkeypatch, tiny, target):
    seen = []

    def run_in_turn(ways, workload, users, verifier):
        for way in ways:
            seen.append((way.name, users, [workload.request(i) for i in range(4)], verifier))
            warnings.warn(DSparkWarning(way.name), stacklevel=1)
        return [run_of(users, 1, 1) for _ in ways]

    monkeypatch.setattr(load_sweep, "run_in_turn", run_in_turn)
    model = Model(target, tiny.make_drafter(target))
    ways = contenders(model, ("off", "fixed", "lagged"))
    workload = Workload((Request((1, 2)), Request((3,))))
    with pytest.warns(DSparkWarning) as said:
        runs = sweep(ways, workload, (1, 4), repeats=3, verifier="token")
    assert len(said) == 3  # once for each contender
    order = "".join(name[0] for name, *_ in seen)
    assert order == "ofl" + "flo" + "flo" + "lof" + "lof" + "ofl"
    assert [users for _, users, *_ in seen] == [1, 1, 1, 4, 4, 4] * 3
    assert all(row[2:] == seen[0][2:] for row in seen)
    assert {key: len(row) for key, row in runs.items()} == {
        (users, name): 3 for users in (1, 4) for name in ("off", "fixed", "lagged")
    }


def test_a_workload_goes_round_with_other_seeds():
    pool = tuple(Request((i,), SamplingParams(seed=10 + i)) for i in range(3))
    work = Workload(pool, count=5)
    requests = [work.request(i) for i in range(-4, 7)]
    assert [r.prompt_ids[0] for r in requests] == [2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    assert work.request(0) == pool[0]
    assert len({(r.prompt_ids, r.params.seed) for r in requests}) == len(requests)
    assert (work.answers(1), work.answers(2), work.answers(8)) == (5, 5, 16)


def test_users_out_of_step_begin_with_shorter_answers():
    def supply(number):
        return Request((number + 1,), SamplingParams(10, seed=number))

    sent = [out_of_step(supply, 4)(number) for number in range(6)]
    assert [request.params.max_new_tokens for request in sent] == [3, 5, 8, 10, 10, 10]
    assert [request.prompt_ids for request in sent] == [(n + 1,) for n in range(6)]
    assert out_of_step(supply, 1)(0) == supply(0)


def test_off_has_no_drafter_and_mtp1_drafts_once(tiny, target):
    model = Model(target, tiny.make_drafter(target))
    mtp = Model(target, tiny.make_eagle3(target, taps=(4,), ttt_length=1))
    requests = [Request((1, 2), SamplingParams(4))] * 3
    engines = {
        way.name: way.engine(requests, 2, "block")
        for way in contenders(model, ("off", "fixed", "mtp1"), mtp)
    }
    assert engines["off"].drafter is None
    assert engines["fixed"].num_drafts == 4
    assert (engines["mtp1"].drafter, engines["mtp1"].num_drafts) == (mtp.drafter, 1)
    assert {engine.max_requests for engine in engines.values()} == {2}
    assert is_mtp(mtp)
    assert not is_mtp(model)
    assert not is_mtp(Model(target, tiny.make_eagle3(target)))


def test_ways_without_their_drafter_are_refused(target):
    with pytest.raises(UsageError, match="'mtp1' needs an MTP drafter; give one with --mtp"):
        contenders(Model(target), ("off", "mtp1"))
    with pytest.raises(UsageError, match="'lagged' needs a drafter"):
        contenders(Model(target), ("off", "lagged"))


@pytest.mark.filterwarnings("ignore::dspark.errors.DSparkWarning")
def test_costs_are_measured_only_where_they_do_not_reach(tiny, target):
    model = Model(target, tiny.make_drafter(target))
    assert cover_costs(model, 1)
    path = model.machine.path()
    assert path.is_file()
    assert not cover_costs(model, 1)
    assert cover_costs(model, 2, save=False)
    assert model.costs.covers(2)
    assert not Model(target, model.drafter).costs.covers(2)  # not saved
    path.write_text("{")
    assert cover_costs(Model(target, model.drafter), 1)  # a damaged table is measured anew


def test_the_figure_has_every_schedule_and_concurrency(tmp_path, rows):
    paths = load_report.save_figure(rows, "made up", tmp_path)
    assert [path.name for path in paths] == ["load.png", "load.svg"]
    assert paths[0].read_bytes().startswith(b"\x89PNG")
    svg = paths[1].read_text()
    for colour in (load_report.COLOURS[name] for name in POINTS):
        assert colour in svg
    assert set(load_report.COLOURS) == set(load_sweep.CONTENDERS)
