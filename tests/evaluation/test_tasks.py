"""The nine sets and files of prompts."""

import gzip
import json
from pathlib import Path

import pytest

from dspark.errors import DataError
from dspark.evaluation.tasks import BENCHMARKS, load_benchmark, load_file

SHARED = Path(__file__).parents[3] / "shared" / "data" / "eval"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data/eval is not here")


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def texts(task):
    return [question.prompt.text for question in task.questions]


@needs_shared
@pytest.mark.parametrize(
    ("name", "asked", "available"),
    [
        ("gsm8k", 500, 1319), ("math500", 500, 500), ("aime25", 30, 30), ("mbpp", 256, 257),
        ("humaneval", 164, 164), ("livecodebench", 500, 1055), ("mt-bench", 80, 80),
        ("arena-hard-v2", 500, 750),
    ],
)  # fmt: skip
def test_local_sets_are_as_long_as_the_reference_asks(name, asked, available):
    task = load_benchmark(name, SHARED)
    assert (len(task.questions), task.available) == (asked, available)
    assert len({question.key for question in task.questions}) == asked
    turns = {1 + len(question.prompt.later) for question in task.questions}
    assert turns == ({2} if name == "mt-bench" else {1})


@needs_shared
def test_a_limit_may_be_above_what_the_reference_asks():
    assert len(load_benchmark("gsm8k", SHARED, limit=1000).questions) == 1000


def test_a_choice_hangs_on_the_seed_and_a_smaller_one_is_its_beginning(tmp_path):
    write(tmp_path / "gsm8k.jsonl", *({"turns": [f"question {i}"]} for i in range(50)))
    ten = texts(load_benchmark("gsm8k", tmp_path, limit=10, seed=3))
    assert texts(load_benchmark("gsm8k", tmp_path, limit=4, seed=3)) == ten[:4]
    assert texts(load_benchmark("gsm8k", tmp_path, limit=10, seed=4)) != ten
    assert ten != [f"question {i}" for i in range(10)]


