import json

import pytest

from dspark.data.conversations import read_conversations

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
        assert (report["records"], report["dropped"]) == (len(found), 3 - len(found))
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
    assert "None of the 3 answers was wanted" in result.err
    assert not out.exists()


@pytest.mark.parametrize(
    "bad",
    [
        (["--batch-size", 0], 2, "--batch-size is 0"),
        (["--limit", 0], 2, "--limit is 0"),
        (["--drop-repeated-tokens", -1], 2, "--drop-repeated-tokens is -1"),
        (["--max-new-tokens", 0], 2, "max_new_tokens is 0"),
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
