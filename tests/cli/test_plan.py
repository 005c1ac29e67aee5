"""`dspark plan`: its figures, its files, and what it refuses."""

import json

import numpy as np
import pytest

from dspark.scheduling.cost_table import CostPoint, CostTable, MachineKey, PromptCost, StepExtra

MACHINE = MachineKey("test", 1, "float32", "a target", "a drafter")
ROW = {
    "schedule", "rate", "users", "tokens_per_s", "ttft_ms", "tokens_per_s_per_user",
    "mean_tokens_per_s_per_user", "accepted_length", "verified_per_request", "busy", "preemptions",
    "cost_per_million_tokens",
}  # fmt: skip
QUICK = ("--requests", 20, "--prompt-tokens", 8, "--answer-tokens", "6:0", "--users", "1,2")


@pytest.fixture
def cost(tmp_path):
    points = tuple(
        CostPoint(r + n, r, 10 + (r + n) / 4, 2.0, 0.5) for r in (1, 2, 4) for n in (0, r, 3 * r)
    )
    whole = ((PromptCost(8, 12.0),), (StepExtra(1, 10.0, 0.5, 0.5),))
    return CostTable(points, MACHINE, *whole).save(tmp_path / "cost.json")


def test_every_way_at_every_rate_with_a_page(dspark, cost, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "made" / "here"
    result = dspark(
        "plan", "--cost", cost, "--acceptance", ".7,.5,.4", "--mtp-cost", cost, "--mtp-acceptance",
        ".7", "--schedule", "off,fixed-2,mtp1,lagged", "--rate", "2,4", "--replicas", 2,
        "--price", 2, "--out", out, "--json", *QUICK,
    )  # fmt: skip
    assert result.status == 0, result.err
    names = ["off", "fixed-2", "mtp1", "lagged"]
    rows = result.json["rows"]
    assert [(round(row["rate"]), row["schedule"]) for row in rows] == [
        (rate, name) for rate in (2, 4) for name in names
    ]
    assert all(set(row) == ROW for row in rows)
    assert all(list(row["ttft_ms"]) == ["p50", "p95", "p99"] for row in rows)
    verified = {row["schedule"]: row["verified_per_request"] for row in rows}
    assert verified["off"] == 1 < verified["mtp1"] <= 2 < verified["fixed-2"] <= 3
    assert set(result.json["max_rate"]) == set(names)
    assert all(rate > 4 for rate in result.json["max_rate"].values())
    assert {gain["schedule"] for gain in result.json["over_mtp1"]} == set(names) - {"mtp1"}
    page = (out / "plan.html").read_text()
    assert page.count("<svg") == 4
    assert "src=" not in page
    assert "a target" in page
    assert json.loads((out / "plan.json").read_text())["rows"] == rows


def test_a_trace_has_its_own_rate_and_a_bare_table_is_warned_of(dspark, cost, tmp_path):
    trace = tmp_path / "trace.jsonl"
    trace.write_text(
        "".join(
            json.dumps({"arrival_s": i / 4, "prompt_tokens": 5, "answer_tokens": 4}) + "\n"
            for i in range(9)
        )
    )
    table = CostTable.load(cost)
    bare = CostTable(table.points, MACHINE).save(tmp_path / "bare.json")
    result = dspark(
        "plan", "--cost", bare, "--acceptance", ".7,.5,.4", "--trace", trace, "--users", 1, "--json"
    )
    assert result.status == 0, result.err
    assert "--whole-steps" in result.err
    assert [row["rate"] for row in result.json["rows"]] == pytest.approx([4.0] * 3)
    assert [row["schedule"] for row in result.json["rows"]] == ["off", "fixed", "lagged"]


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("--acceptance", ".5,.6"), 2, "never rise"),
        (("--acceptance", "nowhere"), 1, "neither a file"),
        (("--acceptance", ".5", "--schedule", "mtp1"), 2, "--mtp-cost"),
        (("--acceptance", ".5", "--schedule", "trees"), 2, "--tree-cost"),
        (("--acceptance", ".5", "--tree-cost", "trees.json"), 2, "below the first rank"),
        (("--acceptance", ".5", "--schedule", "fixed-2"), 2, "drafts 2 of 1"),
        (("--acceptance", ".5", "--schedule", "greedy"), 2, "greedy"),
        (("--acceptance", ".5", "--batch-size", 9), 2, "--max-requests 9"),
        (("--acceptance", ".5", "--percentile", 100), 2, "below 100"),
        (("--acceptance", ".5", "--cost", "missing.json"), 1, "does not exist"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_sentence(dspark, cost, words, status, said):
    result = dspark("plan", "--cost", cost, "--rate", 1, *QUICK, *words)
    assert (result.status, said in result.err) == (status, True), result.err


def test_a_target_whose_table_is_unknown_is_told_how_to_measure_it(dspark, pair):
    result = dspark("plan", "--cost", pair.attached, "--acceptance", ".5")
    assert result.status == 2
    assert "dspark profile" in result.err


def test_whole_steps_are_measured_and_planned_with(dspark, pair, tmp_path):
    path = tmp_path / "costs.json"
    measured = dspark(
        "profile", pair.attached, "--max-requests", 2, "--repeats", 1, "--whole-steps", "--threads",
        1, "--out", path, "--json",
    )  # fmt: skip
    assert measured.status == 0, measured.err
    table = CostTable.load(path)
    assert [extra.requests for extra in table.extras] == [1, 2]
    assert [prompt.rows for prompt in table.prompts] == [16, 64, 80]  # of a context of 160
    assert all(extra.plain_ms > 0 and extra.rest_ms > 0 for extra in table.extras)
    planned = dspark("plan", "--cost", path, "--acceptance", ".7,.5", "--rate", 1, "--json", *QUICK)
    assert planned.status == 0, planned.err
    assert "--whole-steps" not in planned.err


@pytest.mark.parametrize(
    ("words", "least", "most"),
    [
        (("--prompt-tokens", "30:0", "--answer-tokens", "9:0"), (30, 9), (30, 9)),
        (("--prompt-tokens", "30:.1"), (20, 1), (45, 4096)),
        (("--trace",), (5, 4), (7, 6)),
        ((), (24, 24), (200, 72)),
    ],
)
def test_whole_steps_are_measured_on_requests_of_the_traffic(
    dspark, pair, tmp_path, monkeypatch, words, least, most
):
    trace = tmp_path / "trace.jsonl"
    trace.write_text(
        '{"arrival_s": 0, "prompt_tokens": 5, "answer_tokens": 4}\n'
        '{"arrival_s": 1, "prompt_tokens": 7, "answer_tokens": 6}\n'
    )
    seen = []

    def measured(target, drafter, costs, *, lengths, **_):
        seen.extend(lengths)
        return costs

    monkeypatch.setattr("dspark.engine.profile_steps.measure_steps", measured)
    words = (*words, trace) if words == ("--trace",) else words
    result = dspark(
        "profile", pair.attached, "--max-requests", 1, "--repeats", 1, "--whole-steps", "--threads",
        1, "--out", tmp_path / "costs.json", *words,
    )  # fmt: skip
    assert result.status == 0, result.err
    found = np.array(seen)
    assert (found >= least).all()
    assert (found <= most).all()
    assert seen


def test_lengths_of_requests_need_whole_steps(dspark, pair):
    result = dspark("profile", pair.attached, "--prompt-tokens", 9)
    assert result.status == 2
    assert "need --whole-steps" in result.err


def test_whole_steps_of_shorter_blocks_are_refused(dspark, pair):
    result = dspark("profile", pair.attached, "--whole-steps", "--block-size", 1)
    assert result.status == 2
    assert "leave --block-size out" in result.err


def test_trees_are_recorded_measured_and_planned_with(dspark, pair, tmp_path, monkeypatch):
    monkeypatch.setattr("dspark.evaluation.report.write.can_draw", lambda: False)
    prompts = tmp_path / "fruit.jsonl"
    prompts.write_text('{"turns": ["how many apples"]}\n{"turns": ["a table for two"]}\n')
    out, costs, trees = tmp_path / "out", tmp_path / "costs.json", tmp_path / "trees.json"
    evaluated = dspark(
        "eval", pair.attached, "--prompts", prompts, "--max-new-tokens", 20, "--threads", 1,
        "--tree-nodes", 6, "--out", out, "--json",
    )  # fmt: skip
    assert evaluated.status == 0, evaluated.err
    words = ("--max-requests", 2, "--repeats", 1, "--whole-steps", "--threads", 1, "--json")
    for path, more in ((costs, ()), (trees, ("--tree-nodes", 6))):
        made = dspark("profile", pair.attached, *words, "--out", path, *more)
        assert made.status == 0, made.err
    assert max(point.tokens for point in CostTable.load(trees).points) == 2 * 7
    result = dspark(
        "plan", "--cost", costs, "--acceptance", out, "--tree-cost", trees, "--rate", 1, "--json",
        *QUICK,
    )  # fmt: skip
    assert result.status == 0, result.err
    rows = {row["schedule"]: row for row in result.json["rows"]}
    assert list(rows) == ["off", "fixed", "lagged", "trees"]
    assert rows["trees"]["verified_per_request"] > 1
    refused = dspark("profile", pair.attached, *words, "--tree-nodes", 6)
    assert refused.status == 2
    assert "needs --out" in refused.err
