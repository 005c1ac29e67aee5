import json
import shutil

import pytest
from transformers import AutoTokenizer

from dspark.data.conversations import read_conversations
from dspark.data.files.json_lines import read_json_lines
from dspark.data.samples import read_samples

WORDS = ("--max-new-tokens", 5, "--json")


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"turns": [f"apples {i}"]}) + "\n" for i in range(3)))
    return path


@pytest.fixture
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_regenerate_writes_answers_and_counts_them(dspark, pair, prompts, tmp_path):
    out = tmp_path / "answers.jsonl"
    result = dspark("data", "regenerate", pair.attached, "--prompts", prompts, "--out", out, *WORDS)
    assert result.status == 0, result.err
    assert result.json.keys() >= {"records", "failed", "bytes", "bytes_per_token"}
    assert result.json["records"] == 3
    assert result.json["failed"] == 0
    assert result.json["bytes"] == out.stat().st_size
    written = list(read_conversations(out))
    assert [dialogue[0]["content"] for dialogue in written] == [f"apples {i}" for i in range(3)]
    assert all(dialogue[-1]["role"] == "assistant" for dialogue in written)


def test_limit_seed_and_temperature_act(dspark, pair, prompts, in_tmp_path):
    words = ["data", "regenerate", pair.attached, "--prompts", prompts, "--limit", 2, *WORDS]

    def answers(*more):
        assert dspark(*words, *more).json["records"] == 2
        return (in_tmp_path / "regenerated.jsonl").read_text()

    assert answers("--seed", 1) == answers("--seed", 1) != answers("--seed", 2)
    greedy = ("--temperature", 0)
    assert answers(*greedy, "--seed", 1) == answers(*greedy, "--seed", 2, "--draft", "none")


def test_unwanted_answers_are_dropped_and_counted(dspark, pair, prompts, tmp_path):
    out = tmp_path / "answers.jsonl"
    words = ["data", "regenerate", pair.attached, "--prompts", prompts, "--out", out]

    def lines(*more):
        report = dspark(*words, "--max-new-tokens", 40, "--json", *more).json
        found = out.read_text().splitlines()
        assert (report["records"], report["skipped"]) == (len(found), 3 - len(found))
        return found

    everything = lines()
    assert len(everything) == 3
    finished = [line for line in everything if '"finish_reason": "stop"' in line]
    assert 0 < len(finished) < 3
    assert lines("--only-finished") == finished
    once = lines("--drop-repeated-tokens", 1)
    assert len(once) < 3
    assert set(once) < set(everything)
    letter = json.loads(everything[0])["messages"][-1]["content"][0]
    assert everything[0] not in lines("--drop-containing", letter, "--limit", 3)


def test_a_file_of_unwanted_answers_is_not_written(dspark, pair, prompts, tmp_path):
    out = tmp_path / "answers.jsonl"
    words = ["data", "regenerate", pair.attached, "--prompts", prompts, "--out", out]
    result = dspark(*words, "--max-new-tokens", 1, "--only-finished")
    assert result.status == 1
    assert "The filters rejected all 3 answers" in result.err
    assert not out.exists()


@pytest.mark.parametrize(
    "bad",
    [
        (["--batch-size", 0], 2, "--batch-size is 0"),
        (["--limit", 0], 2, "--limit is 0"),
        (["--drop-repeated-tokens", -1], 2, "--drop-repeated-tokens is -1"),
        (["--max-new-tokens", 0], 2, "--max-new-tokens is 0"),
        (["--top-p", 2], 2, "top_p is 2"),
        (["--concurrency", 4], 2, "--concurrency acts only together with --server"),
        (["--server", "http://127.0.0.1:9", "--batch-size", 4], 2, "acts only without --server"),
        (["--server", "localhost"], 2, "--server is 'localhost'"),
        (["--server", "http://127.0.0.1:9"], 1, "http://127.0.0.1:9/v1 does not answer"),
        (
            ["--server", "http://127.0.0.1:9", "--api-key-env", "NO_SUCH_KEY"],
            2,
            "--api-key-env is NO_SUCH_KEY",
        ),
        (["--prompts", "absent.jsonl"], 1, "absent.jsonl does not exist"),
        (["--draft", "/absent"], 1, "/absent"),
    ],
)
def test_bad_input(dspark, pair, prompts, in_tmp_path, bad):
    words, status, sentence = bad
    result = dspark("data", "regenerate", pair.attached, "--prompts", prompts, *words)
    assert (result.status, result.out) == (status, "")
    assert sentence in result.err
    assert not (in_tmp_path / "regenerated.jsonl").exists()


def test_sampling_is_what_the_model_recommends(dspark, pair, prompts, tmp_path):
    target = tmp_path / "target"
    shutil.copytree(pair.target, target)
    settings = {"do_sample": True, "temperature": 0.001, "top_k": 1, "eos_token_id": 2}
    (target / "generation_config.json").write_text(json.dumps(settings))
    words = ["data", "regenerate", target, "--prompts", prompts, *WORDS]

    def answers(name, *more):
        result = dspark(*words, "--out", tmp_path / name, *more)
        assert result.status == 0, result.err
        return (tmp_path / name).read_text(), result.err

    recommended, said = answers("a.jsonl", "--seed", 1)
    assert "recommends: temperature 0.001, top_k 1." in " ".join(said.split())
    greedy, said = answers("b.jsonl", "--temperature", 0)
    assert "recommends" not in said
    assert recommended == greedy
    free = answers("c.jsonl", "--temperature", 1, "--top-k", 0)[0]
    assert free != greedy


