"""What is written: figures for what there is, one page that needs nothing, telling names."""

import re

import pytest

from dspark.evaluation.calibration import calibration_figures
from dspark.evaluation.records import Drafted, Plan, Record, RunRecords, Settings, Spent, Turn
from dspark.evaluation.report.figures import draw
from dspark.evaluation.report.results import report_of
from dspark.evaluation.report.write import write_report
from dspark.evaluation.sweeps import main_runs, run_labels, series

BLOCK = 4


def make_run(
    drafter, *, keeps=2, layers=2, seconds=1.0, logits=True, tasks=("gsm8k", "mbpp"), **options
):
    settings = Settings(
        "tiny", "t", drafter, "here", drafter, "float32", **({"temperature": 0.0} | options)
    )
    block = settings.block_size or BLOCK
    run = RunRecords(settings)
    domains = {"gsm8k": "math", "mbpp": "code", "humaneval": "code"}
    keys = [f"k{i}" for i in range(12)]
    plan = {
        t: {"domain": domains[t], "source": "here", "available": 12, "keys": keys} for t in tasks
    }
    drafted = Drafted(block, layers, 1000)
    run.start(Plan("dspark eval tiny <&>", {"hardware": "abacus"}, drafted, plan))
    for t, task in enumerate(tasks):
        for i, key in enumerate(keys):
            kept = [min(block, (keeps + t + n) % (2 + i % block)) for n in range(30)]
            rows = tuple(tuple(2.0 - k + (n % 3) for k in range(block)) for n in range(30))
            turn = Turn(
                tokens=1 + sum(kept) + 30, room=1000, finish_reason="stop", drafted=30 * block,
                verified=(block,) * 30, kept=tuple(kept), cut=False,
                logits=rows if logits else None, digest="d", text="",
            )  # fmt: skip
            spent = Spent(seconds, 31, 30, 30.0, 3.0, 90.0, 62)
            run.add(Record(task, key, (turn,), None, spent))
    return run


@pytest.fixture(scope="module")
def report():
    runs = [make_run("DSpark"), make_run("DFlash", keeps=1, layers=5, logits=False)]
    runs += [make_run("DSpark", block_size=k) for k in (1, 2)]
    runs += [make_run("DSpark", schedule="threshold", threshold=c) for c in (0.3, 0.6)]
    runs += [make_run("DSpark", temperature=1.0, verifier=v) for v in ("token", "block")]
    return report_of(runs)


@pytest.fixture(scope="module")
def written(report, tmp_path_factory):
    """The report's files, its figures and its warnings; figures are drawn once."""
    drawn, said = {}, []

    def kept(found):
        drawn.update(draw(found))
        return drawn

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dspark.evaluation.report.figures.draw", kept)
        paths = write_report(report, tmp_path_factory.mktemp("report"), said.append)
    return paths, drawn, said


def test_every_figure_that_there_is_data_for(written):
    _, drawn, _ = written
    assert set(drawn) == {
        "accepted_length", "decay", "depth", "block", "threshold", "calibration", "verifier",
        "temperature",
    }  # fmt: skip
    for drawing in drawn.values():
        assert drawing.png.startswith(b"\x89PNG")
        assert drawing.svg.startswith("<svg")
    assert set(draw(report_of([make_run("one", logits=False)]))) == {"accepted_length", "decay"}


def test_the_page_needs_nothing_and_escapes_everything(written):
    paths, _, said = written
    assert said == []
    assert all(path.stat().st_size for path in paths)
    html = paths[0].read_text()
    assert html.count("<figure>") == 8
    assert not re.findall(r'(?:src|href)="(?!#)', html)
    assert "@import" not in html
    assert "url(http" not in html
    assert 'name="viewport"' in html
    assert "prefers-color-scheme: dark" in html
    assert "dspark eval tiny &lt;&amp;&gt;" in html
    markdown = paths[1].read_text()
    for name in re.findall(r"\]\((.*?\.png)\)", markdown):
        assert (paths[1].parent / name).is_file()
    tables = [block for block in markdown.split("\n\n") if block.startswith("|")]
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1
    assert "| abacus |" in markdown


def test_all_but_timings_is_the_same_whatever_the_clock_said(tmp_path, monkeypatch):
    monkeypatch.setattr("dspark.evaluation.report.write.can_draw", lambda: False)
    slow, fast = (
        report_of([make_run("one", seconds=s), make_run("two", keeps=3, seconds=s)])
        for s in (2.0, 1.0)
    )
    assert slow["runs"][0]["tasks"]["gsm8k"]["timings"]["tokens_per_s"] == pytest.approx(
        fast["runs"][0]["tasks"]["gsm8k"]["timings"]["tokens_per_s"] / 2
    )
    texts = []
    for report in (slow, fast):
        write_report(report, tmp_path, lambda _said: None)
        text = (tmp_path / "report.md").read_text()
        texts.append((re.sub(r"## Speed.*?## ", "", text, flags=re.DOTALL), text))
    assert texts[0][0] == texts[1][0]
    assert texts[0][1] != texts[1][1]


