import gzip
import json
import random
import re

import pytest

from dspark.data.conversations import read_prompts, read_record
from dspark.data.files.json_lines import Row
from dspark.data.prompts.collect import Split, collect_prompts
from dspark.data.prompts.dedup import EvaluationTexts, digest, evaluation_texts, near_text, words_of
from dspark.data.prompts.sources import DataSet, read_rows
from dspark.errors import DataError


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path, *records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def rows(*records):
    return [Row(f"here, line {i}", record) for i, record in enumerate(records, 1)]


def shared(*turns, role="from", text="value"):
    return {"conversations": [{role: name, text: said} for name, said in turns]}


def test_roles_are_mapped_and_unknown_ones_dropped_with_a_count():
    record = shared(
        ("gpt", "Hello!"),
        ("human", "Hi"),
        ("bard", "Yes?"),
        ("narrator", "Later."),
        ("USER", "Bye"),
    )
    found = read_record(record, "here")
    assert [(m["role"], m["content"]) for m in found.dialogue.messages] == [
        ("user", "Hi"),
        ("assistant", "Yes?"),
        ("user", "Bye"),
    ]
    assert found.dropped == {"assistant": 1, "narrator": 1}


def test_every_kind_of_record(tmp_path):
    records = (
        {"turns": ["a", "b"]},
        {"prompt": "once"},
        {"instruction": "Add", "input": "1 and 2", "output": "3"},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]},
        shared(("human", "x"), ("gpt", "y")),
    )
    out, heldout = tmp_path / "o.jsonl", tmp_path / "h.jsonl"
    report = collect_prompts(rows(*records), out)
    assert report.records == report.input == 5
    written = lines(out)
    assert written[0]["turns"] == ["a", "b"]
    assert written[1]["prompt"] == "once"
    assert written[2]["turns"] == ["Add\n\nInput:\n1 and 2"]
    assert [m["role"] for m in written[3]["messages"]] == ["system", "user"]
    assert written[4]["messages"][1]["content"] == "y"
    assert len({record["id"] for record in written}) == 5
    collect_prompts(rows(*records), out, split=Split(heldout, 1.0))
    assert '"y"' not in heldout.read_text()  # an answer is the model's to give
    assert [p.text for p in read_prompts(heldout)] == [
        "a",
        "once",
        written[2]["turns"][0],
        "q",
        "x",
    ]


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({}, "needs 'messages'"),
        ({"messages": "x"}, "must be a list of objects"),
        ({"messages": [{"role": "user", "content": 3}]}, "'content' string"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "no user turn"),
        ({"turns": [" "]}, "no user turn with any text"),
        ({"turns": [1]}, "list of strings"),
        ({"turns": ["\ud800"]}, "half a character"),
        ({"prompt": ""}, "no user turn with any text"),
    ],
)
def test_malformed_records_are_named(record, said):
    with pytest.raises(DataError, match=said):
        read_record(record, "here")


def test_every_line_is_accounted_for(tmp_path):
    source = tmp_path / "in.jsonl"
    whole = [
        {"turns": ["What is 3 + 4?"]},
        {"turns": ["What is 3 + 4?"]},
        {"turns": ["  what is\n3 + 4"]},
        {"turns": ["What is 3 - 4?"]},
        {"turns": ["A secret test question"]},
        {"turns": []},
    ]
    write(source, *whole)
    with source.open("a") as file:
        file.write('{"turns": ["cut o')
    against = write(tmp_path / "eval.jsonl", {"turns": ["a secret TEST question!"]})
    out = tmp_path / "out.jsonl"
    report = collect_prompts(
        read_rows(DataSet(str(source))), out, against=evaluation_texts([against])
    )
    assert (report.input, report.records) == (7, 2)
    assert (report.duplicates, report.near_duplicates) == (1, 1)
    assert (report.contaminated, report.malformed) == (1, 2)
    assert [r["turns"][0] for r in lines(out)] == ["What is 3 + 4?", "What is 3 - 4?"]
    (removed,) = lines(tmp_path / "out_contaminated.jsonl")
    assert removed["where"].endswith("in.jsonl, line 5")
    assert removed["against"].endswith("eval.jsonl, line 1")
    assert removed["prompt"] == "A secret test question"
    faults = lines(tmp_path / "out_malformed.jsonl")
    assert [f["where"].rpartition(" ")[2] for f in faults] == ["6", "7"]
    assert "not valid JSON" in faults[1]["error"]
    with pytest.raises(DataError, match="line 6: 'turns'"):
        collect_prompts(read_rows(DataSet(str(source))), out, strict=True)
    # A later run without faults leaves no list of them.
    collect_prompts(rows(whole[0]), out)
    assert not (tmp_path / "out_malformed.jsonl").exists()


