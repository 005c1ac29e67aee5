"""`dspark eval` and `dspark report`, from the command line to the files."""

import json

import pytest

TEXTS = ("how many apples", "a table for two", "left", "two apples", "for how many")


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def prompts(tmp_path):
    return write(tmp_path / "fruit.jsonl", *({"turns": [text]} for text in TEXTS))


@pytest.fixture
def without_figures(monkeypatch):
    """As if matplotlib were missing: drawing takes most of a short run's time."""
    monkeypatch.setattr("dspark.evaluation.report.write.can_draw", lambda: False)


@pytest.fixture
def evaluate(dspark, pair, prompts, tmp_path):
    def run(*words, target=pair.attached, source=("--prompts", prompts)):
        return dspark(
            "eval", target, *source, "--max-new-tokens", 20, "--threads", 1,
            "--out", tmp_path / "out", "--json", *words,
        )  # fmt: skip

    return run


def test_one_drafter_one_task(evaluate, tmp_path):
    result = evaluate()
    assert result.status == 0, result.err
    report = result.json
    task = report["tasks"]["fruit"]
    keys = {
        "accepted_length", "ci95", "conditional_acceptance", "rounds", "tokens", "ece", "auc",
        "brier",
    }  # fmt: skip
    assert keys <= set(task)
    assert len(task["conditional_acceptance"]) == 4
    assert report["macro"]["accepted_length"] == task["accepted_length"]
    assert (task["prompts"], task["skipped"]) == (5, 0)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"report.html", "report.md", "report.json", "decay.png", "calibration.png"} <= names
    assert "fruit" in result.err
    said = (tmp_path / "out" / "report.md").read_text()
    assert f"dspark eval {report['runs'][0]['settings']['target']}" in said


@pytest.mark.usefixtures("without_figures")
def test_drafters_and_temperatures_side_by_side_and_the_report_again(
    evaluate, dspark, pair, tmp_path
):
    words = ("--draft", f"ours={pair.drafter}", "--draft", "ngram", "--draft", "plain=none")
    result = evaluate(*words, "--temperature", "0,1", target=pair.target)
    assert result.status == 0, result.err
    runs = [(run["name"], run["settings"]["temperature"]) for run in result.json["runs"]]
    assert runs == [(n, t) for n in ("ngram", "ours", "plain") for t in (0.0, 1.0)]
    assert result.json["tasks"] == result.json["runs"][2]["tasks"]  # of the drafter named first
    greedy = [pair for pair in result.json["comparisons"] if pair["setting"]["temperature"] == 0]
    assert [pair["same_answers"] for pair in greedy] == [1, 1, 1]
    first = json.loads((tmp_path / "out" / "report.json").read_text())
    again = dspark("report", tmp_path / "out", "--out", tmp_path / "again", "--json")
    assert again.status == 0, again.err
    assert json.loads((tmp_path / "again" / "report.json").read_text()) == first
    assert dspark("eval", "--report", tmp_path / "out", "--json").json["runs"] == first["runs"]


@pytest.mark.parametrize(
    ("sweep", "words", "field", "values"),
    [
        ("threshold", ("--values", "0,0.5,0.9"), "threshold", [0, 0.5, 0.9]),
        ("block", (), "block_size", [1, 2, 3, 4]),
        ("verifier", (), "verifier", ["token", "block", "coupled"]),
        ("temperature", ("--values", "0,1"), "temperature", [0, 1]),
        ("top-p", ("--values", "0.5,1", "--temperature", "1"), "top_p", [0.5, 1]),
    ],
)
def test_sweeps(evaluate, tmp_path, sweep, words, field, values):
    result = evaluate("--sweep", sweep, *words, "--limit", 3)
    assert result.status == 0, result.err
    assert [run["settings"][field] for run in result.json["runs"]] == values
    assert (tmp_path / "out" / f"{sweep}.png").is_file()
    if sweep == "threshold":
        sent = [run["tasks"]["fruit"]["verified_per_round"] for run in result.json["runs"]]
        assert sent[0] == 4
        assert sent == sorted(sent, reverse=True)