def test_the_terms_of_latency():
    task = report_of([make_run("one")])["runs"][0]["tasks"]["gsm8k"]
    spent = task["timings"]
    assert (spent["draft_ms"], spent["schedule_ms"], spent["verify_ms"]) == (1.0, 0.1, 3.0)
    assert spent["latency_ms_per_token"] == pytest.approx(4.1 / task["accepted_length"])
    assert spent["requests_per_step"] == 2


def test_macro_averages():
    run = report_of([make_run("one", tasks=("gsm8k", "mbpp", "humaneval"))])["runs"][0]
    math, code, more = (row["accepted_length"] for row in run["tasks"].values())
    assert run["macro"]["accepted_length"] == pytest.approx((math + code + more) / 3)
    assert run["domains"]["code"]["accepted_length"] == pytest.approx((code + more) / 2)
    assert run["macro"]["accepted_length_domains"] == pytest.approx((math + (code + more) / 2) / 2)
    low, high = run["macro"]["ci95"]
    assert low < run["macro"]["accepted_length"] < high


def test_unfinished_prompts_are_said(tmp_path, monkeypatch):
    monkeypatch.setattr("dspark.evaluation.report.write.can_draw", lambda: False)
    run = make_run("one")
    del run.records["gsm8k", "k3"]
    report = report_of([run])
    assert report["runs"][0]["unfinished"] == 1
    write_report(report, tmp_path, lambda _said: None)
    assert "one (1)" in (tmp_path / "report.md").read_text()


def test_labels_name_what_differs():
    runs = report_of([make_run("a"), make_run("a", temperature=1.0), make_run("b")])["runs"]
    assert run_labels(runs) == ["a T=0", "a T=1", "b T=0"]
    assert run_labels(runs[:1]) == ["a"]
    again = {**runs[0], "settings": {**runs[0]["settings"], "draft_weights": "other"}}
    assert len(set(run_labels([runs[0], again]))) == 2


def test_trees_and_chains_of_one_drafter_are_two_runs():
    runs = report_of([make_run("a"), make_run("a", tree_nodes=16)])["runs"]
    assert sorted(run_labels(runs)) == ["a", "a trees of 16"]
    assert len(main_runs(runs)) == 2


def test_runs_are_sorted_into_figures(report):
    runs = report["runs"]
    assert [(r["name"], r["settings"]["temperature"]) for r in main_runs(runs)] == [
        ("DFlash", 0.0), ("DSpark", 0.0), ("DSpark", 1.0), ("DSpark", 1.0),
    ]  # fmt: skip
    (blocks,) = series(runs, "block_size")
    assert [run["drafter"]["block_size"] for run in blocks] == [1, 2, 4]
    (thresholds,) = series(runs, "threshold")
    assert [run["settings"]["threshold"] for run in thresholds] == [0.3, 0.6]
    assert series(runs, "top_p") == []


def test_calibration_before_and_after():
    run = make_run("one", tasks=("gsm8k",))
    records = run.of_task("gsm8k")
    fitted = calibration_figures(records, Drafted(BLOCK), "token")
    assert fitted["calibration"]["after_by"] == "cross-fitted"
    assert fitted["calibration"]["mean_after"]["ece"] < fitted["calibration"]["mean_before"]["ece"]
    assert fitted["ece"] == fitted["calibration"]["mean_before"]["ece"]
    scaling = Drafted(BLOCK, temperatures=(1.5,) * BLOCK)
    stored = calibration_figures(records, scaling, "token")
    assert stored["calibration"]["after_by"] == "stored"
    assert stored["ece"] == stored["calibration"]["mean_after"]["ece"]
    assert stored["calibration"]["before"] == fitted["calibration"]["before"]
    few = calibration_figures(records[:2], Drafted(BLOCK), "token")
    assert few["calibration"]["after"] is None
    assert (
        calibration_figures(make_run("two", logits=False).of_task("gsm8k"), Drafted(BLOCK), "token")
        is None
    )


def test_a_cut_round_is_observed_up_to_there_under_the_token_rule_only():
    run = make_run("one", tasks=("gsm8k",))
    (record, *_) = run.of_task("gsm8k")
    (turn,) = record.turns
    kept = (*turn.kept[:-1], 2)
    cut = Record("gsm8k", "k0", (Turn(**{**vars(turn), "kept": kept, "cut": True}),))
    counts = {
        verifier: calibration_figures([cut], Drafted(BLOCK), verifier)["calibration"]["before"][
            "count"
        ]
        for verifier in ("token", "block")
    }
    assert counts == {"token": [30, 30, 29, 29], "block": [29] * 4}