def test_a_cut_gzip_file_gives_what_it_holds(tmp_path):
    draw = random.Random(0)
    text = "".join(json.dumps({"turns": [str(draw.random())]}) + "\n" for _ in range(2000))
    packed = gzip.compress(text.encode())
    source = tmp_path / "in.jsonl.gz"
    source.write_bytes(packed[: len(packed) // 2])
    report = collect_prompts(read_rows(DataSet(str(source))), tmp_path / "o.jsonl")
    assert 500 < report.records < 1500
    assert (report.malformed, report.input) == (1, report.records + 1)
    (fault,) = lines(tmp_path / "o_malformed.jsonl")
    assert "cannot be read to its end" in fault["error"]


def test_the_split_does_not_change_when_lines_are_added(tmp_path):
    records = [{"turns": [f"Question {i}?"]} for i in range(2000)]

    def heldout(given, seed=0):
        split = Split(tmp_path / "h.jsonl", 0.1, seed)
        report = collect_prompts(rows(*given), tmp_path / "t.jsonl", split=split)
        assert report.records + report.heldout == len(given)
        return {record["turns"][0] for record in lines(tmp_path / "h.jsonl")}

    few, many = heldout(records[:1000]), heldout([*records[1000:], *records[:1000]])
    assert few == {text for text in many if int(text[9:-1]) < 1000}
    assert 60 < len(few) < 140
    assert heldout(records, seed=1) != many
    assert heldout([{"turns": [" question  7"]}]) == set() or "Question 7?" in many


def test_no_prompt_left_writes_nothing(tmp_path):
    out = tmp_path / "o.jsonl"
    out.write_text("precious")
    with pytest.raises(DataError, match="No prompt is left of 1 lines: 1 are malformed"):
        collect_prompts(rows({}), out)
    assert out.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [out]


def overlaps(text, evaluation, n):
    """The plain definition: a shared row of n words."""
    mine, theirs = words_of(text), words_of(evaluation)
    return any(
        mine[i : i + n] == theirs[j : j + n]
        for i in range(len(mine) - n + 1)
        for j in range(len(theirs) - n + 1)
    )


def test_contamination_equals_the_plain_definition():
    draw = random.Random(3)
    vocabulary = [f"w{i}" for i in range(6)]
    sets = [" ".join(draw.choices(vocabulary, k=draw.randint(1, 12))) for _ in range(6)]
    texts = EvaluationTexts(((str(i), text) for i, text in enumerate(sets)), ngram=4)
    seen = set()
    for _ in range(400):
        text = ", ".join(draw.choices(vocabulary, k=draw.randint(1, 10)))
        plain = any(
            overlaps(text, other, 4)
            or (len(words_of(other)) < 4 and words_of(text) == other.split())
            for other in sets
        )
        assert (texts.match(text) is not None) == plain
        seen.add(plain)
    assert seen == {True, False}


def test_wording_that_evaluation_prompts_share_is_no_evidence():
    wording = "Please reason step by step, and put your final answer within \\boxed{}."
    names = ["Ann", "Bob", "Cid", "Dan", "Eve", "Fay", "Gus", "Hal", "Ida", "Jan", "Kim", "Lea"]
    sets = [
        (name, f"{name} has {name} two {name} four {name} six. How many dollars? {wording}")
        for name in names
    ]
    texts = EvaluationTexts(sets, ngram=7)
    assert texts.match(f"Zoe sells 7 pears. How many dollars? {wording}") is None
    match = texts.match(f"Once, Bob has Bob two: Bob four Bob six! How? {wording}")
    assert match is not None
    assert (match.against, match.words) == ("Bob", "bob has bob two bob four bob")


def test_scripts_without_spaces_have_words():
    assert words_of("你好 world\uff0c3テ") == ["你", "好", "world", "3", "テ"]
    assert near_text("\u201c\uff28\uff45\uff4c\uff4c\uff4f\u201d,\n *World*!") == "hello world"
    assert near_text("3.5 - 2") != near_text("35 - 2")
    assert digest(["ab", "c"]) != digest(["a", "bc"])


def test_a_folder_of_files_is_a_source(tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    write(folder / "a.jsonl", {"turns": ["a"]})
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(b'{"turns": ["b"]}\n'))
    assert [row.record["turns"] for row in read_rows(DataSet(str(folder)))] == [["a"], ["b"]]
    assert len(evaluation_texts([folder])) == 2


def test_what_is_no_source_is_named(tmp_path):
    for name in ("./absent.jsonl", "absent/also.jsonl", "a/b/c", str(tmp_path / "none")):
        with pytest.raises(DataError, match=f"^{re.escape(name)} does not exist; give a JSON"):
            list(read_rows(DataSet(name)))
    with pytest.raises(DataError, match=r"holds no \.jsonl"):
        evaluation_texts([tmp_path])
    with pytest.raises(DataError, match="nowhere does not exist"):
        evaluation_texts(["nowhere"])