def test_malformed_lines_are_listed_and_end_nothing_unless_strict(dspark, pair, prompts, tmp_path):
    with prompts.open("a") as file:
        file.write('{"turns": ["cut o')
    words = ["data", "regenerate", pair.target, "--prompts", prompts, *WORDS]
    result = dspark(*words, "--out", tmp_path / "a.jsonl")
    assert (result.json["records"], result.json["failed"], result.json["input"]) == (3, 1, 4)
    assert "line 4 is not valid JSON" in (tmp_path / "a_failed.jsonl").read_text()
    strict = dspark(*words, "--out", tmp_path / "b.jsonl", "--strict")
    assert strict.status == 1
    assert "line 4 is not valid JSON" in strict.err


def test_prompts_are_collected_split_and_accounted_for(dspark, tmp_path):
    source, against = tmp_path / "in.jsonl", tmp_path / "eval"
    against.mkdir()
    lines = [{"conversations": [{"from": "human", "value": f"Question {i}?"}]} for i in range(50)]
    lines += [lines[0], {"turns": ["question 1"]}, {"turns": ["Secret"]}, {"nothing": 1}]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (against / "set.jsonl").write_text('{"turns": ["secret!"]}\n')
    words = ["data", "prompts", source, "--out", tmp_path / "train.jsonl", "--json"]
    more = ["--heldout", tmp_path / "heldout.jsonl", "--heldout-share", 0.2, "--against", against]
    result = dspark(*words, *more)
    assert result.status == 0, result.err
    report = result.json
    assert report["input"] == 54
    assert report["records"] + report["heldout"] == 50
    assert report["heldout"] > 2
    names = ("duplicates", "near_duplicates", "contaminated", "malformed")
    assert [report[name] for name in names] == [1, 1, 1, 1]
    sizes = [(tmp_path / f"{name}.jsonl").stat().st_size for name in ("train", "heldout")]
    assert report["bytes"] == sum(sizes)
    assert "54 lines" in result.err
    assert dspark(*words, "--limit", 7).json["records"] == 7
    assert dspark(*words, "--strict").status == 1


def test_prompts_are_collected_from_a_data_set(dspark, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "blend"
    folder.mkdir()
    asked = [("Add", "1 and 2"), ("Name a colour", None), ("Wait", "")]
    table = [{"instruction": text, "input": given} for text, given in asked]
    datasets.Dataset.from_list(table).to_parquet(folder / "test.parquet")
    words = ["data", "prompts", folder, "--out", tmp_path / "o.jsonl", "--split", "test", "--json"]
    assert dspark(*words, "--offline").json["records"] == 3
    assert list((tmp_path / "cache").rglob("*.arrow"))
    shutil.rmtree(tmp_path / "cache")
    assert dspark(*words, "--limit", 2).json["records"] == 2
    assert not list((tmp_path / "cache").rglob("*.arrow"))  # a stream leaves no table behind
    written = [record["turns"] for _, record in read_json_lines(tmp_path / "o.jsonl")]
    assert written == [["Add\n\nInput:\n1 and 2"], ["Name a colour"]]
    datasets.Dataset.from_list([{"question": "q", "answer": "a"}]).to_parquet(
        folder / "test.parquet"
    )
    result = dspark(*words)
    assert (result.status, result.out) == (1, "")
    assert "has no column 'messages' or" in result.err
    assert "but 'question', 'answer'; name another configuration" in result.err


@pytest.mark.parametrize(
    ("bad", "status", "sentence"),
    [
        (["--heldout-share", 0.1], 2, "--heldout-share needs --heldout"),
        (["--heldout", "h.jsonl", "--heldout-share", 1], 2, "--heldout-share is 1.0"),
        (["--heldout", "o.jsonl"], 2, "name two files"),
        (["--ngram", 8], 2, "--ngram needs --against"),
        (["--limit", 0], 2, "--limit is 0"),
        (["--against", "absent"], 1, "absent does not exist"),
        (["--self", "bundled"], 2, "--self writes prompts and reads none"),
        (["--count", 5], 2, "--count acts only together with --self"),
    ],
)
def test_bad_prompts_options(dspark, prompts, in_tmp_path, bad, status, sentence):
    result = dspark("data", "prompts", prompts, "--out", "o.jsonl", *bad)
    assert (result.status, result.out) == (status, "")
    assert sentence in result.err
    assert not (in_tmp_path / "o.jsonl").exists()


def test_a_model_writes_prompts_that_are_answered(dspark, pair, tmp_path):
    out, words = tmp_path / "own.jsonl", ["--count", 2, "--batch-size", 2, "--json"]
    result = dspark("data", "prompts", "--self", pair.target, "--out", out, *words)
    assert result.json["records"] == len(out.read_text().splitlines()) == 2
    assert result.json["tries"] == 2 + sum(result.json["dropped"].values())
    refused = dspark("data", "prompts", "--self", pair.target, "--out", out, "--limit", 3)
    assert (refused.status, "--limit acts only without --self" in refused.err) == (2, True)
    nothing = dspark("data", "prompts", "--out", out)
    assert (nothing.status, "There is no SOURCE" in nothing.err) == (2, True)


def test_collected_prompts_are_answered_and_become_samples(dspark, pair, prompts, tmp_path):
    collected, out = tmp_path / "c.jsonl.gz", tmp_path / "o.jsonl.gz"
    assert dspark("data", "prompts", prompts, "--out", collected).status == 0
    words = ["data", "regenerate", pair.attached, "--prompts", collected, "--out", out]
    assert dspark(*words, "--thinking", "off", *WORDS).json["records"] == 3
    tokenizer = AutoTokenizer.from_pretrained(pair.attached)
    samples = list(read_samples(out, tokenizer))
    assert len(samples) == 3
    assert all(sample.num_supervised for sample in samples)