ROWS = {
    "gsm8k": {"question": "1+1?", "answer": "2"},
    "math500": {"problem": "1+1?"},
    "aime25": {"problem": "1+1?"},
    "mbpp": {"prompt": "Write a sum."},
    "humaneval": {"prompt": "def f():\n", "test": ""},
    "livecodebench": {"question_content": "Sum two numbers.", "starter_code": ""},
    "mt-bench": {"prompt": ["First.", "Second."], "category": "writing"},
    "alpaca": {"instruction": "Say it.", "input": "It"},
    "arena-hard-v2": {"prompt": "Write.", "category": "hard_prompt"},
}
BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."
WORDED = {
    "gsm8k": ["1+1?" + BOXED],
    "math500": ["1+1?" + BOXED],
    "aime25": ["1+1?" + BOXED],
    "mbpp": ["Write a sum."],
    "humaneval": [
        "Write a solution to the following problem and make sure that it passes the tests:\n"
        "```python\ndef f():\n\n```"
    ],
    "mt-bench": ["First.", "Second."],
    "alpaca": ["Say it.\n\nInput:\nIt"],
    "arena-hard-v2": ["Write."],
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one row of each set: a folder for each, in place of its repository."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    names = {benchmark.hub.name: name for name, benchmark in BENCHMARKS.items()}
    build, asked = datasets.load_dataset_builder, []

    def load_dataset_builder(name, config=None, **options):
        asked.append((name, config))
        task = names[name]
        folder = tmp_path / task
        folder.mkdir(exist_ok=True)
        split = BENCHMARKS[task].hub.split
        datasets.Dataset.from_list([ROWS[task]]).to_parquet(folder / f"{split}.parquet")
        return build(str(folder), **options)

    def snapshot_download(name, **options):
        asked.append((name, options["allow_patterns"]))
        place = tmp_path / options["allow_patterns"].replace("*", "6")
        place.parent.mkdir(parents=True, exist_ok=True)
        write(place, ROWS[names[name]])
        return str(tmp_path)

    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr("dspark.data.prompts.sources.why_unreachable", lambda: None)
    return asked


@pytest.mark.parametrize("name", WORDED)
def test_rows_of_the_hub_are_worded_as_the_reference_does(name, hub):
    task = load_benchmark(name)
    (question,) = task.questions
    assert [question.prompt.text, *question.prompt.later] == WORDED[name]
    where = BENCHMARKS[name].hub
    assert hub == [(where.name, where.files or where.config)]
    assert task.source == f"hub: {where.name}"


def test_a_set_of_the_hub_that_has_changed_its_columns_is_refused(hub, monkeypatch):
    monkeypatch.setitem(ROWS, "gsm8k", {"query": "1+1?", "response": "2"})
    said = "openai/gsm8k.*has no column 'turns' or 'messages' or 'question', but 'query', 'resp"
    with pytest.raises(DataError, match=said):
        load_benchmark("gsm8k")
    monkeypatch.setitem(ROWS, "arena-hard-v2", {"question": "Write."})
    with pytest.raises(DataError, match=r"question\.jsonl, line 1: needs .* or 'prompt' with the"):
        load_benchmark("arena-hard-v2")


def test_a_users_own_file_may_hold_rows_of_the_set(tmp_path):
    write(tmp_path / "alpaca.jsonl", {"instruction": "Name a colour.", "input": ""})
    assert texts(load_benchmark("alpaca", tmp_path)) == ["Name a colour."]


@needs_shared
def test_livecodebench_is_worded_as_the_local_file(hub, monkeypatch):
    local = json.loads((SHARED / "livecodebench.jsonl").read_text().splitlines()[0])["turns"][0]
    begin = local.index("### Question:\n") + len("### Question:\n")
    end = local.index("\n\n### Format:")
    row = {"question_content": local[begin:end], "starter_code": ""}
    monkeypatch.setitem(ROWS, "livecodebench", row)
    (question,) = load_benchmark("livecodebench").questions
    assert question.prompt.text.rstrip("\n") == local.rstrip("\n")


def test_a_file_with_categories_is_a_task_for_each(tmp_path):
    lines = [
        {"question_id": str(i), "category": name, "turns": ["Ask.", f"More {i}."]}
        for i, name in enumerate(["coding", "math", "coding"])
    ]
    packed = tmp_path / "speed.jsonl.gz"
    packed.write_bytes(gzip.compress("".join(json.dumps(x) + "\n" for x in lines).encode()))
    coding, math = load_file(packed)
    assert (coding.name, coding.domain, len(coding.questions)) == ("coding", "coding", 2)
    assert math.questions[0].prompt.later == ("More 1.",)
    assert math.with_turns(1).questions[0].prompt.later == ()
    assert math.with_turns(1).questions[0].key == math.questions[0].key


def test_equal_prompts_have_keys_of_their_own(tmp_path):
    (task,) = load_file(write(tmp_path / "p.jsonl", {"prompt": "a"}, {"prompt": "a"}))
    assert task.name == "p"
    assert len({question.key for question in task.questions}) == 2


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "holds no prompt"),
        ([{"prompt": "a", "category": "x"}, {"prompt": "b"}], "on some lines only"),
        ([{"prompt": "a", "category": 3}], "line 1: 'category' must be"),
        ([{"turns": ["a", 1]}], "line 1: 'turns' must be"),
        ([{"question": "a"}], "line 1: needs"),
    ],
)
def test_malformed_files_are_named(tmp_path, lines, said):
    with pytest.raises(DataError, match=said):
        load_file(write(tmp_path / "p.jsonl", *lines))


def test_what_is_not_there_is_named_with_a_remedy(tmp_path):
    with pytest.raises(DataError, match="no task 'gsm9k'; the tasks are gsm8k, math500"):
        load_benchmark("gsm9k", tmp_path)
    with pytest.raises(DataError, match=r"alpaca is not in .*tatsu-lab/alpaca"):
        load_benchmark("alpaca", tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        load_benchmark("gsm8k", tmp_path / "none")
    write(tmp_path / "gsm8k.jsonl", {"problem": "Not of this set."})
    with pytest.raises(DataError, match=r"line 1: needs 'turns'.*openai/gsm8k"):
        load_benchmark("gsm8k", tmp_path)
    write(tmp_path / "mbpp.jsonl", {"prompt": None})
    with pytest.raises(DataError, match="line 1: needs 'turns', 'messages', or 'prompt' with the"):
        load_benchmark("mbpp", tmp_path)