@pytest.mark.usefixtures("without_figures")
def test_a_second_start_asks_nothing_again(evaluate, tmp_path):
    first = evaluate("--limit", 3)
    assert first.status == 0, first.err
    (path,) = (tmp_path / "out").glob("*.records.jsonl")
    before = path.read_text()
    assert evaluate("--limit", 3).status == 0
    added = path.read_text()[len(before) :].splitlines()
    assert [list(json.loads(line)) for line in added] == [["plan"]]
    assert evaluate().json["tasks"]["fruit"]["prompts"] == 5
    records = [line for line in path.read_text().splitlines() if '"record"' in line[:12]]
    assert len(records) == 5


@pytest.mark.usefixtures("without_figures")
def test_prompts_over_the_context_are_listed(evaluate, prompts, tmp_path):
    with prompts.open("a") as file:
        file.write(json.dumps({"turns": ["how many apples are left " * 60]}) + "\n")
    result = evaluate()
    assert result.status == 0, result.err
    (skipped,) = result.json["runs"][0]["skipped"]
    assert skipped["task"] == "fruit"
    assert result.json["tasks"]["fruit"]["skipped"] == 1
    assert "the context holds 160" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.usefixtures("without_figures")
def test_tasks_of_a_folder(evaluate, tmp_path):
    folder = tmp_path / "sets"
    folder.mkdir()
    write(folder / "gsm8k.jsonl", *({"turns": [text]} for text in TEXTS))
    write(folder / "mt-bench.jsonl", {"turns": ["left", "two"]})
    result = evaluate(source=("--data", folder))
    assert result.status == 0, result.err
    assert list(result.json["tasks"]) == ["gsm8k", "mt-bench"]
    assert "math500, aime25, mbpp" in " ".join(result.err.split())
    assert list(result.json["runs"][0]["domains"]) == ["math", "chat"]
    result = evaluate(source=("--data", folder, "--tasks", "gsm8k,alpaca"))
    assert result.status == 1
    assert "alpaca is not in" in result.err


@pytest.mark.usefixtures("without_figures")
def test_without_matplotlib_there_are_tables_and_one_warning(evaluate, tmp_path):
    result = evaluate()
    assert result.status == 0
    assert " ".join(result.err.split()).count("they need matplotlib") == 1
    assert not list((tmp_path / "out").glob("*.png"))
    assert "<svg" not in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("--values", "1,2"), 2, "--values belongs to a sweep"),
        (("--top-p", "0.9"), 2, "do nothing at temperature 0"),
        (("--sweep", "top-p"), 2, "does nothing at temperature 0"),
        (("--sweep", "block", "--values", "1,x"), 2, "takes values like"),
        (("--sweep", "block", "--values", "9"), 2, "block size is 9"),
        (("--threshold", "0.5"), 2, "--schedule threshold"),
        (("--sweep", "block", "--block-size", "2"), 2, "its own block sizes"),
        (("--sweep", "top-p", "--top-p", "0.5", "--temperature", "1"), 2, "its own values"),
        (("--limit", "0"), 2, "--limit is 0"),
        (("--temperature", "-1"), 2, "not 0 or above"),
        (("--thinking", "on"), 1, "has no thinking mode"),
        (("--draft", "a=ngram", "--draft", "a=none"), 2, "Two drafters are named a"),
        (("--draft", "no/such/place"), 1, "no/such/place"),
    ],
)
def test_wrong_options_are_one_sentence(evaluate, words, status, said):
    result = evaluate(*words)
    assert result.status == status
    assert said in " ".join(result.err.split())
    assert "Traceback" not in result.err


def test_what_is_not_there_is_one_sentence(dspark, evaluate, pair, tmp_path):
    empty = write(tmp_path / "empty.jsonl")
    for words, status, said in (
        (("eval", pair.attached, "--prompts", empty), 1, "holds no prompt"),
        (("eval", pair.attached, "--tasks", "gsm9k", "--data", tmp_path), 1, "no task 'gsm9k'"),
        (("eval", pair.attached, "--data", tmp_path), 1, "none of the nine sets"),
        (("eval", pair.target, "--prompts", empty), 1, "holds no prompt"),
        (("eval",), 2, "Name a TARGET"),
        (("eval", pair.target, "--report", tmp_path), 2, "--report decodes nothing"),
        (("report", tmp_path / "none"), 1, "holds no evaluation"),
    ):
        result = dspark(*words)
        assert (result.status, said in " ".join(result.err.split())) == (status, True), result.err
    result = evaluate(target=pair.target)
    assert result.status == 1
    assert "has no drafter attached; give one with --draft" in " ".join(result.err.split())
